"""What an intervention becomes when its names and steps are resolved: functions that stand at a seam.

Four things can stand somewhere in a forward, and these are all of them:

- `Around` stands around a block: it calls it, or does not.
- `Write` stands at a site, or in the place of a block's attention, and returns what goes on from there.
- `Read` sees the values of one or several sites of a block when the block is done, and changes nothing.
- `End` is called when the run is over.

A Write inside a block whose function is `traceable` becomes part of the block's compiled graph. It is called with its
`args`, tensors that may differ from block to block and from step to step without another graph. Any other function is
called with an `At`, which says where and when; a block with such a function inside runs eagerly. Reads never do: they
are called after the block, on what it let out.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class At:
    """Where and when a function is called."""

    name: str
    """the block or the site"""
    step: int
    sigma: float
    call: int
    """forwards of this step before this one: 1 for the second pass of two-pass guidance"""
    txt_len: int
    """text tokens: a joined sequence holds them first"""
    branches: tuple[str, ...]
    """names of the batch's rows: row = image * len(branches) + branch"""


@dataclass(frozen=True)
class Around:
    """`fn(call, x, at)`; x and the result are (img, txt) in a double block, the joined sequence in a single one."""

    block: str
    fn: Callable[[Callable[[Any], Any], Any, At], Any]


@dataclass(frozen=True)
class Write:
    """`fn(x, at)`, or `fn(x, *args)` where traceable; at a block's `attend`: `fn(attend, q, k, v, …)`."""

    site: str
    fn: "Callable[..., Tensor]"
    args: "tuple[Tensor, ...]" = ()
    traceable: bool = False


@dataclass(frozen=True)
class Read:
    """`fn(at, *values)`; the sites are of one block, or of the whole forward and then one."""

    sites: tuple[str, ...]
    fn: Callable[..., None]


@dataclass(frozen=True)
class End:
    """`fn()`"""

    fn: Callable[[], None]


Placed = Around | Write | Read | End
ATTEND = "attend"


def traceable(fn: "Callable[..., Tensor]") -> "Callable[..., Tensor]":
    """Mark a function of tensors as fit for a compiled block: no printing, no state, no Python values that change."""
    fn.traceable = True  # type: ignore[attr-defined]
    return fn
