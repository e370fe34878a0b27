"""What an intervention becomes once its names and steps are resolved: functions called at points of a forward.

There are four kinds, and no others:

- `Around` wraps a block: its function calls the block, or does not.
- `Write` replaces the value at a site, or a block's attention, by what its function returns.
- `Read` gets the values of one or several sites of a block when the block is done, and changes nothing.
- `End` is called when the sampling ends, however it does.

A Write inside a block whose function is `traceable` becomes part of the block's compiled graph. It is called with its
`args`, tensors that may differ from block to block and from step to step without another graph. Any other function is
called with an `At`, its place and time; a block with such a function inside runs eagerly. Reads never cause that: they
are called after the block, with values that the block returned.

What a function returns has the shape, dtype and device of what it replaces, else it is a HookError.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class At:
    """Place and time of a call."""

    name: str
    """the block or the site"""
    step: int
    sigma: float
    call: int
    """forwards of this step before the current: 1 in the second pass of two-pass guidance, or at a midpoint"""
    txt_len: int
    """number of text tokens, which come first in a joined sequence"""
    branches: tuple[str, ...]
    """names of the batch's rows: row = image * len(branches) + branch"""
    num_steps: int = 1
    """of the schedule; `step` counts from 0 to the last of them"""
    image: int = 0
    """pictures of the request before the current, or before the first of a batch's"""
    run: object = field(default=None, repr=False, compare=False)
    """the same in all calls of one run"""


@dataclass(frozen=True)
class About:
    """What a sampling was, for those who write it down."""

    sigmas: tuple[float, ...]
    branches: tuple[str, ...]
    passes: bool
    """whether each branch had a forward of its own"""
    request: str | None
    """the picture's request as JSON; None where the user sampled on his own"""


@dataclass(frozen=True)
class Around:
    """`fn(call, x, at)`; x and the result are (img, txt) in a double block, the joined sequence in a single block."""

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
    """`fn(at, *values)`; the sites are all of one block, or a single site of the whole forward.

    A block's own name stands for what the block returns, its `attend` for what attention returns.
    """

    sites: tuple[str, ...]
    fn: Callable[..., None]


@dataclass(frozen=True)
class End:
    """`finish(about)` when a sampling has ended, or failed; `discard()` instead where it ran out of memory, since then
    the picture is drawn again."""

    finish: Callable[[About], None]
    discard: Callable[[], None]


Placed = Around | Write | Read | End


def traceable(fn: "Callable[..., Tensor]") -> "Callable[..., Tensor]":
    """Mark a function of tensors as fit for a compiled block: no printing, no state, no Python values that change."""
    fn.traceable = True  # type: ignore[attr-defined]
    return fn
