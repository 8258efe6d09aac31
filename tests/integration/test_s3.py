"""Checkpoints on S3, against moto's server: straight to a bucket, and as a mirror."""

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
import torch
from checkpoints import WAIT_S, contents, load_once
from fault_job import Job, differences, live, make_checkpointer, reference
from mirrors import check_restores, check_whole, steps_of, train
from ranks import RankDied, try_ranks
from s3_server import file_system, s3_bucket, unfinished_uploads
from slow_link import SlowLink

from planaria.checkpoint import Checkpointer, open_checkpoint, points
from planaria.checkpoint.format.manifest import Manifest
from planaria.checkpoint.storage import remote
from planaria.checkpoint.storage.base import open_storage
from planaria.checkpoint.storage.remote import RemoteStorage
from planaria.checkpoint.storage.root import Root
from planaria.checkpoint.storage.streaming import RemoteWriter
from planaria.core.points import armed
from planaria.errors import RootError, RootLockedError, StorageError


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with s3_bucket(tmp_path_factory.mktemp("s3")) as url:
        yield url


@pytest.fixture
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "BLOCK_NBYTES", 5 << 20)  # the least that S3 takes
    monkeypatch.setattr(remote, "READ_NBYTES", 1 << 20)


def large(seed: int) -> dict[str, torch.Tensor]:
    """Enough for three parts."""
    generator = torch.Generator().manual_seed(seed)
    return {"weights": torch.randn(3_000_000, generator=generator), "small": torch.ones(3)}


@pytest.mark.usefixtures("_small_parts")
def test_straight_to_a_bucket(bucket: str) -> None:
    url, state = f"{bucket}/straight", large(1)
    with Checkpointer(url, {"t": state}, keep=2) as ckpt:
        for step in (1, 2, 3):
            ckpt.save(step).wait_committed()
    assert check_whole(url) == [2, 3]
    target = large(2)
    report = load_once(url, {"t": target})
    assert (report.step, report.tier) == (3, "durable")
    assert contents(target) == contents(state)
    assert unfinished_uploads("bucket") == []
    assert torch.equal(open_checkpoint(url, 2).read("t.weights"), state["weights"])


@pytest.mark.usefixtures("_small_parts")
def test_an_upload_that_fails_leaves_no_parts(bucket: str) -> None:
    storage = open_storage(f"{bucket}/parts")
    writer = storage.create("file")
    assert isinstance(writer, RemoteWriter)
    for _ in range(5):
        writer.write(bytes(4 << 20))
        assert len(writer._file.buffer.getbuffer()) < 9 << 20  # one block and what was written last
    assert unfinished_uploads("bucket") == ["parts/file"]
    writer.abort()
    assert unfinished_uploads("bucket") == []
    assert storage.list() == []


