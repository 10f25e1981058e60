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
    """Whatever the folder's owner raises."""


@pytest.fixture
def folder(tmp_path) -> Folder:
    return Folder(str(tmp_path / "kept"), FolderError)


def test_files_come_back_are_named_and_go(folder):
    assert folder.names() == []
    assert folder.get("a/b.bin") is None
    folder.put("a/b.bin", b"one")
    folder.put("a/b.bin", b"two")
    folder.put("c.bin", b"")
    assert (folder.get("a/b.bin"), folder.names()) == (b"two", ["a/b.bin", "c.bin"])
    folder.remove("a")
    folder.remove("c.bin")
    assert folder.names() == []


def test_a_folder_is_listed_while_another_process_removes_from_it(folder, tmp_path):
    names = [f"{number}/a" for number in range(300)]
    for name in names:
        folder.put(name, b"")
    with ThreadPoolExecutor(1) as other:
        removing = other.submit(lambda: [shutil.rmtree(tmp_path / "kept" / Path(name).parent) for name in names])
        while not removing.done():
            assert set(folder.names()) <= set(names)
    removing.result()
    assert folder.names() == []


def test_who_may_read_a_folder_may_read_its_files(folder, tmp_path):
    (tmp_path / "kept" / "a").mkdir(parents=True)
    (tmp_path / "kept" / "a").chmod(0o750)
    with folder.atomic_write("a/b") as path:
        save_file({"weight": torch.zeros(1)}, path)
    assert (tmp_path / "kept" / "a" / "b").stat().st_mode & 0o777 == 0o640


def test_a_uri_is_as_good_as_a_path(tmp_path):
    Folder(str(tmp_path), FolderError).put("a", b"one")
    assert Folder(f"file://{tmp_path}", FolderError).get("a") == b"one"
    far = Folder("mock:///runs", FolderError)  # pyarrow's own, in memory
    far.put("a/b", b"one")
    assert (far.get("a/b"), far.names()) == (b"one", ["a/b"])


def test_a_write_that_fails_leaves_what_was_there_and_no_part(tmp_path):
    """With a limit on the size of files, a full disk's error comes from the real system, in a process of its own."""
    program = f"""
import resource, signal
from ffdist.storage.folder import Folder
folder = Folder({str(tmp_path)!r}, RuntimeError)
folder.put("a", b"one")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
folder.put("a", bytes(100_000))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "a cannot be written" in done.stderr
    assert "File too large" in done.stderr
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a", b"one")]


def test_what_cannot_be_is_told_in_the_owners_words(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FolderError, match="cannot be opened"):
        Folder("nosuch://bucket/a", FolderError).get("a")
    with pytest.raises(FolderError, match="cannot be written"):
        Folder(str(tmp_path / "file"), FolderError).put("a", b"")
    with pytest.raises(FolderError, match="cannot be removed"):
        Folder(str(tmp_path), FolderError).remove("missing")
