"""Draws what one rank did around one save, from the telemetry of a run.

Run: ``python tests/benchmarks/plot_timeline.py RUN_FOLDER STEP docs/timeline.png``. The same, with
all saves of the run next to it, is drawn by ``planaria trace RUN_FOLDER --png FILE``.
"""

import argparse
from pathlib import Path

from planaria import telemetry
from planaria.launch.timeline import draw_save


def main() -> None:
    parser = argparse.ArgumentParser(description="Draws one save")
    parser.add_argument("run", type=Path)
    parser.add_argument("step", type=int)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    draw_save(list(telemetry.read(args.run / "telemetry")), args.step, args.out)


if __name__ == "__main__":
    main()
