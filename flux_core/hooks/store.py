"""Where interventions keep tensors: in a dict of the user's, or in a safetensors file; and how files are read.

A key says when and where: `step.site`, or `step.forward.site` for a second forward of a step, and with several pictures
`image.step.forward.site` for all. A file holds one picture, or the rows of one batch.
"""

import json
import re
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple, Protocol
from weakref import WeakKeyDictionary

from ..errors import FileError, nearest
from ..files import disk_errors, publish, temporary_beside
from ..terminal import tell
from .seam import About, At

if TYPE_CHECKING:
    from torch import Tensor

DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip
"""torch's names of dtypes -> those of a safetensors header"""
METADATA = "flux_core"
"""the key of a header's metadata that holds a sampling as JSON"""


class Key(NamedTuple):
    """Which picture, step, forward of it, and site."""

    image: int
    step: int
    forward: int
    site: str

    @property
    def short(self) -> str:
        """Its text where there is one picture."""
        return f"{self.step}.{self.site}" if self.forward == 0 else f"{self.step}.{self.forward}.{self.site}"

    @property
    def full(self) -> str:
        return ".".join(map(str, self))

    @classmethod
    def of(cls, text: str) -> "Key | None":
        """From its text in either form; None for any other text."""
        found = re.fullmatch(r"(\d+)\.(?:(\d+)\.)?(?:(\d+)\.)?(\D.*)", text)
        if found is None:
            return None
        numbers = [int(part) for part in found.groups()[:3] if part is not None]
        image, step, forward = {1: [0, *numbers, 0], 2: [0, *numbers], 3: numbers}[len(numbers)]
        return cls(image, step, forward, found[4])


class Store(Protocol):
    """Takes tensors while a sampling runs."""

    def put(self, at: At, site: str, x: "Tensor") -> None: ...

    def finish(self, about: About) -> None:
        """After the sampling, however it ended."""

    def discard(self) -> None:
        """Forget what was put, since the picture is drawn again."""


class Part:
    """A run's part of a dict: one picture. Where it would overwrite something, it becomes a further picture."""

    def __init__(self, into: dict[str, "Tensor"]) -> None:
        self.into, self.image = into, 0
        self.mine: list[Key] = []
        self.places: set[tuple[Any, ...]] = set()
        """step, forward and site of each"""
        self.full = any(key is not None and text == key.full for text, key in ((text, Key.of(text)) for text in into))

    def put(self, at: At, site: str, x: "Tensor") -> None:
        if self.mine and self.mine[-1].short not in self.into:
            self.full = True  # another run has made the keys long
        key = Key(self.image, at.step, at.call, site)
        if key[1:] not in self.places:
            if key.full in self.into or (self.image == 0 and key.short in self.into):
                self._renumber(key)
            key = key._replace(image=self.image)
            self.mine.append(key)
            self.places.add(key[1:])
        self.into[key.full if self.full else key.short] = x

    def _renumber(self, key: Key) -> None:
        """Become the first picture in which nothing stands at these places. All keys become long ones."""
        for text in list(self.into):
            if (known := Key.of(text)) and text != known.full:
                self.into[known.full] = self.into.pop(text)
        wanted = [*self.mine, key]
        numbers = (n for n in count() if not any(k._replace(image=n).full in self.into for k in wanted))
        self.full, self.image, moved = True, next(numbers), []
        for old in self.mine:
            moved.append(old._replace(image=self.image))
            self.into[moved[-1].full] = self.into.pop(old.full)
        self.mine = moved

    def discard(self) -> None:
        for key in self.mine:
            self.into.pop(key.full, None)
            if key.image == 0:
                self.into.pop(key.short, None)
        self.mine, self.places = [], set()


_PARTS: "WeakKeyDictionary[object, dict[int, Part]]" = WeakKeyDictionary()
"""by run, and the dict's identity: what stores in one dict in one run is of one picture"""


class InDict:
    """A store that puts tensors in a dict of the user's."""

    def __init__(self, into: dict[str, "Tensor"]) -> None:
        self.into = into
        self.part: Part | None = None

    def put(self, at: At, site: str, x: "Tensor") -> None:
        parts = _PARTS.setdefault(at.run, {})
        self.part = parts.get(id(self.into)) or parts.setdefault(id(self.into), Part(self.into))
        self.part.put(at, site, x)

    def finish(self, about: About) -> None:
        pass

    def discard(self) -> None:
        if self.part is not None:
            self.part.discard()


