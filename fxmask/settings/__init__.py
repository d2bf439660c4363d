"""Plans for the settings that a pipeline is used at, made of the user's own images."""
