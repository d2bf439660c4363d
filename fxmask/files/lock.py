"""One writer at a time."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

PATIENCE = 60.0  # seconds that a writer waits for another one; writing takes far less
NOFOLLOW = getattr(os, "O_NOFOLLOW", 0)  # a link in the place of a file of ours leads elsewhere
STALE = 600.0  # seconds after which a lock that no system keeps counts as left behind


@contextlib.contextmanager
def locked(path: Path, patience: float | None = None) -> Iterator[None]:
    """Inside, no other thread or process holds the lock of that file, which goes at the end. A killed holder's is free.

    Raises:
        TimeoutError: another writer holds it for longer than ``patience`` seconds.
        OSError: the file cannot be made there.
    """
    deadline = time.monotonic() + (PATIENCE if patience is None else patience)
    while (held := _attempt(path)) is None:
        if time.monotonic() > deadline:
            raise TimeoutError(f"another process has been writing here for long ({path})")
        time.sleep(0.005)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()  # before it is freed: whoever waits for it sees that it is gone, and makes another
        os.close(held)


def _attempt(path: Path) -> int | None:
    """The lock as an open file, or ``None`` while another has it."""
    if fcntl is None:
        return _attempt_exclusive(path)
    opened = os.open(path, os.O_RDWR | os.O_CREAT | NOFOLLOW, 0o666)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(opened), os.stat(path)):
            return opened
    except (BlockingIOError, FileNotFoundError):
        pass
    except BaseException:
        os.close(opened)
        raise
    os.close(opened)
    return None


def _attempt_exclusive(path: Path) -> int | None:
    """The same where there is no ``flock``: whoever makes the file has the lock."""
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > STALE:
                path.unlink()
        return None
