"""Recorded sampling runs, and their replay with other denoisers."""
