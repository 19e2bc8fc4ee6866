"""A lock beside a file, so that one process writes it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from jvlm.errors import UserError, file_errors

_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of an output. The system lets go of it when a process ends, however it ends."""
    lock = path.with_name(f"{path.name}.lock")
    with file_errors(lock, "written"):
        descriptor = _take(lock, path)
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(descriptor)


def _take(lock: Path, path: Path) -> int:
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            held = os.pread(descriptor, 1000, 0)
            os.close(descriptor)
            if error.errno in _NO_LOCKS:
                raise UserError(
                    f"{lock} cannot be locked ({error.strerror}); give an output on a local disk"
                ) from error
            if error.errno != errno.EWOULDBLOCK:
                raise
            holder = _holder(held) or "a process that has just begun"
            raise UserError(f"another run writes {path}: {holder}. Wait for it, or give another output") from error
        # the run before may have removed the file between our opening and locking it
        if not os.path.exists(lock) or not os.path.samestat(os.stat(lock), os.fstat(descriptor)):
            os.close(descriptor)
            continue
        held = os.pread(descriptor, 1000, 0)
        if held and not _holder(held):
            os.close(descriptor)
            raise UserError(f"{lock} was not written by jvlm generate, which locks its output with it. Move it away")
        own = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(own).encode() + b"\n", 0)
        return descriptor


def _holder(held: bytes) -> str | None:
    """Who wrote a lock; None if it is no lock."""
    try:
        values = json.loads(held)
        return f"process {values['pid']} on {values['host']}, since {values['since']}"
    except (ValueError, TypeError, KeyError):
        return None
