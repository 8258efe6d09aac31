"""What every part of Planaria stands on; it imports none of them, and torch only where used."""
