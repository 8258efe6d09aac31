"""What a data worker process does before it reads."""

import os
import select
import signal
import threading
from collections.abc import Callable

from planaria.errors import NotSupportedError

_PARENT_CHECK_S = 1.0


def enter_worker(trainer: int, _worker: int) -> None:
    """Prepares a DataLoader's worker process: a `worker_init_fn`, once the first argument is given.

    Ctrl-C and a scheduler's SIGTERM reach the whole process group, and the trainer answers them
    with a last checkpoint at the end of its step: until then its workers must not die. They end
    when the trainer says so, or is gone.

    Args:
        trainer: Pid of the process that made the DataLoader, told by itself: it may be gone before
            this process comes here, and a server that starts processes may be their parent.
    """
    _hide_number()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Blocked here, and so in every thread started later: the guard alone receives it.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_guard, args=(trainer,), name="data-guard", daemon=True).start()


def _guard(trainer: int) -> None:
    has_ended = _watch(trainer)
    while not has_ended():
        notice = signal.sigtimedwait({signal.SIGTERM}, _PARENT_CHECK_S)
        if notice is not None and notice.si_pid == trainer:
            break
    # The main thread may hang in the dataset.
    os._exit(0)


def _watch(trainer: int) -> Callable[[], bool]:
    """Tells whether the trainer has ended, whether or not somebody has waited for it."""
    parent = os.getppid()
    try:
        poll = select.poll()
        poll.register(os.pidfd_open(trainer), select.POLLIN)
        return lambda: bool(poll.poll(0))
    except ProcessLookupError:
        return lambda: True
    except OSError:  # an old kernel, or one that forbids it
        return lambda: os.getppid() != parent


def _hide_number() -> None:
    """Keeps a dataset from sharding itself over the workers: the logical workers already do."""
    from torch.utils.data import _utils, get_worker_info

    _utils.worker._worker_info = None
    if get_worker_info() is not None:
        raise NotSupportedError(
            "this version of torch does not let a data worker hide its number, which a dataset "
            "may shard itself by; use num_workers=0"
        )
