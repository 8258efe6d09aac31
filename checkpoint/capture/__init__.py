"""Copying state while training goes on: pool, gate, checks."""
