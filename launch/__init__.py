"""Starting, resuming and looking at runs: the command line and the default job."""

if not __name__.startswith("planaria."):
    raise ImportError(f"import this package as 'planaria.{__name__}', not as {__name__!r}")
