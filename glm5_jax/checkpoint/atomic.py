"""A directory that appears whole or not at all, also when the process is killed at any moment."""

import contextlib
import ctypes
import errno
import fcntl
import os
import pathlib
import shutil
import sys
from typing import Iterator

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # Linux


@contextlib.contextmanager
def replacing(target: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """Yields an empty directory beside `target`; on success it takes the target's place, else it is removed.

    What a killed process left is cleared by the next call for the same target. Raises NotADirectoryError for a target
    that is a file, BlockingIOError where another process is writing the same target.
    """
    target = pathlib.Path(target).resolve()
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, f"{target}: expected a directory or nothing, found a file")
    target.parent.mkdir(parents=True, exist_ok=True)
    recover(target)
    partial = _partial(target)
    partial.mkdir(exist_ok=True)
    with _locked(partial, target):
        for left in partial.iterdir():
            shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
        try:
            yield partial
            for directory in (partial, partial.parent):
                _sync(directory)
            if not target.exists():
                os.rename(partial, target)
            elif not _exchange(partial, target):
                os.rename(target, _former(target))  # until the next line the former one is what `recover` finds
                os.rename(partial, target)
            _sync(target.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            if target.exists():
                shutil.rmtree(_former(target), ignore_errors=True)


def recover(target: str | os.PathLike[str]) -> None:
    """Clears up after a process that was killed while it replaced `target`; one that is still at work is left alone.

    The former directory is put back where the new one had not come in its place, and what was half written is removed.
    """
    target = pathlib.Path(target).resolve()
    partial = _partial(target)
    if _former(target).is_dir() and not target.exists():
        os.rename(_former(target), target)
    if partial.is_dir():
        with contextlib.suppress(OSError):  # another process holds the lock, or nothing may be written here
            with _locked(partial, target):
                shutil.rmtree(partial)


def _partial(target: pathlib.Path) -> pathlib.Path:
    return target.with_name(f".{target.name}.partial")


def _former(target: pathlib.Path) -> pathlib.Path:
    return target.with_name(f".{target.name}.former")


def _exchange(one: pathlib.Path, other: pathlib.Path) -> bool:
    """Swaps two directories in one step, where system and file system can."""
    if sys.platform != "linux":
        return False
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    if call(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(other))


@contextlib.contextmanager
def _locked(directory: pathlib.Path, target: pathlib.Path) -> Iterator[None]:
    """Holds a lock that a killed process loses."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BlockingIOError(error.errno, f"{target}: another process is writing it; wait for it, or write "
                                               f"elsewhere") from error
        yield
    finally:
        os.close(handle)


def _sync(path: pathlib.Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
