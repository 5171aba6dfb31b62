"""Files appear whole or not at all, whatever happens to the process that writes them."""

from __future__ import annotations

import os
import resource
import signal
import socket
import stat
import subprocess
import sys
import threading

import pytest
import torch

from sora_model import files
from sora_model.checkpoint import read_tensors, write_json, write_tensors
from sora_model.files import WriteError, exclusive, write_atomically, write_bytes


def names(folder) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_a_file_is_synced_before_it_is_renamed_and_its_folder_after(tmp_path, monkeypatch):
    done, fsync, replace = [], os.fsync, os.replace

    def synced(handle):
        done.append(("sync", os.path.basename(os.readlink(f"/proc/self/fd/{handle}"))))
        fsync(handle)

    def renamed(source, target):
        done.append(("rename", os.path.basename(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    write_bytes(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new"
    assert done == [("sync", "a"), ("rename", "a"), ("sync", tmp_path.name)]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, OSError])
def test_an_interrupted_block_leaves_the_old_file_and_its_own_exception(tmp_path, error):
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(error) as caught, write_atomically(tmp_path / "a") as part:
        part.write_bytes(b"half")
        raise error("stop")
    assert type(caught.value) is error
    assert names(tmp_path) == ["a"] and (tmp_path / "a").read_bytes() == b"old"


def test_permissions_are_kept_and_new_files_get_those_of_the_umask(tmp_path):
    umask = os.umask(0o027)
    try:
        write_bytes(tmp_path / "new", b"")
        (tmp_path / "old").touch()
        (tmp_path / "old").chmod(0o604)
        write_bytes(tmp_path / "old", b"1")
        write_tensors(tmp_path / "tensors", {"x": torch.ones(1)})
    finally:
        os.umask(umask)
    modes = {name: stat.S_IMODE((tmp_path / name).stat().st_mode) for name in names(tmp_path)}
    assert modes == {"new": 0o640, "old": 0o604, "tensors": 0o640}


def test_a_link_stays_and_its_target_is_written(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there/file")
    for content in (b"new", b"newer"):  # the target is missing, then there
        write_bytes(tmp_path / "link", content)
        assert (tmp_path / "link").is_symlink() and (tmp_path / "there" / "file").read_bytes() == content
    assert names(tmp_path) == ["link", "there"] and names(tmp_path / "there") == ["file"]


def test_what_cannot_be_written_is_refused_by_name_before_anything_is_made(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "to_folder").symlink_to("folder")
    (tmp_path / "to_nowhere").symlink_to("nowhere/a")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "socket"))
    before = names(tmp_path)
    for name, said in {
        "folder": "what is there is a folder",
        "to_folder": "what is there is a folder",
        "pipe": "not a regular file",
        "socket": "not a regular file",
        "/dev/null": "not a regular file",
        "nowhere/a": "there is no folder .*nowhere'; create it first",
        "to_nowhere": "there is no folder .*/nowhere'; create it first",
        "file/a": "Not a directory|there is no folder",
        "loop": "Too many levels of symbolic links",
        "n" * 300: "File name too long",
    }.items():
        with pytest.raises(WriteError, match=said) as caught:
            write_bytes(tmp_path / name, b"x")
        assert str(caught.value).startswith("cannot write ") and name in str(caught.value)
    for name, said in (("a\0b", "holds a NUL character"), ("", "the name is empty")):
        with pytest.raises(ValueError, match=said):
            write_bytes(name, b"x")
    with pytest.raises(TypeError, match="path must be a string or a path, got int"):
        write_bytes(3, b"x")
    assert names(tmp_path) == before
    listener.close()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_write_protected_file_or_folder_is_left_alone(tmp_path):
    (tmp_path / "file").write_bytes(b"old")
    (tmp_path / "file").chmod(0o400)
    with pytest.raises(WriteError, match="is write-protected"):
        write_bytes(tmp_path / "file", b"new")
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(WriteError, match="cannot write .*locked/a': Permission denied"):
        write_bytes(tmp_path / "locked" / "a", b"new")
    assert (tmp_path / "file").read_bytes() == b"old" and names(tmp_path / "locked") == []


@pytest.fixture
def full_disk():
    """No file may grow beyond 4 KiB: the system's own error, in the middle of a write."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize(
    "write",
    [
        lambda path: write_bytes(path, bytes(10_000)),
        lambda path: write_json(path, {"x": "y" * 10_000}),
        lambda path: write_tensors(path, {"x": torch.zeros(10_000)}),
    ],
)
def test_a_full_disk_is_one_error_that_names_the_file_and_leaves_the_old_one(tmp_path, full_disk, write):
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(WriteError, match="cannot write '.*/a': .*File too large"):
        write(tmp_path / "a")
    assert names(tmp_path) == ["a"] and (tmp_path / "a").read_bytes() == b"old"


KILLED = """
import sys
from sora_model.files import exclusive, write_atomically
with exclusive(sys.argv[1]), write_atomically(sys.argv[1] + "/a") as part:
    part.write_bytes(bytes(1000))
    (part.parent / ".tmpXXXX").touch()  # safetensors writes such a one
    print("ready", flush=True)
    sys.stdin.read()
"""


def test_what_a_killed_process_left_goes_with_the_next_write_and_no_one_elses(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"ready\n"
    with pytest.raises(WriteError, match="in use by another run"), exclusive(tmp_path):
        pass
    with write_atomically(tmp_path / "b") as part:
        part.write_bytes(b"b")
        assert len(list(tmp_path.glob(".sora-*"))) == 2, "a living writer's folder was swept away"
        process.kill()
        process.communicate()
        write_bytes(tmp_path / "c", b"c")
        assert list(tmp_path.glob(".sora-*")) == [part.parent], "ours, alone"
    with exclusive(tmp_path):
        pass
    assert names(tmp_path) == [".lock", "b", "c"] and (tmp_path / "b").read_bytes() == b"b"


def test_writers_of_one_file_at_once_leave_one_whole_file(tmp_path):
    failures = []

    def write(content: bytes) -> None:
        try:
            for _ in range(30):
                write_bytes(tmp_path / "a", content * 1000)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=(content,)) for content in (b"1", b"2", b"3")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert (tmp_path / "a").read_bytes() in {content * 1000 for content in (b"1", b"2", b"3")}
    assert names(tmp_path) == ["a"]


def test_a_folder_is_held_by_one_at_a_time_and_free_after_an_error(tmp_path):
    with pytest.raises(RuntimeError), exclusive(tmp_path / "run"):
        with pytest.raises(WriteError, match="run' is in use by another run; wait for it"), exclusive(tmp_path / "run"):
            pass
        raise RuntimeError
    with exclusive(tmp_path / "run"):
        write_tensors(tmp_path / "run" / "a", {"x": torch.ones(2)})
    assert torch.equal(read_tensors(tmp_path / "run" / "a")["x"], torch.ones(2))


def test_a_filesystem_without_locks_is_written_to_and_never_swept(tmp_path, monkeypatch):
    def unsupported(*arguments):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(files.fcntl, "flock", unsupported)
    (tmp_path / ".sora-0.part").mkdir()
    with exclusive(tmp_path):
        write_bytes(tmp_path / "a", b"a")
    assert "a" in names(tmp_path) and ".sora-0.part" in names(tmp_path)
