"""From an nn.Module to a checked Program."""
