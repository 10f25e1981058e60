"""Checkpoints and negatives on remote storage: the S3 protocol with a local server that fails temporarily."""

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import torch
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

from ffdist import load_config, train
from ffdist.data.negatives_store import Store
from ffdist.errors import RunFailed
from ffdist.ff.negatives import NegativesError
from ffdist.runs.folder import checkpoints_of
from ffdist.storage import folder as folder_module
from ffdist.storage.folder import Folder

ATTEMPTS = 3
CONFLICT = b"<Error><Code>OperationAborted</Code><Message>try again</Message></Error>"
"""S3 error that the client does not retry itself; it retries other errors for 6 s."""


@dataclass
class Storage:
    """S3 server that rejects some requests."""

    requests: list[str] = field(default_factory=list)
    failing: str = ""
    """Requests fail if they contain this text; a request is `METHOD /path?query`."""
    failures: int = 0
    """Number of requests that will still fail."""
    uri: str = ""

    def __post_init__(self) -> None:
        self._app = DomainDispatcherApplication(create_backend_app)
        self.server = make_server("127.0.0.1", 0, self, threaded=True)
        self.uri = f"?endpoint_override=127.0.0.1:{self.server.port}&scheme=http&region=us-east-1"

    def __call__(self, environ, start_response):
        request = f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}?{environ['QUERY_STRING']}"
        self.requests.append(request)
        if self.failures and self.failing in request:
            self.failures -= 1
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start_response("409 Conflict", [("Content-Type", "application/xml")])
            return [CONFLICT]
        return self._app(environ, start_response)

    def fail(self, requests: str, times: int) -> None:
        self.failing, self.failures = requests, times


@pytest.fixture(scope="module")
def server() -> Iterator[Storage]:
    patch = pytest.MonkeyPatch()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        patch.setenv(name, "test")
    patch.setattr(folder_module, "PAUSES_S", (0.01, 0.01))
    storage = Storage()
    threading.Thread(target=storage.server.serve_forever, daemon=True).start()
    from pyarrow.fs import FileSystem

    FileSystem.from_uri(f"s3://runs{storage.uri}&allow_bucket_creation=true")[0].create_dir("runs")
    yield storage
    storage.server.shutdown()
    patch.undo()


@pytest.fixture
def storage(server) -> Storage:
    server.fail("", 0)
    server.requests.clear()
    return server


def make_folder(storage: Storage, name: str) -> Folder:
    return Folder(f"s3://runs/{name}{storage.uri}", RuntimeError)


def test_upload_writes_no_temporary_object(storage):
    """S3 has no rename: it would be a copy, which fails above 5 GB, and a deletion."""
    folder = make_folder(storage, "plain")
    folder.check_writable()
    folder.put("a/b", b"one")
    folder.put("a/b", b"two")
    assert (folder.get("a/b"), folder.get("c"), folder.names()) == (b"two", None, ["a/b"])
    folder.remove("a")
    assert folder.names() == []
    assert not [request for request in storage.requests if ".part" in request]


def test_operations_are_retried_unless_the_uri_is_wrong(storage):
    folder = make_folder(storage, "again")
    for operation, method in (
        (lambda: folder.put("a", b"one"), "PUT"),
        (lambda: folder.get("a"), "GET"),
        (folder.names, "GET"),
        (lambda: folder.remove("a"), "DELETE"),
    ):
        storage.fail(method, ATTEMPTS - 1)
        operation()
        assert not storage.failures
    storage.fail("PUT", 100)
    with pytest.raises(RuntimeError, match="a cannot be written"):
        folder.put("a", b"one")
    assert 100 - storage.failures == ATTEMPTS
    storage.fail("", 0)
    storage.requests.clear()
    with pytest.raises(RuntimeError, match=r"cannot be written .*NO_SUCH_BUCKET"):
        Folder(f"s3://nowhere/a{storage.uri}", RuntimeError).put("a", b"one")
    assert len(storage.requests) < ATTEMPTS


def make_config(storage: Storage, name: str, *changes: str):
    uri = f"s3://runs/{name}{storage.uri}"
    settings = [
        "model.layers=[40,30]",
        "training.epochs=2",
        "checkpoint.every_minibatches=7",
        "checkpoint.keep_last=100",
    ]
    return load_config("digits", [*settings, f"checkpoint.uri={uri}", "pipeline.chunk_size=7", *changes])


def test_run_continues_if_a_checkpoint_cannot_be_written(storage, tmp_path, capsys):
    config = make_config(storage, "skipped", "training.validation_samples=200", "training.validate_every_epochs=1")
    storage.fail("/0001-", ATTEMPTS * 2)
    run = train(config, runner="serial", runs=tmp_path)
    output = capsys.readouterr().out
    assert output.count("was skipped: ") == 2
    names = checkpoints_of(config, run.folder).names()
    assert len(names) == 6  # 2 of 8 were skipped
    manifests = [checkpoints_of(config, run.folder).read_manifest(name) for name in names]
    assert all(manifest.best_checkpoint in (None, *names) for manifest in manifests)


def test_a_failed_removal_of_old_checkpoints_is_a_warning(storage, tmp_path, capsys):
    config = make_config(storage, "pruned", "checkpoint.keep_last=1", "training.epochs=2")
    storage.fail("delete", 1)
    run = train(config, runner="serial", runs=tmp_path)
    assert capsys.readouterr().out.count("old checkpoints were not removed: ") == 1
    assert len(checkpoints_of(config, run.folder).names()) == 1


def test_run_stops_if_storage_stays_unavailable(storage, tmp_path):
    config = make_config(storage, "away", "training.epochs=3")
    storage.fail("/0001-", 10**9)
    with pytest.raises(
        RunFailed, match=r"/0001-.* cannot be written .*the run stopped, and its last good checkpoint is"
    ):
        train(config, runner="serial", runs=tmp_path)


def test_a_complete_store_of_negatives_may_be_read_only(storage):
    store = Store(f"s3://runs/store{storage.uri}", {"kind": "hybrid"})
    store.check([(0, 0)])
    store.write(0, 0, torch.tensor([3, 1, 4]))
    storage.fail("uploads", 10**9)
    store.check([(0, 0)])
    assert torch.equal(store.read(0, 0), torch.tensor([3, 1, 4]))
    with pytest.raises(NegativesError, match="cannot be written"):
        store.check([(0, 0), (0, 1)])
