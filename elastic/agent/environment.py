"""What an agent tells the processes that it starts, beside torch's own environment variables."""

import ctypes
import os
import signal
import sys

#: Process id of the agent's process: a rank whose parent is another one ends itself.
LAUNCHER_PID = "PLANARIA_LAUNCHER_PID"
#: How often the ranks were started before.
ATTEMPT = "PLANARIA_ATTEMPT"

_PR_SET_PDEATHSIG = 1


def die_with_launcher() -> None:
    """Has the kernel kill this process when its launcher dies, however that dies."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    # The launcher may have died before the request was made.
    launcher = os.environ.get(LAUNCHER_PID)
    if launcher is not None and os.getppid() != int(launcher):
        os._exit(128 + signal.SIGKILL)
