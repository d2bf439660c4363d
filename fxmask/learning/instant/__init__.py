"""Plans from recorded values alone: no further call of the denoiser."""
