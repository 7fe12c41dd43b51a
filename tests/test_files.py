"""Files: written whole or straight, sealed, and folders that one process writes to."""

import errno
import os
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import fqt
from fqt.errors import FqtError
from fqt.files import Seal, check_path, digest, is_plain, locked, write_bytes

SEALS = [
    Seal(b"", b"digest ", b""),
    Seal(b"# sealed\n", b"# ", b"\n"),
    Seal(b'{"s": 1,\n', b',\n"d": "', b'"\n}\n'),
]


@pytest.mark.parametrize("seal", SEALS)
def test_a_seal_shows_every_flipped_bit_and_every_cut(seal):
    data = seal.put(b"what it is about")
    assert seal.holds(data) is True
    for at in range(8 * len(data)):
        changed = bytearray(data)
        changed[at // 8] ^= 1 << at % 8
        assert not seal.holds(bytes(changed))
    assert not any(seal.holds(data[:end]) for end in range(len(data)))
    assert seal.holds(b"never sealed") is None
    if seal.head:  # a seal that has gone is missed
        assert seal.holds(data[: data.rindex(seal.lead)]) is False


def test_a_digest_is_sixteen_digits_of_all_bytes():
    assert len(digest(b"")) == 16
    assert digest(b"a") != digest(b"b")


def test_a_pipe_is_written_to_and_stays_a_pipe(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    seen = []
    reader = threading.Thread(target=lambda: seen.append(pipe.read_bytes()), daemon=True)
    reader.start()
    write_bytes(pipe, b"page")
    reader.join(10)
    assert seen == [b"page"]
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert [p.name for p in tmp_path.iterdir()] == ["pipe"]


def test_a_device_is_written_to():
    write_bytes(Path(os.devnull), b"nothing")
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)


def test_an_open_file_goes_on_where_it_is(tmp_path):
    with open(tmp_path / "log", "wb", buffering=0) as file:
        file.write(b"before ")
        path = Path(f"/dev/fd/{file.fileno()}")
        assert not is_plain(path)
        write_bytes(path, b"page")
        file.write(b" after")
    assert (tmp_path / "log").read_bytes() == b"before page after"


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "link").symlink_to("a/real")
    write_bytes(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "a" / "real").read_bytes() == b"new"


def test_the_longest_name_there_can_be_is_written(tmp_path):
    write_bytes(tmp_path / ("n" * 255), b"new")
    assert [len(p.name) for p in tmp_path.iterdir()] == [255]


def _lock(path):
    with locked(path):
        pass


@pytest.mark.parametrize("write", [check_path, lambda path: write_bytes(path, b""), _lock])
def test_what_can_be_no_place_is_one_line(tmp_path, write):
    (tmp_path / "file").write_text("")
    for bad in ("n" * 300, "/".join(["d" * 99] * 50), "file/x", "file/x/y", "a\0b"):
        with pytest.raises(FqtError) as caught:
            write(tmp_path / bad)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 500
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_folder_is_locked_while_it_is_written_to(tmp_path):
    folder = tmp_path / "a" / "b"
    with locked(folder):
        holder = rf"in use by another run \(process {os.getpid()} on .*, since 2.*\)"
        with pytest.raises(FqtError, match=holder), locked(folder):
            pass
        assert [p.name for p in folder.iterdir()] == [".lock"]  # of the first: the second left it alone
        with pytest.raises(FqtError, match="in use"), locked(folder):
            pass
        (folder / "kept").write_text("")
    assert [p.name for p in folder.iterdir()] == ["kept"]
    with locked(folder), locked(tmp_path / "empty"):
        assert (tmp_path / "empty").is_dir()
    assert not (tmp_path / "empty").exists()


def test_a_lock_ends_with_its_process_even_where_a_child_lives_on(tmp_path):
    code = (
        "import os, pathlib, sys, time; from fqt.files import locked\n"
        "with locked(pathlib.Path(sys.argv[1])):\n"
        "    child = os.fork()\n"
        # The child speaks: only it knows that it has let go of the lock, which a busy machine may do late.
        "    if child == 0: print(os.getpid(), flush=True); time.sleep(60); os._exit(0)\n"
        "    time.sleep(60)\n"
    )
    # the leaves alone: importing torch would take seconds
    stub = "import sys, types; p = types.ModuleType('fqt'); p.__path__ = [sys.argv[2]]; sys.modules['fqt'] = p\n"
    process = subprocess.Popen(
        [sys.executable, "-c", stub + code, tmp_path, os.path.dirname(fqt.__file__)],
        stdout=subprocess.PIPE,
        text=True,
    )
    child = int(process.stdout.readline())
    try:
        with pytest.raises(FqtError, match=f"process {process.pid} on"), locked(tmp_path):
            pass
        (tmp_path / f".checkpoint.pt.{process.pid}.part").write_text("half")
        process.kill()
        process.wait()
        process.stdout.close()
        with locked(tmp_path):
            assert [p.name for p in tmp_path.iterdir()] == [".lock"]  # what it had begun to write is gone
        os.kill(child, 0)  # still there
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_lock_removes_nothing_that_no_run_wrote(tmp_path):
    for name in (".mine.part", ".a.b.part", "x.1.part"):
        (tmp_path / name).write_text("mine")
    with locked(tmp_path):
        pass
    assert sorted(p.name for p in tmp_path.iterdir()) == [".a.b.part", ".mine.part", "x.1.part"]


def test_a_lock_that_a_full_disk_refused_is_not_held(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("fqt.files.os.ftruncate", full)
        with pytest.raises(FqtError, match="disk is full"), locked(tmp_path):
            pass
    assert list(tmp_path.iterdir()) == []
    with locked(tmp_path):
        pass
