"""An S3 server on the loopback interface, in a process of its own: moto's.

It must be another process: s3fs talks to it from an event loop, and ranks from other processes.
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
import pytest

START_S = 240.0
_SERVE = """
import logging, sys
from werkzeug.serving import make_server
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
logging.getLogger("werkzeug").setLevel(logging.ERROR)
app = DomainDispatcherApplication(create_backend_app)
server = make_server("127.0.0.1", 0, app, threaded=True)
with open(sys.argv[1] + ".new", "w") as file:
    file.write(str(server.server_port))
import os
os.rename(sys.argv[1] + ".new", sys.argv[1])
server.serve_forever()
"""


@contextmanager
def s3_server(folder: Path) -> Iterator[str]:
    """Starts a server and ends it after the block; yields its URL."""
    port = folder / "port"
    process = subprocess.Popen([sys.executable, "-c", _SERVE, str(port)], stdin=subprocess.DEVNULL)
    try:
        until = time.monotonic() + START_S
        while not port.exists():
            assert process.poll() is None, "the S3 server did not start"
            assert time.monotonic() < until, "the S3 server takes too long to start"
            time.sleep(0.02)
        yield f"http://127.0.0.1:{port.read_text()}"
    finally:
        process.kill()
        process.wait(START_S)


def s3_environment(url: str) -> Mapping[str, str]:
    """What makes s3fs, in this process or another, talk to the server."""
    return {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": url,
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }


@contextmanager
def s3_bucket(folder: Path, name: str = "bucket") -> Iterator[str]:
    """A server with one bucket, which this process is set up for; yields ``s3://<name>``."""
    with s3_server(folder) as url, pytest.MonkeyPatch.context() as patch:
        for key, value in s3_environment(url).items():
            patch.setenv(key, value)
        fs = file_system()
        fs.call_s3("create_bucket", Bucket=name)
        try:
            yield f"s3://{name}"
        finally:
            fsspec.get_filesystem_class("s3").clear_instance_cache()


def file_system() -> Any:
    """The file system that URLs of S3 are opened with."""
    return fsspec.filesystem("s3")


def unfinished_uploads(bucket: str) -> list[str]:
    """Keys of multipart uploads that were neither completed nor aborted."""
    found = file_system().call_s3("list_multipart_uploads", Bucket=bucket)
    return [each["Key"] for each in found.get("Uploads", [])]
