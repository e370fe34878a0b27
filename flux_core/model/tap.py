"""The hook points inside a block: a tap receives each named value and returns the value to use.

A block calls `tap("img.q", img_q)` at a named value, and continues with the result. The default tap returns every value
unchanged, and leaves no trace in a compiled block. Other taps are in `flux_core.hooks`.
"""

from collections.abc import Callable

from torch import Tensor


class Tap:
    """The default tap: returns every value unchanged."""

    def __call__(self, site: str, x: Tensor) -> Tensor:
        """The value to use in place of x, which has that name in this block."""
        return x

    def joined(self, site: str, x: Tensor, dim: int) -> Tensor:
        """The same for the joined sequence, text first along `dim`: `txt.site` and `img.site` at once."""
        return x

    def attend(self, attend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of q, k, v [B, H, T + L, D] -> [B, T + L, H*D]."""
        return attend(q, k, v)


UNTOUCHED = Tap()
