"""Chooses what computes."""

from __future__ import annotations

from functools import cache

from planaria.checkpoint.erasure.backend import Backend
from planaria.checkpoint.erasure.codec import Codec
from planaria.checkpoint.erasure.threads import Threads, checked_threads
from planaria.errors import ConfigError, NotSupportedError

#: In the order in which "auto" tries them; "torch" is only taken where it is asked for.
BACKENDS = ("isal", "numba", "torch")


def make_codec(k: int, m: int, backend: str = "auto", *, threads: Threads = "auto") -> Codec:
    """A code of k data rows and m parity rows.

    Args:
        k: Data rows, >= 1.
        m: Parity rows, >= 1; k + m <= 255.
        backend: "isal" (ISA-L's assembly), "numba" (compiled here, needs nothing more), "torch"
            (takes tensors, also on a GPU), or "auto": ISA-L if it is found, else numba.
        threads: Threads for long rows, for "isal" and "numba": a number, or "auto" for as many as
            there are cores that were idle in the last minute.

    Returns:
        The codec; made quickly, keep it or make it anew as you like.

    Raises:
        ConfigError: k, m, the backend's name or the number of threads is wrong.
        NotSupportedError: The backend asked for is not there.
    """
    checked_threads(threads)
    if backend == "auto":
        backend = _best()
    if backend not in BACKENDS:
        raise ConfigError(f"no erasure backend {backend!r}; there are 'auto' and {BACKENDS}")
    return Codec(k, m, _make(backend, threads))


def available_backends() -> list[str]:
    """Which backends work here, the one that "auto" takes first."""
    found = []
    for name in BACKENDS:
        try:
            _make(name, "auto")
        except NotSupportedError:
            continue
        found.append(name)
    return found


@cache
def _best() -> str:
    try:
        _make("isal", "auto")
    except NotSupportedError:
        return "numba"
    return "isal"


@cache
def _make(name: str, threads: Threads) -> Backend:
    if name == "isal":
        return _make_isal(threads)
    if name == "numba":
        from planaria.checkpoint.erasure.compiled import Compiled

        return Compiled(threads)
    from planaria.checkpoint.erasure.tensors import Tensors

    return Tensors()


def _make_isal(threads: Threads) -> Backend:
    from planaria.checkpoint.erasure import libisal
    from planaria.checkpoint.erasure.isal import Isal

    wrong: list[str] = []
    for library in libisal.libraries():
        try:
            return Isal(library, threads)
        except NotSupportedError as error:
            wrong.append(str(error))
    raise NotSupportedError(
        "ISA-L is not here: install the system's libisal2, or `pip install 'planaria[erasure]'`"
        + "".join(f"; {text}" for text in wrong)
    )
