"""How the changes of a block become bytes, and back."""
