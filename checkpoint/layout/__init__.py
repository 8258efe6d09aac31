"""Who writes and who reads which box."""
