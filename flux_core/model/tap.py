"""Where a block lets go of a value: the named places inside it, seen from the model's side.

A block calls `tap("img.q", img_q)` where a value has its name, and goes on with what comes back. The tap that stands
there by default gives everything back as it is, and a compiled block holds no trace of it. What else may stand there
is the business of `flux_core.hooks`.
"""

from collections.abc import Callable

from torch import Tensor


class Tap:
    """Leaves everything as it is."""

    def __call__(self, site: str, x: Tensor) -> Tensor:
        """A value that has a name in this block."""
        return x

    def joined(self, site: str, x: Tensor, dim: int) -> Tensor:
        """A value of the joined sequence, text first along `dim`: `txt.site` and `img.site` at once."""
        return x

    def attend(self, attend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The attention itself: q, k, v [B, H, T + L, D] -> [B, T + L, H*D]."""
        return attend(q, k, v)


UNTOUCHED = Tap()
