"""The default job: a small transformer, its text, and its training loop."""
