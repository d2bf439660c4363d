"""What ``fxmask evaluate`` does: run files, plans of configurations, images, tables."""
