"""Several processes and one folder: who may work in it, and at what.

Locks are the system's own (flock): they end with the process that holds them, however it ends, and hold between
machines that share a folder, where its file system passes them on (NFS does). A name may be left behind, never a lock.
torchrun says who is who by the environment, and lends its key-value store, over which rank 0 tells the folder's name.
"""

import json
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..errors import UsageError
from ..files import disk_errors, write_whole

LOCK, HOLDER = ".session.lock", ".session.holder"
PATIENCE = timedelta(minutes=10)
"""until all of torchrun's processes have started"""


def rank_and_world(environ: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """Which of how many processes this is; (0, 1) by itself. UsageError when they could not find each other."""
    rank, world = int(environ.get("RANK", "0")), int(environ.get("WORLD_SIZE", "1"))
    if world > 1 and not {"MASTER_ADDR", "MASTER_PORT"} <= environ.keys():
        raise UsageError(f"WORLD_SIZE is {world}, but MASTER_ADDR and MASTER_PORT are not set. Next: use torchrun")
    return rank, world


def own_gpu(device: str) -> str:
    """torchrun's processes take a GPU each."""
    import torch

    local = os.environ.get("LOCAL_RANK")
    return f"cuda:{local}" if device == "auto" and local and torch.cuda.is_available() else device


@contextmanager
def try_lock(path: Path) -> Iterator[bool]:
    """Hold a lock while the block runs, if nobody else does: whether it is held."""
    lock = FileLock(path)
    with disk_errors(path), suppress(Timeout):
        lock.acquire(blocking=False)
    try:
        yield lock.is_locked
    finally:
        lock.release()


@contextmanager
def lock_file(path: Path) -> Iterator[None]:
    """Hold a lock while the block runs, as soon as nobody else does."""
    lock = FileLock(path)
    with disk_errors(path):
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def only_session(folder: Path) -> Iterator[None]:
    """The folder is ours while the block runs. UsageError names the process that it belongs to."""
    with try_lock(folder / LOCK) as mine:
        if not mine:
            raise UsageError(f"{folder} is being worked on by {_holder(folder)}. Next: wait for it, or end it")
        write_whole(folder / HOLDER, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}) + "\n")
        try:
            yield
        finally:
            (folder / HOLDER).unlink(missing_ok=True)


def _holder(folder: Path) -> str:
    try:
        found = json.loads((folder / HOLDER).read_text())
        return f"process {int(found['pid'])} on {found['host']!s:.60}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def broadcast_name(rank: int, world: int, word: str = "") -> tuple[str, Any]:
    """What rank 0 says to all others. Keep the second thing while anybody may still listen. UsageError."""
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
