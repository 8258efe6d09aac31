"""Subscribers for inference engines."""
