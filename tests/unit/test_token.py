import os
import stat
import threading
from pathlib import Path

import pytest

from planaria.core.token import TOKEN_ENV, load_token, make_token
from planaria.errors import ConfigError


@pytest.fixture(autouse=True)
def _no_token(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(TOKEN_ENV, raising=False)


def test_made_private_and_found_again(tmp_path: Path):
    old = os.umask(0)
    try:
        token = make_token(tmp_path / "token")
    finally:
        os.umask(old)
    assert len(token) == 64
    assert stat.S_IMODE((tmp_path / "token").stat().st_mode) == 0o600
    assert load_token(tmp_path) == token
    assert make_token(tmp_path / "token") == token  # a run that is resumed keeps its token
    assert [path.name for path in tmp_path.iterdir()] == ["token"]


def test_racing_makers_agree(tmp_path: Path):
    made: list[bytes] = []
    start = threading.Barrier(8)

    def work() -> None:
        start.wait(30)
        made.append(make_token(tmp_path / "token"))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 8
    assert set(made) == {load_token(tmp_path)}


def test_the_environment_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    make_token(tmp_path / "token")
    monkeypatch.setenv(TOKEN_ENV, "a token of the user's own")
    assert load_token(tmp_path) == load_token() == b"a token of the user's own"


def test_none_is_none(tmp_path: Path):
    assert load_token() is None
    assert load_token(tmp_path) is None


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o602, 0o610])
def test_a_file_open_to_others_is_refused(mode: int, tmp_path: Path):
    make_token(tmp_path / "token")
    (tmp_path / "token").chmod(mode)
    with pytest.raises(ConfigError, match=f"open to other users .mode {mode:04o}"):
        load_token(tmp_path)
    with pytest.raises(ConfigError, match="open to other users"):
        make_token(tmp_path / "token")


@pytest.mark.parametrize("text", ["", "short", "  \n"])
def test_a_guessable_token_is_refused(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "token").write_text(text)
    (tmp_path / "token").chmod(0o600)
    with pytest.raises(ConfigError, match=r"token file .* at least 16"):
        load_token(tmp_path)
    monkeypatch.setenv(TOKEN_ENV, text)
    with pytest.raises(ConfigError, match=f"environment variable {TOKEN_ENV}"):
        load_token(tmp_path)


def test_what_is_no_token_file_is_refused(tmp_path: Path):
    (tmp_path / "a" / "token").mkdir(parents=True)
    with pytest.raises(ConfigError, match="not a regular file"):
        load_token(tmp_path / "a")
    (tmp_path / "b").mkdir()
    os.mkfifo(tmp_path / "b" / "token", 0o600)
    with pytest.raises(ConfigError, match="not a regular file"):
        load_token(tmp_path / "b")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "token").write_bytes(b"\xff" * 64)
    (tmp_path / "c" / "token").chmod(0o600)
    with pytest.raises(ConfigError, match="does not hold a token"):
        load_token(tmp_path / "c")
    with pytest.raises(ConfigError, match="cannot make the token file"):
        make_token(tmp_path / "missing" / "token")
