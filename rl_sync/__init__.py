"""Sparse, exact weight sync from trainers to rollout workers: not built yet."""

if not __name__.startswith("planaria."):
    raise ImportError(f"import this package as 'planaria.{__name__}', not as {__name__!r}")
