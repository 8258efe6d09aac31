"""What is done at the end of the process for whoever was not closed."""

import atexit
import weakref
from collections.abc import Callable


def call_at_exit(method: Callable[[], object]) -> Callable[[], None]:
    """Calls a bound method when the process ends, if its object is alive then.

    Returns:
        What to unregister from `atexit` once it is not needed any more.
    """
    ref = weakref.WeakMethod(method)

    def call() -> None:
        alive = ref()
        if alive is not None:
            alive()

    atexit.register(call)
    return call
