"""Bytes of files onto a device as fast as its bus takes them: threads read ahead into pinned memory.

A copy out of a mapped file waits for one thread that faults in page after page, and goes through pinned memory of the
driver's own. Here threads read into pinned memory themselves, and the device fetches from it while they read on.

All that is wanted, in the order in which it is wanted, is one tape of bytes, cut into chunks: a chunk has a part of a
large tensor, or many small ones. A thread reads it into a buffer; from there it is copied into its tensors. The copies
take their turn on the device's current stream among all other work, so none of them comes too early for memory that
torch gave out again, and an event behind a buffer's last copy tells when it may be filled anew.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import Tensor

from .header import open_file, read_into
from .source import Span

CHUNK = 2**24
"""bytes; a power of two, to which torch rounds pinned memory up"""
BUFFERS = 24
"""for the chunks that are read, wait or are copied: 384 MiB, which torch keeps for the next file"""
THREADS = 16
"""readers: a core copies a few GB/s out of the page cache; a disk or a network likes to be asked for much at once"""


@contextmanager
def tape(spans: Iterable[Span], device: torch.device) -> Iterator[Callable[[Tensor], Tensor]]:
    """A function that fills a tensor on `device` with the next of the spans' bytes, while the block runs. FileError."""
    todo = deque(chunks(spans))
    device = torch.empty(1, device=device).device  # CUDA has its context now, before threads need one
    with ExitStack() as stack:
        paths = {span.path for chunk in todo for span in chunk}
        buffers = [Buffer(paths, device, stack) for _ in range(min(BUFFERS, len(todo)))]
        readers = ThreadPoolExecutor(THREADS, "reader")
        stack.callback(readers.shutdown, cancel_futures=True)
        turns: deque[tuple[Buffer, Future[Tensor]]] = deque()

        def read_ahead(buffer: Buffer) -> None:
            if todo:
                turns.append((buffer, readers.submit(buffer.read, todo.popleft())))

        for buffer in buffers:
            read_ahead(buffer)
        rest = torch.empty(0, dtype=torch.uint8)  # of the chunk whose turn it is

        def fill(tensor: Tensor) -> Tensor:
            nonlocal rest
            wanted = tensor.reshape(-1).view(torch.uint8)
            while len(wanted):
                if not len(rest):
                    rest = turns[0][1].result()
                count = min(len(wanted), len(rest))
                wanted[:count].copy_(rest[:count], non_blocking=True)
                wanted, rest = wanted[count:], rest[count:]
                if not len(rest):
                    buffer, _ = turns.popleft()
                    buffer.release()
                    read_ahead(buffer)
            return tensor

        yield fill


def chunks(spans: Iterable[Span]) -> Iterator[list[Span]]:
    """The spans cut, and gathered into lists of CHUNK bytes; the last has what is left."""
    chunk, room = [], CHUNK
    for path, start, end in spans:
        while start < end:
            cut = min(start + room, end)
            chunk.append(Span(path, start, cut))
            start, room = cut, room - (cut - start)
            if not room:
                yield chunk
                chunk, room = [], CHUNK
    if chunk:
        yield chunk


class Buffer:
    """Memory for a chunk at a time, with handles of its own to the files: no other thread moves their positions."""

    def __init__(self, paths: Iterable[Path], device: torch.device, stack: ExitStack) -> None:
        self.files = {path: stack.enter_context(open_file(path)) for path in paths}
        self.device = device
        self.memory: Tensor | None = None
        self.copied = torch.cuda.Event(blocking=True) if device.type == "cuda" else None

    def read(self, chunk: list[Span]) -> Tensor:
        """The chunk's bytes, for a thread to read once those before them have been copied. FileError."""
        if self.memory is None:  # to pin it takes milliseconds, in which other threads read
            self.memory = torch.empty(CHUNK, dtype=torch.uint8, pin_memory=self.copied is not None)
        if self.copied:
            self.copied.synchronize()
        end = 0
        for span in chunk:
            start, end = end, end + span.end - span.start
            read_into(self.memory[start:end].numpy().data, self.files[span.path], span.path, span.start)
        return self.memory[:end]

    def release(self) -> None:
        """The last copy out of it is under way."""
        if self.copied:
            self.copied.record(torch.cuda.current_stream(self.device))
