"""Training state as named tensors and small objects."""
