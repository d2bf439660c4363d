"""Passes: graph -> graph, or graph -> facts. Installed as ``fxmask.passes``."""

if __name__ != "fxmask.passes":  # `import passes` from a checkout's root would make a second copy of every module
    raise ImportError(f"import fxmask.passes, not {__name__}")
