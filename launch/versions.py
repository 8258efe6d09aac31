"""The versions of what a run is made of; equal versions are what makes it repeatable."""

import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import planaria
from planaria.launch.config import RunConf
from planaria.launch.demo.text import read_text


def gather(conf: RunConf) -> dict[str, Any]:
    """Versions by name, and the fingerprint of the default job's data.

    Raises:
        ConfigError: The data that the configuration names cannot be read.
    """
    return {
        "planaria": planaria.__version__,
        "python": platform.python_version(),
        "torch": metadata.version("torch"),
        "numpy": metadata.version("numpy"),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu(),
        "threads": conf.threads,
        "data": None if conf.script is not None else _data(conf),
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def _data(conf: RunConf) -> str:
    return read_text(conf.data.paths, conf.data.max_bytes).fingerprint
