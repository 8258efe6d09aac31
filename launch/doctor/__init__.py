"""``planaria doctor``: is this machine, and this folder, fit to train in?

Every check has a deadline: what hangs (a network file system, a device) is told as such, and the
others go on.
"""

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

OK, NOTE, WRONG = "ok", "note", "wrong"


@dataclass
class Finding:
    """What one check found.

    Attributes:
        check: Name of the check.
        state: "ok", "note" (worth knowing, nothing to do) or "wrong".
        text: What there is, and where it is wrong, what to do.
        facts: The same as numbers.
    """

    check: str
    state: str
    text: str
    facts: dict[str, Any] = field(default_factory=dict)


Check = Callable[[], Iterable[Finding]]


def examine(name: str, check: Check, deadline_s: float) -> list[Finding]:
    """Carries out one check, and gives up on it when it hangs.

    Args:
        name: Its name, for a finding that is not its own.
        check: Returns findings; an `OSError` is one, too.
        deadline_s: After how many seconds it is left behind, in a thread that holds up nothing.
    """
    found: list[Finding] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            found.extend(check())
        except BaseException as error:  # raised again below, in the caller's thread
            errors.append(error)

    thread = threading.Thread(target=run, name=f"doctor-{name}", daemon=True)
    thread.start()
    thread.join(deadline_s)
    if thread.is_alive():
        return [Finding(name, WRONG, f"no answer within {deadline_s:g} s: it hangs")]
    if errors and isinstance(errors[0], OSError):
        return [*found, Finding(name, WRONG, str(errors[0]))]
    if errors:
        raise errors[0]
    return found
