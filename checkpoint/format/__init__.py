"""The durable format: dtypes, checksums, safetensors files, the manifest."""
