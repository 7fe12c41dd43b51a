"""Files: written whole or not at all, sealed against damage, and folders that one process writes to at a time.

A leaf: any room may use it.

**Writing.** A regular file that replaces another is written beside it, flushed to the disk and renamed over it, so
that a full disk, a crash or a power cut leaves either the old file or the new one, never half of one. Anything
else (a pipe, a terminal, a device) has no old content to save and is written straight to.

**Seals.** A file that the library reads back carries the digest of all its bytes before the digest, in a place
where its format allows a comment (`Seal`). It is there against damage, not against forgery.

**Locks.** `locked` keeps a second process out of a folder. The lock is the operating system's (flock): it ends with
the process, however that ends. On NFS it works where the server grants locks; where there are none (some network
file systems, Windows) a second process is not noticed.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import hashlib
import os
import socket
import stat
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fqt.errors import FqtError, FqtWarning

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "DIGITS",
    "Seal",
    "cannot_write",
    "check_path",
    "digest",
    "is_plain",
    "locked",
    "read_bytes",
    "shown",
    "tidy",
    "write_bytes",
]

DIGITS = 16  # hexadecimal, of a digest
LOCK = ".lock"
LONGEST = 160  # characters of a path in a message


def digest(data: bytes) -> bytes:
    """64 bits of BLAKE2b, as hexadecimal digits."""
    return hashlib.blake2b(data, digest_size=DIGITS // 2).hexdigest().encode()


@dataclass(frozen=True)
class Seal:
    """Where a format holds its digest: ``head + content + lead + digest + tail``.

    The head says that the file is sealed, so that a seal that has gone is noticed too; a format whose content
    says so has an empty one.
    """

    head: bytes
    lead: bytes
    tail: bytes

    def put(self, content: bytes) -> bytes:
        """The sealed file."""
        before = self.head + content + self.lead
        return before + digest(before) + self.tail

    def holds(self, data: bytes) -> bool | None:
        """Whether the bytes are what was sealed; None for a file that has no trace of a seal."""
        end = len(data) - len(self.tail) - DIGITS
        if end >= 0 and data[:end].endswith(self.lead):
            return data[end:] == digest(data[:end]) + self.tail
        begins = bool(self.head and data) and data.startswith(self.head[: len(data)])
        return False if begins else None


def write_bytes(path: Path, data: bytes) -> None:
    """Writes ``data`` to ``path`` whole or not at all; what stood there before survives a failure.

    A link is followed; what is no regular file is written straight to.

    Raises:
        FqtError: the disk is full, or the folder cannot be written.
    """
    try:
        if is_plain(path):
            _replace(Path(os.path.realpath(path)), data)
        else:
            _pour(path, data)
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        raise cannot_write(path, error) from error


def is_plain(path: Path) -> bool:
    """Whether writing to ``path`` replaces or makes a regular file, rather than feeding a pipe or a device."""
    if _descriptor(path) is not None:
        return False
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except FileNotFoundError:
        return True


def _replace(path: Path, data: bytes) -> None:
    name = path.name if len(os.fsencode(path.name)) < 200 else digest(os.fsencode(path.name)).decode()
    part = path.with_name(f".{name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise


def _pour(path: Path, data: bytes) -> None:
    number = _descriptor(path)
    where = path if number is None else os.dup(number)  # its place in a file that was redirected to is shared
    with open(where, "wb") as file:
        file.write(data)


def _descriptor(path: Path) -> int | None:
    """The number of an open file that goes by a name, such as /dev/stdout."""
    name = os.path.abspath(path)
    known = {"/dev/stdin": 0, "/dev/stdout": 1, "/dev/stderr": 2}
    if name in known:
        return known[name]
    folder, _, number = name.rpartition("/")
    return int(number) if folder in ("/dev/fd", "/proc/self/fd") and number.isdecimal() else None


def read_bytes(path: Path) -> bytes:
    """Reads a file whole.

    Raises:
        FqtError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except (OSError, ValueError) as error:
        raise FqtError(f"cannot read {shown(path)}: {_reason(error)}") from error


