"""Functions from a user's Python files: loaded from his own command line or plan, and named by the file's hash.

`pinned` reads the file behind `my.py:brighter` and runs it, once. From then on an entry of a plan says `my.py:brighter`
and the file's SHA-256, and is plain data that a picture can carry. `function_of` finds the function among the files
that this process has loaded so; nothing else loads one. So what a picture, a job or a session says can name a file's
hash, and never cause it to be run.
"""

import hashlib
import re
import sys
import traceback
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import Field, model_validator

from ..errors import FileError, UsageError, nearest
from ..files import user_path
from ..params import FluxParams
from ..terminal import one_line
from .intervention import Intervention
from .seam import Placed

Entry = TypeVar("Entry", bound="OfPython")
_LOADED: dict[str, ModuleType] = {}
"""by SHA-256"""
_REFUSED: ContextVar[str] = ContextVar("refused", default="")
"""what speaks at present, if not the user"""


@contextmanager
def no_code(what: str) -> Iterator[None]:
    """A context in which no Python file is run, since `what` asks for it, and not the user."""
    before = _REFUSED.set(what)
    try:
        yield
    finally:
        _REFUSED.reset(before)


class OfPython(Intervention):
    """Base of interventions whose function may come from a file."""

    fn: Callable[..., Any] | Annotated[str, Field(min_length=1)]
    """a function, or `FILE.py:NAME`; in a record the file's own name"""
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None
    """of the file. With it this is a record, and the file is known by this hash alone"""

    @property
    def is_record(self) -> bool:
        return isinstance(self.fn, str) and self.sha256 is not None and not re.search(r"[/\\]", self.fn)

    @property
    def portable(self) -> bool:
        return self.is_record

    @property
    def is_code(self) -> bool:
        return not isinstance(self.fn, str)

    @property
    def is_missing(self) -> bool:
        """Whether its file was not given to this process."""
        return isinstance(self.fn, str) and self.sha256 is not None and self.sha256 not in _LOADED

    @property
    def function(self) -> Callable[..., Any]:
        """The function itself. UsageError where its file was not given to this process."""
        return function_of(self.fn, self.sha256) if isinstance(self.fn, str) else self.fn

    @property
    def called(self) -> str:
        """The function's name, for people."""
        if isinstance(self.fn, str):
            return one_line(self.fn)
        return getattr(self.fn, "__name__", type(self.fn).__name__)

    @property
    def label(self) -> str:
        return self.called


class Python(OfPython):
    """`{"kind": "python", "fn": "my_method.py:plan"}`: the interventions that `plan(params)` returns, in its place.

    It is called for each picture, so that state of its own is fresh. params: the model's sizes, `flux_core.params`.
    """

    kind: Literal["python"] = "python"

    @model_validator(mode="after")
    def _of_its_own(self) -> Self:
        if self.steps is not None or self.follow:
            raise ValueError("what the function returns has steps and follow of its own")
        return self

    def interventions(self, params: FluxParams) -> tuple[Intervention, ...]:
        """What the function returns, as a plan. HookError for what is none."""
        from .plan import from_python

        return from_python(self.function, self.called, params)

    def place(self, params: FluxParams, branches: tuple[str, ...]) -> list[Placed]:
        return []  # what it returns takes its place (`plan.expanded`)


def pinned(entry: Entry) -> Entry:
    """The entry as a record, once its file was loaded. FileError, UsageError. Only for what the user himself named."""
    if not isinstance(entry.fn, str):
        return entry
    if entry.is_record and entry.sha256 in _LOADED:
        return entry
    path, name = file_and_name(entry.fn, "plan" if isinstance(entry, Python) else None)
    sha256 = load(path, entry.sha256 and [entry.sha256])
    if entry.sha256 not in (None, sha256):
        raise UsageError(f"{path} is not the file of that SHA-256: it has {sha256[:12]}…, not {entry.sha256[:12]}…")
    record = entry.model_copy(update={"fn": f"{path.name}:{name}", "sha256": sha256})
    function_of(str(record.fn), sha256)
    return record


_NAMED = re.compile(r"(.+\.py)(?::(\w+))?")


def is_python(text: str) -> bool:
    """Whether a text names a Python file, or a function of one: `my.py`, `my.py:brighter`."""
    return _NAMED.fullmatch(text) is not None


def file_and_name(text: str, default: str | None = None) -> tuple[Path, str]:
    """`my.py:brighter` -> its path and name. default: the name where there is none. UsageError."""
    found = _NAMED.fullmatch(text)
    if found is None or not (found[2] or default):
        raise UsageError(
            f"{text[:80]!r} names no function of a Python file. Next: write FILE.py:NAME, as in my.py:brighter"
        )
    return user_path(found[1]), found[2] or str(default)


def load(path: Path, among: Collection[str] | None = None) -> str:
    """Run a Python file, unless it was, and return its SHA-256. FileError, UsageError.

    among: the only ones that are run. Its folder is where it finds other modules, which the hash does not cover.
    """
    if what := _REFUSED.get():
        raise UsageError(f"{what} cannot make us run {path}. Next: name it on the command line")
    try:
        data = path.read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise FileError(f"{path}: the Python file could not be read: {reason}") from None
    sha256 = hashlib.sha256(data).hexdigest()
    if sha256 not in _LOADED and (among is None or sha256 in among):
        _LOADED[sha256] = _run(data, path, f"{path.stem}_{sha256[:8]}")
    return sha256


def _run(data: bytes, path: Path, name: str) -> ModuleType:
    module = ModuleType(name)
    module.__file__ = str(path)
    sys.modules[name] = module  # where dataclasses look
    if (folder := str(path.resolve().parent)) not in sys.path:
        sys.path.append(folder)
    try:
        exec(compile(data, str(path), "exec"), module.__dict__)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        if isinstance(error, SyntaxError):
            where, text = error.lineno, error.msg
        else:
            lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
            where, text = (lines or [0])[-1], str(error)
        raise UsageError(f"{path}, line {where}: {type(error).__name__}: {text}") from error
    return module


def function_of(fn: str, sha256: str | None) -> Callable[..., Any]:
    """The function of a record. UsageError where its file was not loaded, or has no such function."""
    file, _, name = fn.rpartition(":")
    if sha256 not in _LOADED:
        which = f" (SHA-256 {sha256[:12]}…)" if sha256 else ""
        raise UsageError(f"{one_line(fn)}{which} is code of your own, and was not given. Next: --hook {one_line(file)}")
    own = {key: value for key, value in vars(_LOADED[sha256]).items() if _is_own(value, _LOADED[sha256])}
    if name not in own:
        raise UsageError(f"{one_line(file)} has no function {name[:60]!r}.{nearest(name, own)}")
    return own[name]


def _is_own(value: Any, module: ModuleType) -> bool:
    """Whether a value can be called, and is no function or class that the file imports: a record may name any."""
    imported = isinstance(value, FunctionType | BuiltinFunctionType | type) and value.__module__ != module.__name__
    return callable(value) and not imported


def reads_only(fn: Callable[..., Any]) -> bool:
    """Whether a function is a reader, by its first argument: `look(at, x)`, where a writer is `brighter(x, at)`."""
    code = getattr(fn, "__code__", None)
    return code is not None and code.co_argcount > 0 and code.co_varnames[0] == "at"
