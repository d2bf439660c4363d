"""The commands of ``fxmask``, one file each."""