def check_path(path: Path) -> None:
    """Refuses a path at which nothing can be: its name is too long, or what should be a folder is a file.

    Raises:
        FqtError: says which.
    """
    for place in (path, *path.parents):
        try:
            os.stat(place)
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            raise FqtError(f"cannot use {shown(path)}: {_reason(error)}; name another place") from error
        if place != path and not place.is_dir():
            raise FqtError(f"cannot use {shown(path)}: {shown(place)} is a file, not a folder; name another place")
        return


def shown(path: Path | str) -> str:
    """A path for a message, its middle left out if it is very long."""
    text = str(path)
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]}…{text[-LONGEST // 2 :]}"


def cannot_write(path: Path | str, error: Exception) -> FqtError:
    """The line for a write that failed."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return FqtError(
            f"the disk is full: {shown(path)} was not written, and what was saved before is intact; "
            "free some space, then continue the run"
        )
    return FqtError(f"cannot write {shown(path)}: {_reason(error)}")


def _reason(error: Exception) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error)


# Locks that this process holds. A child that is forked off (a data loader's) must not keep them when it ends.
_HELD: set[int] = set()


def _let_go() -> None:
    for number in _HELD:
        os.close(number)
    _HELD.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other processes, and other threads of this one, from writing to ``folder`` meanwhile; makes the folder.

    What a killed process left half-written there is cleared away. A folder that was made and stayed empty is
    removed again.

    Raises:
        FqtError: another process is writing there; the message names it. Or the folder cannot be made.
    """
    check_path(folder)
    try:
        made = [place for place in (folder, *folder.parents) if not place.exists()]
    except OSError as error:
        raise cannot_write(folder, error) from error
    try:
        with _held(folder):
            _clear_parts(folder)
            yield
    finally:
        for place in made:
            with contextlib.suppress(OSError):
                place.rmdir()


def tidy(folder: Path) -> None:
    """Clears away what a killed process left in a folder that needs no more work: its lock, and half-written files.

    Nothing happens where a process is at work, or where nothing can be written.
    """
    if (folder / LOCK).exists():
        with contextlib.suppress(FqtError), locked(folder):
            pass


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[None]:
    """The lock alone."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        number = _take(folder)
    except OSError as error:
        raise cannot_write(folder, error) from error
    _HELD.add(number)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            (folder / LOCK).unlink()  # while it is held: whoever opened it meanwhile sees that it has gone
        _HELD.discard(number)
        os.close(number)


def _take(folder: Path) -> int:
    """The descriptor of the folder's lock file, locked."""
    path = folder / LOCK
    while True:
        number = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if fcntl is not None:
                fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(number, 200).decode(errors="replace").strip()
            os.close(number)
            raise FqtError(
                f"{shown(folder)} is in use by another run ({holder or 'which is just starting'}): "
                "wait for its end, stop it, or name another --out"
            ) from None
        except OSError as error:  # a file system without locks
            warnings.warn(
                f"{shown(folder)} cannot be locked ({error.strerror}): make sure that no other run writes there",
                FqtWarning,
                stacklevel=4,
            )
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(number), os.stat(path)):
                try:
                    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
                    os.ftruncate(number, 0)
                    os.write(number, f"process {os.getpid()} on {socket.gethostname()}, since {now}\n".encode())
                except OSError:  # a full disk: the lock would last as long as the descriptor
                    path.unlink(missing_ok=True)
                    os.close(number)
                    raise
                return number
        os.close(number)  # its holder removed it between our opening and locking it: that lock keeps nobody out


def _clear_parts(folder: Path) -> None:
    """Removes what killed processes had begun to write; files that merely look like it are not ours to remove."""
    for part in folder.glob(".*.*.part"):
        number = part.name.split(".")[-2]
        if number.isdecimal() and not _lives(int(number)):
            with contextlib.suppress(OSError):
                part.unlink()


def _lives(process: int) -> bool:
    if process == os.getpid() or fcntl is None:  # on Windows there is no asking
        return True
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        pass
    return True
