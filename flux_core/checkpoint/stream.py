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
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from queue import SimpleQueue

import torch
from torch import Tensor

from .header import open_file, read_into
from .source import Span

CHUNK = 2**24
"""bytes; a power of two, to which torch rounds pinned memory up"""
BUFFERS = 16
"""for the chunks that are read, wait or are copied: 256 MiB, which torch keeps for the next file; pinning is slow"""
THREADS = 12
"""readers: a core copies a few GB/s out of the page cache; a disk or a network likes to be asked for much at once"""


@contextmanager
def stream_to_device(spans: Iterable[Span], device: torch.device) -> Iterator[Callable[[Tensor], Tensor]]:
    """A function that fills a tensor on `device` with the next of the spans' bytes, while the block runs. FileError."""
    pieces = list(chunks(spans))
    turns: list[SimpleQueue[Buffer | BaseException]] = [SimpleQueue() for _ in pieces]
    todo = deque(zip(pieces, turns, strict=True))
    free: SimpleQueue[Buffer | None] = SimpleQueue()
    # CUDA has its context now, before threads need one.
    device = torch.empty(1, dtype=torch.uint8, device=device).device

    def read_on() -> None:
        """A reader's work. It takes a buffer before a chunk, so the next in turn is never the one without."""
        while buffer := free.get():
            try:
                chunk, turn = todo.popleft()
            except IndexError:
                return
            try:
                buffer.read(chunk)
                turn.put(buffer)
            except BaseException as error:
                turn.put(error)

    def stop() -> None:
        todo.clear()
        for _ in range(THREADS):
            free.put(None)

    def arriving() -> Iterator[Buffer]:
        """The chunks in their turn. A buffer goes back to the readers when the next one is asked for."""
        for turn in turns:
            buffer = turn.get()
            if isinstance(buffer, BaseException):
                raise buffer
            yield buffer
            buffer.release()
            free.put(buffer)

    with ExitStack() as stack:
        paths = {span.path for chunk in pieces for span in chunk}
        for _ in range(min(BUFFERS, len(pieces))):
            free.put(Buffer(paths, device, stack))
        readers = stack.enter_context(ThreadPoolExecutor(THREADS, "reader"))
        stack.callback(stop)
        for _ in range(min(THREADS, len(pieces))):
            readers.submit(read_on)
        buffers, memory, start, end = arriving(), torch.empty(0, dtype=torch.uint8, device="cpu"), 0, 0

        def fill(tensor: Tensor) -> Tensor:
            nonlocal memory, start, end
            wanted, done = tensor.reshape(-1).view(torch.uint8), 0
            while done < len(wanted):
                if start == end:
                    buffer = next(buffers)
                    memory, start, end = buffer.memory, 0, buffer.end
                count = min(len(wanted) - done, end - start)
                wanted[done : done + count].copy_(memory[start : start + count], non_blocking=True)
                done, start = done + count, start + count
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
        self.copied = torch.cuda.Event(blocking=True) if device.type == "cuda" else None
        self.memory = torch.empty(0, dtype=torch.uint8, device="cpu")
        self.end = 0
        """of the chunk in it"""

    def read(self, chunk: list[Span]) -> None:
        """Put a chunk's bytes into it, for a thread to do once those before them have been copied. FileError."""
        if not len(self.memory):  # to pin it takes milliseconds, in which other threads read
            self.memory = torch.empty(CHUNK, dtype=torch.uint8, device="cpu", pin_memory=self.copied is not None)
            self.view = self.memory.numpy().data
        elif self.copied:
            self.copied.synchronize()
        self.end = 0
        for path, start, stop in chunk:
            begin, self.end = self.end, self.end + stop - start
            read_into(self.view[begin : self.end], self.files[path], path, start)

    def release(self) -> None:
        """The last copy out of it is under way."""
        if self.copied:
            self.copied.record(torch.cuda.current_stream(self.device))
