"""Hydra's configuration groups of `planaria run`; the types are in `planaria.launch.config`."""
