"""The default job's dataset."""

import hashlib
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch

from planaria.data import GlobalBatch
from planaria.errors import ConfigError, MismatchError
from planaria.launch.demo.text import Text, TextWindows, read_text


def text_of(content: bytes) -> Text:
    return Text(content, "a test")


def test_windows_follow_each_other_and_targets_are_the_next_bytes() -> None:
    content = bytes(range(100))
    data = TextWindows(text_of(content), seq_len=10, held_out=0.0)
    assert len(data) == 9  # the tenth would lack its last target
    for i in range(len(data)):
        tokens, targets = data[i]
        assert tokens.dtype == targets.dtype == torch.int64
        assert tokens.tolist() == list(content[10 * i : 10 * i + 10])
        assert targets.tolist() == list(content[10 * i + 1 : 10 * i + 11])
    for outside in (-1, 9):
        with pytest.raises(IndexError):
            data[outside]


def test_the_end_is_held_out() -> None:
    content = bytes(range(200))
    train, held_out = (
        TextWindows(text_of(content), 5, split, held_out=0.25) for split in ("train", "held_out")
    )
    seen = {
        split: {byte for i in range(len(data)) for part in data[i] for byte in part.tolist()}
        for split, data in (("train", train), ("held_out", held_out))
    }
    assert max(seen["train"]) < 150 <= min(seen["held_out"])
    assert len(train) == 29
    assert len(held_out) == 9
    assert train.fingerprint == held_out.fingerprint


def test_the_library_is_read_without_tests_and_packages() -> None:
    text = read_text(limit=3_000_000)
    assert len(text.content) == 3_000_000
    assert text.fingerprint == read_text(limit=3_000_000).fingerprint
    assert text.fingerprint == f"sha256:{hashlib.sha256(text.content).hexdigest()}"
    first = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[0].read_bytes()
    assert text.content.startswith(first)
    assert len(TextWindows(text)) > 20_000


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sysconfig, "get_path", {"stdlib": str(tmp_path / "lib")}.__getitem__)
    for name in (
        "b.py", "a.py", "c.txt", "_sysconfigdata__linux.py", "sitecustomize.py", "json/x.py",
        "test/t.py", "json/tests/t.py", "site-packages/p.py", "dist-packages/p.py",
        "config-3.11/makesetup.py", "__pycache__/a.py",
    ):  # fmt: skip
        file = tmp_path / "lib" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"<{name}>")
    (tmp_path / "lib" / "link.py").symlink_to("a.py")
    return tmp_path / "lib"


def test_what_counts_as_the_library(library: Path) -> None:
    assert read_text().content == b"<a.py><b.py><json/x.py>"
    assert read_text(limit=9).content == b"<a.py><b."


def test_a_library_without_sources_is_refused(library: Path) -> None:
    for file in library.rglob("*.py"):
        file.unlink()
    with pytest.raises(ConfigError, match=r"no Python sources in .*set data\.paths"):
        read_text()
    with pytest.raises(ConfigError, match="no Python sources"):
        TextWindows()


def test_own_text(tmp_path: Path) -> None:
    for name, content in {
        "b.txt": b"bb", "a/z.md": b"zz", "a/.hidden": b"no", "binary": b"\0no", "c": b"cc",
    }.items():  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    assert read_text(tmp_path).content == b"zzbbcc"
    assert read_text(str(tmp_path / "c")).content == b"cc"
    assert read_text([tmp_path / "c", tmp_path / "a"], limit=3).content == b"ccz"


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ("missing", "does not exist"),
        ("empty", "no text in"),
        ("zeros", "no text in"),
        ([], "empty"),
    ],
)
def test_no_text_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, paths: Any, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("zeros").write_bytes(bytes(10))
    with pytest.raises(ConfigError, match=message):
        read_text(paths)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_len": 100}, r"95 bytes: one window takes data\.seq_len \+ 1 = 101"),
        ({"split": "held_out", "seq_len": 5}, "held_out split of a test has 5 bytes"),
        ({"split": "test"}, "'train' or 'held_out'"),
        ({"seq_len": 0}, "seq_len is 0"),
        ({"held_out": 1.0}, "share"),
    ],
)
def test_bad_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TextWindows(text_of(bytes(100)), **options)
    with pytest.raises(ConfigError, match="max_bytes is 0"):
        read_text(limit=0)


def test_a_position_in_other_text_is_refused() -> None:
    def data(content: bytes) -> GlobalBatch:
        return GlobalBatch(TextWindows(text_of(content), 4), 8, 2)

    here, there = data(b"x" * 200), data(b"y" * 200)
    data(b"x" * 200).load_state_dict(here.state_dict())
    with pytest.raises(MismatchError, match="dataset was 'sha256:"):
        there.load_state_dict(here.state_dict())
    tokens, targets = here.load(0, 1)
    assert tokens.shape == targets.shape == (2, 4)


def test_the_fingerprint_needs_no_torch() -> None:
    code = (
        "import sys\n"
        "from planaria.launch.demo.text import TextWindows, read_text\n"
        "assert TextWindows(read_text(limit=9999)).fingerprint\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=240)
