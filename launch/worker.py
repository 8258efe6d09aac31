"""What every rank's process runs first: ``python -m planaria.launch.worker TARGET ARGS...``.

It ties the process to its launcher, gathers its output in one file, runs the default job or a
script of the user's, and turns what goes wrong into a recorded traceback and an exit code.
"""

import os
import runpy
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from planaria.elastic.agent.environment import die_with_launcher
from planaria.errors import PlanariaError
from planaria.launch.exit_codes import DONE, exit_code_of

RUN_DIR = "PLANARIA_RUN_DIR"

DEFAULT_JOB = "planaria.launch.demo.train"


def _gather_output() -> None:
    """Sends errors where output goes, in order; nothing can be read from the terminal."""
    os.dup2(1, 2)
    devnull = os.open(os.devnull, os.O_RDONLY)
    os.dup2(devnull, 0)
    os.close(devnull)


def _run(target: str, args: Sequence[str]) -> int:
    if target == DEFAULT_JOB:
        from planaria.launch.demo import train

        return train.main(os.environ[RUN_DIR])
    sys.argv = [target, *args]
    sys.path.insert(0, str(Path(target).resolve().parent))
    runpy.run_path(target, run_name="__main__")
    return DONE


def main(argv: Sequence[str]) -> int:
    """Runs the target; returns the exit code of the process."""
    die_with_launcher()
    _gather_output()
    from torch.distributed.elastic.multiprocessing.errors import record

    try:
        return record(_run)(argv[0], argv[1:]) or DONE
    except PlanariaError as error:
        traceback.print_exc()
        return exit_code_of(error)


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.exit(code)
