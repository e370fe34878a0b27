"""Read tensors by name, from safetensors or GGUF: mapped into memory, or read where a file can't be mapped.

Some network and merged file systems have no mmap (`os error 19`), Windows runs out of page file (1455), containers out
of address space (12). For CUDA nothing is mapped: `stream.py` reads ahead.
"""

import io
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from mmap import ACCESS_COPY, mmap

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..terminal import note
from .header import WEIGHT_DTYPES, Entry, Header, open_file, read_into
from .source import Source
from .stream import stream_to_device

DTYPES: dict[str, torch.dtype] = {word: getattr(torch, name) for word, name in WEIGHT_DTYPES.items()}
"""the dtypes that weights may have, by the file's name"""
READABLE = DTYPES | {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
}
"""and those of other tensors in files of text encoders: mostly positions"""
ROUND = 512
"""bytes: torch's allocator rounds up to a multiple of them on CUDA"""
SMALL = 2**30
"""bytes of a file below which tensors on the CPU get memory of their own. A mapped one begins wherever the header ends,
and CPU kernels round by alignment: the same weights in two files gave pictures that differed in a last bit."""


@contextmanager
def opened(source: Source, device: torch.device | str, names: Iterable[str]) -> Iterator[Callable[[str], Tensor]]:
    """A context with a function from names to tensors on `device`. FileError.

    names: all to be read, in that order, so that they can be read ahead.
    """
    if torch.device(device).type == "cuda":
        with streamed(source, device, names) as get:
            yield get
        return
    with _opened_all(source, device, in_place=False) as get:
        yield get


@contextmanager
def mapped(source: Source) -> Iterator[Callable[[str], Tensor]]:
    """`opened` for the CPU; tensors of small files are mapped, too, so they may begin anywhere."""
    with _opened_all(source, "cpu", in_place=True) as get:
        yield get


@contextmanager
def _opened_all(source: Source, device: torch.device | str, in_place: bool) -> Iterator[Callable[[str], Tensor]]:
    with ExitStack() as stack:
        getters: dict[str, Callable[[str], Tensor]] = {}
        for header in source.headers:
            getters |= dict.fromkeys(header.tensors, stack.enter_context(_opened(header, device, in_place)))
        yield lambda name: getters[name](name)


@contextmanager
def streamed(source: Source, device: torch.device | str, names: Iterable[str]) -> Iterator[Callable[[str], Tensor]]:
    """`opened` for CUDA: each tensor is read directly into new memory on the device, while threads read ahead."""
    names = list(names)
    order = iter(names)
    with stream_to_device([source.spans[name] for name in names], torch.device(device)) as fill:

        def get(name: str) -> Tensor:
            if name != (expected := next(order, None)):
                raise RuntimeError(f"{name} was asked for when {expected} was next")
            return fill(_empty(source.headers_of[name].tensors[name], device))

        yield get


def reserve(device: torch.device | str, sizes: Iterable[int]) -> None:
    """Make torch request CUDA memory for tensors of these sizes (bytes) at once: each request waits for pinning.

    The allocator keeps the freed block and cuts it. Where no block is so large, memory is requested for each tensor.
    """
    if torch.device(device).type != "cuda":
        return
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    whole = sum(-(-size // ROUND) * ROUND for size in sizes)
    with suppress(torch.OutOfMemoryError):
        torch.empty(max(0, whole - kept), dtype=torch.uint8, device=device)


@contextmanager
def _opened(header: Header, device: torch.device | str, in_place: bool) -> Iterator[Callable[[str], Tensor]]:
    """A context with that function for one file, mapped or read. Its header is sound, so errors are the mapping's."""
    if header.is_gguf:
        with _mapped_gguf(header, in_place) as get:
            yield lambda name: get(name).to(device)
        return
    try:
        mapped = safe_open(header.path, framework="pt", device=str(device))
    except (SafetensorError, OSError, RuntimeError) as error:
        note(f"{header.path.name} cannot be mapped into memory here ({error}); it is read instead")
        with open_file(header.path) as file:
            yield lambda name: _read_tensor(file, header, header.tensors[name]).to(device)
        return
    with mapped as opened:
        aligned = torch.device(device).type == "cpu" and header.size < SMALL and not in_place
        yield (lambda name: opened.get_tensor(name).clone()) if aligned else opened.get_tensor


@contextmanager
def _mapped_gguf(header: Header, in_place: bool) -> Iterator[Callable[[str], Tensor]]:
    """`_opened` for GGUF."""
    with open_file(header.path) as file:
        try:
            whole = torch.frombuffer(mmap(file.fileno(), 0, access=ACCESS_COPY), dtype=torch.uint8)
        except (OSError, ValueError) as error:
            note(f"{header.path.name} cannot be mapped into memory here ({error}); it is read instead")
            yield lambda name: _read_tensor(file, header, header.tensors[name])
            return

        def get(name: str) -> Tensor:
            entry = header.tensors[name]
            x = whole[entry.start : entry.end]
            stays = (in_place or header.size >= SMALL) and entry.start % 4 == 0  # files may be aligned to 1 byte
            x = x if stays else x.clone()
            return x.view(READABLE[entry.dtype]).view(entry.shape) if entry.dtype in READABLE else x

        yield get


def _empty(entry: Entry, device: torch.device | str) -> Tensor:
    """Memory for a tensor: in its shape and dtype, or where its numbers are in no dtype of torch's, for its bytes."""
    if entry.dtype not in READABLE:
        return torch.empty(entry.end - entry.start, dtype=torch.uint8, device=device)
    return torch.empty(entry.shape, dtype=READABLE[entry.dtype], device=device)


def _read_tensor(file: io.BufferedReader, header: Header, entry: Entry) -> Tensor:
    """A tensor in new memory, read from the file."""
    tensor = _empty(entry, "cpu")
    if tensor.numel():
        read_into(tensor.reshape(-1).view(torch.uint8).numpy().data, file, header.path, entry.start)
    return tensor
