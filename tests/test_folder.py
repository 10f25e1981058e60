import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ffdist.storage.folder import Folder


class FolderError(Exception):
    """Error type that is passed to `Folder`."""


@pytest.fixture
def folder(tmp_path) -> Folder:
    return Folder(str(tmp_path / "kept"), FolderError)


def test_put_get_names_and_remove(folder):
    assert folder.names() == []
    assert folder.get("a/b.bin") is None
    folder.put("a/b.bin", b"one")
    folder.put("a/b.bin", b"two")
    folder.put("c.bin", b"")
    assert (folder.get("a/b.bin"), folder.names()) == (b"two", ["a/b.bin", "c.bin"])
    folder.remove("a")
    folder.remove("c.bin")
    assert folder.names() == []


def test_names_works_during_concurrent_removal(folder, tmp_path):
    names = [f"{number}/a" for number in range(300)]
    for name in names:
        folder.put(name, b"")
    with ThreadPoolExecutor(1) as executor:
        removal = executor.submit(lambda: [shutil.rmtree(tmp_path / "kept" / Path(name).parent) for name in names])
        while not removal.done():
            assert set(folder.names()) <= set(names)
    removal.result()
    assert folder.names() == []


def test_files_get_the_read_permissions_of_their_folder(folder, tmp_path):
    (tmp_path / "kept" / "a").mkdir(parents=True)
    (tmp_path / "kept" / "a").chmod(0o750)
    with folder.atomic_write("a/b") as path:
        save_file({"weight": torch.zeros(1)}, path)
    assert (tmp_path / "kept" / "a" / "b").stat().st_mode & 0o777 == 0o640


def test_folder_accepts_uris(tmp_path):
    Folder(str(tmp_path), FolderError).put("a", b"one")
    assert Folder(f"file://{tmp_path}", FolderError).get("a") == b"one"
    remote_folder = Folder("mock:///runs", FolderError)  # pyarrow's in-memory file system
    remote_folder.put("a/b", b"one")
    assert (remote_folder.get("a/b"), remote_folder.names()) == (b"one", ["a/b"])


def test_failed_write_keeps_the_old_file_and_leaves_no_temporary_file(tmp_path):
    """A limit on the file size, set in a subprocess, makes the operating system raise an error as on a full disk."""
    program = f"""
import resource, signal
from ffdist.storage.folder import Folder
folder = Folder({str(tmp_path)!r}, RuntimeError)
folder.put("a", b"one")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
folder.put("a", bytes(100_000))
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "a cannot be written" in result.stderr
    assert "File too large" in result.stderr
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a", b"one")]


def test_failures_raise_the_error_type_of_the_caller(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FolderError, match="cannot be opened"):
        Folder("nosuch://bucket/a", FolderError).get("a")
    with pytest.raises(FolderError, match="cannot be written"):
        Folder(str(tmp_path / "file"), FolderError).put("a", b"")
    with pytest.raises(FolderError, match="cannot be removed"):
        Folder(str(tmp_path), FolderError).remove("missing")
