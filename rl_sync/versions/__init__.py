"""What a version is: its manifest, its place in the chain, and how a model gets to it."""
