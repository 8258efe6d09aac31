"""Planning and running MoE, pipeline and offload schedules: not built yet."""

if not __name__.startswith("planaria."):
    raise ImportError(f"import this package as 'planaria.{__name__}', not as {__name__!r}")
