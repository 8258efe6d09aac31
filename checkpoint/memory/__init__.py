"""Snapshots in the memory of several nodes, with parity against the loss of some of them."""
