"""The token that the processes of one job share: a secret text, from the environment or a file."""

from __future__ import annotations

import os
import secrets
import stat
import tempfile
from pathlib import Path

from planaria.errors import ConfigError

TOKEN_ENV = "PLANARIA_TOKEN"
TOKEN_MIN_CHARACTERS = 16


def load_token(run_dir: str | os.PathLike[str] | None = None) -> bytes | None:
    """Finds the job's token: ``PLANARIA_TOKEN``, else the file ``token`` in the run folder.

    Args:
        run_dir: The run's folder, if there is one.

    Returns:
        The token, or None when there is neither.

    Raises:
        ConfigError: The token is too short, or its file can be read by others or not at all.
    """
    if TOKEN_ENV in os.environ:
        return _checked_token(os.environ[TOKEN_ENV], f"environment variable {TOKEN_ENV}")
    if run_dir is None:
        return None
    return _load_file(Path(run_dir) / "token")


def make_token(path: str | os.PathLike[str]) -> bytes:
    """Makes the token file of a run, or returns the token of the one that is there.

    The file appears whole and with mode 0600, also when several processes race to make it.

    Args:
        path: Where the file goes: ``<run>/token``; its folder exists.

    Returns:
        The token, as :func:`load_token` returns it.

    Raises:
        ConfigError: The file cannot be made, or the one that is there is not usable.
    """
    path = Path(path)
    token = secrets.token_hex(32)
    try:
        fd, temporary = tempfile.mkstemp(prefix=".token-", dir=path.parent)  # mode 0600
        try:
            with os.fdopen(fd, "w") as file:
                file.write(token + "\n")
                file.flush()
                os.fsync(fd)
            # Unlike a rename, a link never replaces a token that others have read already.
            os.link(temporary, path)
        finally:
            os.unlink(temporary)
    except FileExistsError:
        found = _load_file(path)
        if found is None:
            raise ConfigError(f"the token file {path} vanished while it was read") from None
        return found
    except OSError as error:
        raise ConfigError(
            f"cannot make the token file {path}: {error.strerror}; "
            f"set {TOKEN_ENV} to a random text instead"
        ) from error
    return token.encode()


def _load_file(path: Path) -> bytes | None:
    try:
        # Non-blocking: a pipe in the file's place must not hang the caller.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"cannot read the token file {path}: {error.strerror}") from error
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise ConfigError(f"the token file {path} is not a regular file")
        if stat.S_IMODE(status.st_mode) & 0o077:
            raise ConfigError(
                f"the token file {path} is open to other users (mode "
                f"{stat.S_IMODE(status.st_mode):04o}): whoever could read it can steer the job. "
                "Delete it for a new token, or chmod 600 it if nobody else was on the machine"
            )
        content = os.read(fd, 4096)
    finally:
        os.close(fd)
    try:
        return _checked_token(content.decode("ascii"), f"token file {path}")
    except UnicodeDecodeError:
        raise ConfigError(f"the token file {path} does not hold a token") from None


def _checked_token(text: str, where: str) -> bytes:
    token = text.strip()
    if len(token) < TOKEN_MIN_CHARACTERS:
        raise ConfigError(
            f"the token in {where} has {len(token)} characters, at least {TOKEN_MIN_CHARACTERS} "
            "are needed: try `openssl rand -hex 32`"
        )
    return token.encode(errors="surrogateescape")
