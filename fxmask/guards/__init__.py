"""What a captured graph froze besides tensors, and whether it is still so."""
