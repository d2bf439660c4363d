"""Plans and packages on disk."""
