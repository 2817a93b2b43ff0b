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
    """Yields an empty directory beside `target`; on success it takes the target's place and mode, else it is removed.

    What a killed process left is cleared by the next call for the same target. Raises NotADirectoryError for a target
    that is a file, BlockingIOError where another process is writing the same target, and OSError for one that cannot
    be replaced: a mount point, or a directory that this process works in.
    """
    target = pathlib.Path(target).resolve()
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, f"{target}: expected a directory or nothing, found a file")
    if os.path.ismount(target) or pathlib.Path.cwd().is_relative_to(target):
        raise OSError(errno.EBUSY, f"{target}: expected a directory that can be replaced as a whole, found a mount "
                                   f"point or the working directory; choose a directory below it")
    target.parent.mkdir(parents=True, exist_ok=True)
    with _locked(target):
        _clear(target)
        partial = _partial(target)
        partial.mkdir()
        try:
            yield partial
            if target.exists():
                shutil.copymode(target, partial)
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
    if _partial(target).exists() or _former(target).exists():
        with contextlib.suppress(BlockingIOError, PermissionError):
            with _locked(target):
                _clear(target)


def _clear(target: pathlib.Path) -> None:
    if _former(target).is_dir() and not target.exists():
        os.rename(_former(target), target)
    for left in (_partial(target), _former(target)):
        shutil.rmtree(left, ignore_errors=True)


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
def _locked(target: pathlib.Path) -> Iterator[None]:
    """Holds a lock file beside `target`, which a killed process loses; it goes away with its last holder."""
    path = target.with_name(f".{target.name}.lock")
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(os.stat(path), os.fstat(handle)):
                break
        except BlockingIOError as error:
            os.close(handle)
            raise BlockingIOError(error.errno, f"{target}: another process is writing it; wait for it, or write "
                                               f"elsewhere") from error
        except FileNotFoundError:
            pass
        os.close(handle)  # the file that was locked is gone: its holder removed it between the two calls
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)


def _sync(path: pathlib.Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
