"""Where checkpoints lie: local folders and fsspec URLs, the root and its lock."""
