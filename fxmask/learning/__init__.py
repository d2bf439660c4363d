"""From recorded runs to a mask."""