class InFile:
    """A new safetensors file. Tensors are written beside it as they come, and the file appears whole at the end."""

    def __init__(self, path: Path, stream: bool) -> None:
        """stream: False keeps tensors in memory until then."""
        self.path, self.stream = path, stream
        self.held: dict[str, Tensor] = {}
        self.spans: dict[str, tuple[str, tuple[int, ...], int, int]] = {}
        """by key: dtype, shape, first byte, number of bytes"""
        self.spool: IO[bytes] | None = None

    def put(self, at: At, site: str, x: "Tensor") -> None:
        key = Key(0, at.step, at.call, site).short
        if self.stream:
            self._write(key, x)
        else:
            self.held[key] = x.to("cpu", copy=True)

    def _write(self, key: str, x: "Tensor") -> None:
        import torch

        data = x.detach().to("cpu").contiguous().flatten().view(torch.uint8).numpy().data
        with disk_errors(self.path, 'the plan\'s "to"'):
            if self.spool is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self.spool = _beside(self.path)
            first = self.spool.tell()
            self.spool.write(data)
        self.spans[key] = DTYPES[str(x.dtype).removeprefix("torch.")], tuple(x.shape), first, len(data)

    def finish(self, about: About) -> None:
        """Write the file, unless there is nothing to write, and print its path. DiskError."""
        try:
            for key, x in self.held.items():
                self._write(key, x)
            if self.spool is not None:
                with disk_errors(self.path, 'the plan\'s "to"'):
                    path = self._assembled(about, self.spool)
                tell(str(path))
        finally:
            self.discard()

    def _assembled(self, about: About, spool: IO[bytes]) -> Path:
        """The header, then the tensors, the widest numbers first, so that all of them are aligned."""
        order = sorted(self.spans, key=lambda key: -_width(self.spans[key][0]))
        header: dict[str, Any] = {"__metadata__": {METADATA: json.dumps(vars(about))}}
        end = 0
        for key in order:
            dtype, shape, _, size = self.spans[key]
            header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
            end += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        whole = _beside(self.path)
        try:
            with whole:
                whole.write(len(text).to_bytes(8, "little") + text)
                for key in order:
                    spool.seek(self.spans[key][2])
                    _copy(spool, whole, self.spans[key][3])
            return publish(Path(whole.name), self.path)
        finally:
            Path(whole.name).unlink(missing_ok=True)

    def discard(self) -> None:
        if self.spool is not None:
            with suppress(OSError):  # what it could not flush is not wanted
                self.spool.close()
            Path(self.spool.name).unlink(missing_ok=True)
        self.held, self.spans, self.spool = {}, {}, None


def _beside(path: Path) -> IO[bytes]:
    """A new file in the folder of another."""
    return temporary_beside(path.parent).open("x+b")


def _width(dtype: str) -> int:
    """Bits of a number."""
    return int(re.sub(r"\D", "", dtype) or 8)


def _copy(source: IO[bytes], target: IO[bytes], size: int) -> None:
    while size > 0:
        part = source.read(min(size, 1 << 24))
        target.write(part)
        size -= len(part)


# Reading ----------------------------------------------------------------------------------------------


class Captured:
    """A file of captured tensors, read site by site: `captured["vec"]`."""

    def __init__(self, path: Path, keys: list[Key], about: dict[str, Any]) -> None:
        self.path, self.keys, self.about = path, keys, about

    @property
    def sigmas(self) -> tuple[float, ...]:
        """The schedule; a step's forward is at its sigma, if a sampler did not go between."""
        return tuple(self.about.get("sigmas", ()))

    @property
    def branches(self) -> tuple[str, ...]:
        """Names of a value's rows: row = image * len(branches) + branch."""
        return tuple(self.about.get("branches", ()))

    @property
    def request(self) -> dict[str, Any] | None:
        """The fields of the picture's request, of a batch its first's; None where no picture was drawn."""
        text = self.about.get("request")
        return None if text is None else json.loads(text)

    @property
    def sites(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(key.site for key in self.keys))

    def steps(self, site: str) -> list[tuple[int, int]]:
        """Step and forward of each of the values that `captured[site]` stacks; of branches with passes, the first."""
        found = [(key.step, key.forward) for key in self.keys if key.site == site]
        return found[:: self._passes(len(found))]

    def _passes(self, forwards: int) -> int:
        """Forwards that one value is made of."""
        passes = len(self.branches) if self.about.get("passes") else 1
        return passes if passes and forwards % passes == 0 else 1

    def __getitem__(self, site: str) -> "Tensor":
        """The values at a site, in their order: [forwards, B, …], so [steps, B, …] where a step takes one forward.

        Branches that had forwards of their own are rows of B. FileError names the nearest site.
        """
        import torch

        keys = [key for key in self.keys if key.site == site]
        if not keys:
            raise FileError(f"{self.path} holds no site {site!r}.{nearest(site, self.sites)}")
        values = [read_tensor(self.path, key.short) for key in keys]
        passes = self._passes(len(values))
        return torch.stack([torch.cat(values[i : i + passes]) for i in range(0, len(values), passes)])


def load_capture(path: str | Path) -> Captured:
    """The file that a Capture wrote. FileError."""
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {}).get(METADATA, "{}"))
            keys = [key for text in file.keys() if (key := Key.of(text))]  # noqa: SIM118
    except (OSError, ValueError, SafetensorError) as error:
        raise FileError(f"{path}: could not be read as captured values: {error}") from None
    if not keys or not isinstance(about, dict):
        raise FileError(f"{path}: no captured values. Next: a file that a plan's capture wrote")
    return Captured(path, sorted(keys), about)


def read_tensor(path: Path, name: str) -> "Tensor":
    """A tensor of a safetensors file by name. FileError names the file and the nearest tensor."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            if name not in (known := list(file.keys())):
                raise FileError(f"{path} holds no tensor {name!r}.{nearest(name, known)}")
            return file.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise FileError(f"{path}: could not be read as safetensors: {error}") from None
