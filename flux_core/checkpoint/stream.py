"""Copy bytes of files to a device at the speed of its bus: threads read ahead into pinned memory.

A copy out of a mapped file waits for one thread that faults in page after page, and goes through pinned memory of the
driver's own. Here threads read into pinned memory themselves, and the device copies from it while they read on.

The bytes of all tensors, in the order of the requests, are cut into chunks of equal size: a chunk has a part of a
large tensor, or many small tensors. A thread reads a chunk into a buffer; from there it is copied into its
tensors. The copies are queued on the device's current stream with all other work, so memory that torch's allocator
reuses is free by then, and an event behind a buffer's last copy says when the buffer may be filled again.
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
"""of a chunk each: 256 MiB, which torch keeps for the next file, as pinning is slow"""
THREADS = 12
"""readers: a core copies a few GB/s out of the page cache; disks and networks are faster with many requests at once"""


@contextmanager
def stream_to_device(spans: Iterable[Span], device: torch.device) -> Iterator[Callable[[Tensor], Tensor]]:
    """A context with a function that fills a tensor on `device` with the next bytes of the spans. FileError."""
    pieces = list(chunks(spans))
    results: list[SimpleQueue[Buffer | BaseException]] = [SimpleQueue() for _ in pieces]
    todo = deque(zip(pieces, results, strict=True))
    free: SimpleQueue[Buffer | None] = SimpleQueue()
    device = torch.empty(1, dtype=torch.uint8, device=device).device  # makes CUDA's context before threads need it

    def read_on() -> None:
        """Read chunks until none is left. A buffer is taken before a chunk, so the next chunk always has a buffer."""
        while buffer := free.get():
            try:
                chunk, result = todo.popleft()
            except IndexError:
                return
            try:
                buffer.read(chunk)
                result.put(buffer)
            except BaseException as error:
                result.put(error)

    def stop() -> None:
        todo.clear()
        for _ in range(THREADS):
            free.put(None)

    def arriving() -> Iterator[Buffer]:
        """The chunks in order. A buffer returns to the readers when the next is requested."""
        for result in results:
            buffer = result.get()
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
            target, done = tensor.reshape(-1).view(torch.uint8), 0
            while done < len(target):
                if start == end:
                    buffer = next(buffers)
                    memory, start, end = buffer.memory, 0, buffer.end
                count = min(len(target) - done, end - start)
                target[done : done + count].copy_(memory[start : start + count], non_blocking=True)
                done, start = done + count, start + count
            return tensor

        yield fill


def chunks(spans: Iterable[Span]) -> Iterator[list[Span]]:
    """The spans, cut and gathered into lists of CHUNK bytes; the last may have fewer."""
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
    """Pinned memory for a chunk, with its own handles to the files, so that no other thread moves their positions."""

    def __init__(self, paths: Iterable[Path], device: torch.device, stack: ExitStack) -> None:
        self.files = {path: stack.enter_context(open_file(path)) for path in paths}
        self.device = device
        self.copied = torch.cuda.Event(blocking=True) if device.type == "cuda" else None
        self.memory = torch.empty(0, dtype=torch.uint8, device="cpu")
        self.end = 0
        """bytes of the chunk in it"""

    def read(self, chunk: list[Span]) -> None:
        """Fill the memory with a chunk's bytes, once those before them have been copied. FileError."""
        if not len(self.memory):  # pinning takes milliseconds, while other threads read
            self.memory = torch.empty(CHUNK, dtype=torch.uint8, device="cpu", pin_memory=self.copied is not None)
            self.view = self.memory.numpy().data
        elif self.copied:
            self.copied.synchronize()
        self.end = 0
        for path, start, stop in chunk:
            begin, self.end = self.end, self.end + stop - start
            read_into(self.view[begin : self.end], self.files[path], path, start)

    def release(self) -> None:
        """Mark that the last copy out of the memory has been queued."""
        if self.copied:
            self.copied.record(torch.cuda.current_stream(self.device))
