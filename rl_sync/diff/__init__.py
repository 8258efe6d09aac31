"""Which elements changed, and a digest of all of them that follows the changes."""