def test_of_two_writers_one_wins(bucket: str) -> None:
    roots = [Root(open_storage(f"{bucket}/race")) for _ in range(2)]
    for root in roots:
        root.claim()
    both, outcomes = threading.Barrier(2, timeout=60), dict[str, Exception | None]()

    def commit(root: Root, attempt: str) -> None:
        try:
            root.commit(Manifest(1, attempt, 0.0, 1, [], {}))
            outcomes[attempt] = None
        except Exception as error:
            outcomes[attempt] = error

    with armed(callbacks={points.MANIFEST_WRITTEN: lambda name, step: both.wait()}):
        threads = [
            threading.Thread(target=commit, args=each)
            for each in zip(roots, ("aa", "bb"), strict=True)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    winner = roots[0].manifest(1).attempt
    assert outcomes.pop(winner) is None
    ((_, error),) = outcomes.items()
    assert isinstance(error, RootLockedError)
    assert "another job has committed step 1" in str(error)


def test_a_bucket_that_is_not_there_is_not_made(bucket: str) -> None:
    with pytest.raises(RootError, match="bucket does not exist"):
        Checkpointer("s3://nosuchbucket/run", large(1))
    names = [each["Name"] for each in file_system().call_s3("list_buckets")["Buckets"]]
    assert names == ["bucket"]


def test_a_mirror(bucket: str, tmp_path: Path) -> None:
    url = f"{bucket}/mirror"
    with make_checkpointer(tmp_path / "root", job := Job(), keep=2, mirror=url) as ckpt:
        train(ckpt, job, 3)
    assert check_whole(url) == [2, 3]
    check_restores(tmp_path, url, 3)
    with make_checkpointer(tmp_path / "new", job := Job(), keep=2, mirror=url) as ckpt:
        report = ckpt.restore()
        assert report is not None
        assert (report.step, report.tier) == (3, "mirror")
        train(ckpt, job, 4)
    assert check_whole(url) == [3, 4]
    with make_checkpointer(tmp_path / "root", job := Job(), mirror=url) as ckpt:
        report = ckpt.restore()  # the newest, wherever it is
        assert report is not None
        assert (report.step, report.tier) == (4, "mirror")
        assert not differences(job.snapshot(), reference(4))


def test_a_mirror_whose_bucket_is_gone(bucket: str, tmp_path: Path) -> None:
    url = "s3://nosuchbucket/run"
    with make_checkpointer(tmp_path / "root", job := Job(), mirror=url, on_failure="fatal") as ckpt:
        job.advance()
        handle = ckpt.save(1)
        with pytest.raises(StorageError, match="bucket does not exist"):
            handle.wait_mirrored()
        with pytest.raises(StorageError, match="bucket does not exist"):
            ckpt.step(1)
    assert steps_of(str(tmp_path / "root")) == [1]


@pytest.mark.usefixtures("_small_parts")
def test_training_goes_on_while_a_part_is_on_its_way(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The link stops in the middle of a part: nothing here waits for it, and nothing is lost."""
    url, state = f"{bucket}/slow", {"weights": torch.randn(1_400_000)}
    link = SlowLink(int(os.environ["AWS_ENDPOINT_URL"].rpartition(":")[2]))
    with monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{link.port}")
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        with Checkpointer(tmp_path / "root", {"t": state}, keep=2, mirror=url) as ckpt:
            with link.held_after(1 << 20):
                held = ckpt.save(1)
                assert link.reached.wait(WAIT_S)
                for step in (2, 3):
                    ckpt.before_update()
                    state["weights"] += 1
                    ckpt.save(step).wait_committed()
                assert held.committed
                assert not held.mirrored
                # Some parts may be there, and show in no listing.
                assert steps_of(url) == []
            held.wait_mirrored()  # it was on its way already
        assert check_whole(url) == [2, 3]
    link.close()
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    target = {"weights": torch.zeros(1_400_000)}
    with Checkpointer(tmp_path / "elsewhere", {"t": target}, mirror=url) as ckpt:
        report = ckpt.restore()
    assert report is not None
    assert (report.step, report.tier) == (3, "mirror")
    assert contents(target) == contents(state)


@pytest.mark.usefixtures("_small_parts")
def test_parts_of_a_killed_upload_are_cleared_up(bucket: str, tmp_path: Path) -> None:
    url = f"{bucket}/killed"
    storage = open_storage(url)
    assert isinstance(storage, RemoteStorage)
    writer = storage.create("step-00000001/rank-00000-aa.safetensors")
    for _ in range(3):
        writer.write(bytes(4 << 20))
    assert unfinished_uploads("bucket") == ["killed/step-00000001/rank-00000-aa.safetensors"]
    (result,) = try_ranks(
        1, dies_before_the_manifest, str(tmp_path / "root"), url, str(tmp_path), init_group=False
    )
    assert isinstance(result.error, RankDied), result
    assert result.exitcode == -signal.SIGKILL
    assert steps_of(url) == []
    assert unfinished_uploads("bucket") == []
    with make_checkpointer(tmp_path / "root", Job(), mirror=url) as ckpt:
        assert ckpt.restore() is not None
    assert check_whole(url) == [1]
    writer.abort()


def dies_before_the_manifest(rank: int, folder: str, url: str, notes: str) -> object:
    fault = f"kill@{points.MIRROR_MANIFEST}:step=1"
    return live(rank, folder, notes, 1, fault, None, True, {"mirror": url})
