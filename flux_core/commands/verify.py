"""`verify FILE`: check that a file of weights is complete and all its numbers are finite."""

from pathlib import Path

from tqdm import tqdm

from ..checkpoint.adapters import is_idle_alpha
from ..checkpoint.contents import find_storage
from ..checkpoint.source import find_source
from ..errors import FileError
from ..terminal import no_bars, tell


def verify(file: str) -> str:
    """A line that says a file or folder of shards is sound. FileError names the first tensors with NaN or infinity."""
    source = find_source(Path(file))

    import torch

    from ..checkpoint.read import dense
    from ..checkpoint.tensors import opened

    storage, bad = find_storage(source), []
    with (
        opened(source, "cpu", storage.among(source.shapes)) as get,
        tqdm(total=source.size, unit="B", unit_scale=True, desc="verifying", disable=no_bars()) as bar,
    ):
        for name, header in source.headers_of.items():
            if name not in storage.names:  # which are seen with their weight
                x = dense(get, name, storage, torch.float32) if name in storage.of else get(name)
                idle = is_idle_alpha(name, source.shapes)
                if x.is_floating_point() and not x.float().isfinite().all() and not idle:
                    bad.append(name)
            bar.update(header.tensors[name].end - header.tensors[name].start)
    if bad:
        listed = ", ".join(bad[:5]) + (", …" if len(bad) > 5 else "")
        raise FileError(f"{file}: {len(bad)} tensor(s) hold NaN or infinity ({listed}). Next: fetch the file again.")
    return f"{file}: {len(source.shapes):,} tensors, {source.size:,} bytes, whole and finite"


def print_verdict(file: str) -> None:
    """Print the result of `verify`."""
    tell(verify(file))
