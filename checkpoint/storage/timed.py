"""A deadline for calls that have none of their own."""

import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

from planaria.errors import DeadlineError

T = TypeVar("T")


def within(seconds: float, what: str, call: Callable[[], T]) -> T:
    """Calls it in a thread of its own and waits for the answer, but no longer than told.

    A call that hangs is left behind: there is no way to end it, but nobody waits for it either,
    and its thread does not keep the process from ending.

    Args:
        seconds: How long to wait.
        what: What the call does, for the error.
        call: The call; what it raises is raised here.

    Raises:
        DeadlineError: There was no answer in time.
    """
    values: list[T] = []
    errors: list[BaseException] = []
    ended = threading.Event()

    def run() -> None:
        try:
            values.append(call())
        except BaseException as error:  # raised again where it is waited for
            errors.append(error)
        finally:
            ended.set()

    threading.Thread(target=run, name="planaria-remote-call", daemon=True).start()
    if not ended.wait(seconds):
        raise DeadlineError(f"{what}: no answer within {seconds:g} s")
    if errors:
        raise errors[0]
    return values[0]


def together(calls: Sequence[Callable[[], T]], at_a_time: int) -> list[T]:
    """What several calls return; the first error is raised. Each has a deadline of its own.

    In plain threads: a pool of them takes nothing any more when the process ends, and a mirror may
    be brought up to date then.

    Args:
        calls: The calls.
        at_a_time: How many are under way at a time.
    """
    results: dict[int, T] = {}
    errors: list[BaseException] = []
    left = iter(range(len(calls)))
    lock = threading.Lock()

    def run() -> None:
        while not errors:
            with lock:
                number = next(left, None)
            if number is None:
                return
            try:
                results[number] = calls[number]()
            except BaseException as error:  # raised again where it is waited for
                errors.append(error)

    threads = [
        threading.Thread(target=run, name="planaria-remote-calls", daemon=True)
        for _ in range(min(at_a_time, len(calls)))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return [results[number] for number in range(len(calls))]
