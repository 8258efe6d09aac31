"""Work that must not be left half done when the process is interrupted."""

from collections.abc import Callable
from concurrent.futures import Future, wait
from threading import Thread


def uninterrupted(work: Callable[[], None], stop: Callable[[], object] | None = None) -> None:
    """Does work in a thread of its own, and returns or raises only when that has ended.

    An interrupt (Ctrl-C, or any signal whose handler raises) comes between any two instructions of
    the main thread, and of no other: the work is not disturbed, the interrupt is raised after it.

    Args:
        work: What it raises is raised here.
        stop: Called if an interrupt comes before the work has ended: may have it end early. None
            if it must be done in any case.
    """
    ended: Future[None] = Future()

    def run() -> None:
        if not ended.set_running_or_notify_cancel():
            return
        try:
            work()
        except BaseException as error:  # raised where it is waited for
            ended.set_exception(error)
        else:
            ended.set_result(None)

    thread = Thread(target=run, name="planaria-uninterrupted")
    try:
        try:
            thread.start()
        except RuntimeError:  # there are no more threads
            run()
        ended.result()
    finally:
        if not ended.cancel():
            if stop is not None and not ended.done():
                stop()
            _outlast(ended)
            if thread.is_alive():
                thread.join()
        elif stop is None:  # interrupted before it began
            work()


def _outlast(ended: Future[None]) -> None:
    # The thread is not joined: before Python 3.13 it counts as ended when that is interrupted.
    try:
        wait([ended])
    except BaseException:  # one interrupt more
        _outlast(ended)
        raise
