"""Which backend is taken, where ISA-L is looked for, and tensors."""

import ctypes
import importlib.metadata
from pathlib import Path

import numpy as np
import pytest
import torch

from planaria.checkpoint.erasure import available_backends, libisal, make_codec, registry
from planaria.errors import ConfigError, NotSupportedError


@pytest.fixture
def no_isal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libisal, "libraries", lambda: iter(()))
    monkeypatch.setattr(registry, "_best", registry._best.__wrapped__)
    monkeypatch.setattr(registry, "_make", registry._make.__wrapped__)


def test_numba_takes_the_place_of_isal(no_isal: None) -> None:
    assert make_codec(2, 1).backend == "numba"
    assert available_backends() == ["numba", "torch"]
    with pytest.raises(NotSupportedError, match=r"planaria\[erasure\]"):
        make_codec(2, 1, "isal")


def test_another_library_of_that_name_is_passed_over(
    no_isal: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(libisal, "libraries", lambda: iter([ctypes.CDLL(None)]))
    assert make_codec(2, 1).backend == "numba"
    with pytest.raises(NotSupportedError, match="no ISA-L with erasure codes"):
        make_codec(2, 1, "isal")


def test_isal_comes_with_pyeclib() -> None:
    try:
        importlib.metadata.version("pyeclib")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("pyeclib is not installed")
    assert make_codec(2, 1).backend == "isal"
    assert available_backends()[0] == "isal"
    assert all(path.is_absolute() for path in libisal.bundled())
    assert any("pyeclib" in path.name for path in libisal.bundled())


def test_nothing_is_loaded_from_the_current_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither is a package there looked at, though Python itself would import it."""
    planted = tmp_path / "pyeclib.libs" / "libisal-planted.so.2"
    planted.parent.mkdir()
    planted.write_bytes(b"")
    (tmp_path / "libisal.so.2").write_bytes(b"")
    info = tmp_path / "pyeclib-99.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: pyeclib\nVersion: 99\n")
    (info / "RECORD").write_text("pyeclib.libs/libisal-planted.so.2,,\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert importlib.metadata.version("pyeclib") == "99", "Python would"
    assert planted not in list(libisal.bundled())
    assert all(tmp_path not in path.parents for path in libisal.bundled())
    assert all(Path(library._name).is_absolute() or "/" not in library._name
               for library in libisal.libraries())  # fmt: skip
    # And the finder finds what lies in a package folder.
    monkeypatch.setattr(libisal, "package_folders", lambda: [tmp_path])
    assert list(libisal.bundled()) == [planted]
    assert list(libisal.libraries()) == [], "what cannot be loaded is passed over"


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no GPU"))]  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("k", "m"), [(4, 1), (4, 2), (5, 3)])
def test_tensors(device: str, k: int, m: int) -> None:
    codec = make_codec(k, m, "torch")
    rows = np.random.default_rng(0).integers(0, 256, (k, 300_001), dtype=np.uint8)
    data = torch.from_numpy(rows).to(device)
    parity = codec.encode(data)
    assert isinstance(parity, torch.Tensor)
    assert parity.device == data.device
    assert np.array_equal(parity.cpu().numpy(), make_codec(k, m, "numba").encode(rows))
    parts = {i: row for i, row in enumerate([*data, *parity]) if i >= m}
    assert torch.equal(codec.decode(parts), data)
    out = torch.empty_like(parity)
    assert codec.encode(list(data), out=out) is out
    assert torch.equal(out, parity)
    codec.update(out, 1, data[1], data[0])
    data[1] = data[0]
    assert torch.equal(out, codec.encode(data))


def test_tensors_that_do_not_fit() -> None:
    codec = make_codec(2, 1, "torch")
    for wrong in (torch.zeros(2, 3), torch.zeros(2, 6, dtype=torch.uint8)[:, ::2]):
        with pytest.raises(ConfigError):
            codec.encode(wrong)
    with pytest.raises(ConfigError, match="several devices"):
        codec.encode([np.zeros(3, np.uint8), torch.zeros(3, dtype=torch.uint8, device="meta")])
