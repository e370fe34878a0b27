"""Several processes that work on one folder: locks, and who is who.

Locks are the system's own (flock): they end with the process that holds them, however it ends, and hold between
machines that share a folder, where its file system passes them on (NFS does). A lock's file may be left behind, the
lock never is. torchrun tells each process its rank by environment variables, and provides a key-value store, over which
rank 0 broadcasts the folder's name.
"""

import json
import os
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..errors import UsageError
from ..files import disk_errors, write_whole

LOCK, HOLDER, CLAIMS = ".session.lock", ".session.holder", ".claims"
PATIENCE = timedelta(minutes=10)
"""how long to wait until all of torchrun's processes have started"""


def rank_and_world(environ: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """This process's rank and the number of processes, as torchrun sets them; (0, 1) without it.

    UsageError when the processes could not find each other.
    """
    rank, world = int(environ.get("RANK", "0")), int(environ.get("WORLD_SIZE", "1"))
    if world > 1 and not {"MASTER_ADDR", "MASTER_PORT"} <= environ.keys():
        raise UsageError(f"WORLD_SIZE is {world}, but MASTER_ADDR and MASTER_PORT are not set. Next: use torchrun")
    return rank, world


def own_gpu(device: str) -> str:
    """The device to use: by itself, a GPU of its own for each of torchrun's processes."""
    import torch

    local = os.environ.get("LOCAL_RANK")
    return f"cuda:{local}" if device == "auto" and local and torch.cuda.is_available() else device


@contextmanager
def try_lock(path: Path) -> Iterator[bool]:
    """Take a lock without waiting, until the block ends. The value says whether it was free. DiskError."""
    lock = FileLock(path)
    with disk_errors(path), suppress(Timeout):
        lock.acquire(blocking=False)
    try:
        yield lock.is_locked
    finally:
        lock.release()


@contextmanager
def alone(path: Path, finding: str) -> Iterator[None]:
    """Hold a lock until the block ends, and remove its file. UsageError with the finding where another process holds
    it, DiskError."""
    with try_lock(path) as mine:
        if not mine:
            raise UsageError(f"{finding}. Next: wait for it, or end it")
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """Wait for a lock, take it, and release it when the block ends. DiskError."""
    file = FileLock(path)
    with disk_errors(path):
        file.acquire()
    try:
        yield
    finally:
        file.release()


def claim(folder: Path, name: str) -> AbstractContextManager[bool]:
    """`try_lock` for one picture of a folder, by a name of its own: whether no other process is drawing it."""
    claims = folder / CLAIMS
    with disk_errors(claims):
        claims.mkdir(exist_ok=True)
    return try_lock(claims / f"{name}.lock")


def end_claims(folder: Path) -> None:
    """Remove the files of all claims, once every picture is there."""
    shutil.rmtree(folder / CLAIMS, ignore_errors=True)


@contextmanager
def only_session(folder: Path) -> Iterator[None]:
    """Lock a session's folder while the block runs. UsageError names the process that has locked it already."""
    with try_lock(folder / LOCK) as mine:
        if not mine:
            raise UsageError(f"{folder} is being worked on by {_holder(folder)}. Next: wait for it, or end it")
        write_whole(folder / HOLDER, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}) + "\n")
        try:
            yield
        finally:
            (folder / HOLDER).unlink(missing_ok=True)


def _holder(folder: Path) -> str:
    """The process that works in a folder, in words."""
    try:
        found = json.loads((folder / HOLDER).read_text(encoding="utf-8"))
        return f"process {int(found['pid'])} on {found['host']!s:.60}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def broadcast_name(rank: int, world: int, word: str = "") -> tuple[str, Any]:
    """`word` of rank 0, and the store that carried it, to be kept while other ranks may still read it. UsageError."""
    from torch.distributed import rendezvous

    try:
        store, *_ = next(rendezvous("env://", rank, world, timeout=PATIENCE))
        if rank > 0:
            word = store.get("word").decode()
            store.set(f"heard {rank}", "")
        else:
            store.set("word", word)
            store.wait([f"heard {other}" for other in range(1, world)])
        return word, store
    except RuntimeError as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise UsageError(f"the {world} processes did not find each other at {where}: {error}") from None
