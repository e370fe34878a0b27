"""The inputs of a velocity, and conditions that extend them: by tensors, or by hooks in the forward (a run).

Text-to-image has a prompt and a guidance for each row. Fill, Canny and Depth add channels to the image tokens, Kontext
adds tokens after them, Redux adds tokens to the text, a ControlNet adds residuals after the blocks. Each is a
`Condition`: a function of the inputs, and a run where it works inside the forward.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from ..model.blocks import DoubleStreamBlock, SingleStreamBlock
from ..sampling import FlowInputs, SampledRun, SeesLatents


class Condition(Protocol):
    """A further condition of a picture. Both methods are called before a sampling.

    One that adds tokens to the sequence says how many in `extra_tokens`, and one with a network of its own has it as
    `net`: memory is planned for both.
    """

    def apply(self, inputs: FlowInputs, size: tuple[int, int]) -> FlowInputs:
        """The inputs extended by this condition. size: width and height in pixels, multiples of 16."""
        ...

    def run(self, inputs: FlowInputs) -> SampledRun | None:
        """The hooks of this condition in every forward, or None. inputs: after `apply`, for positive prompts alone."""
        ...


def tokens_added(conditions: Sequence[Condition]) -> int:
    """Those that conditions add to the sequence."""
    return sum(getattr(condition, "extra_tokens", 0) for condition in conditions)


def bytes_beside(conditions: Sequence[Condition]) -> int:
    """Bytes of the networks that conditions bring along (`net`), each counted once."""
    nets = {net for condition in conditions if isinstance(net := getattr(condition, "net", None), nn.Module)}
    return sum(p.nbytes for net in nets for p in net.parameters())


def conditioned(
    inputs: FlowInputs,
    conditions: Sequence[Condition],
    size: tuple[int, int],
    run: SampledRun | None,
    positive: FlowInputs | None = None,
) -> tuple[FlowInputs, SampledRun | None]:
    """The inputs extended by all conditions, and the runs of plan and conditions, composed.

    positive: the inputs of the positive prompts, if others are among `inputs`: the runs of conditions are for these.
    """
    extended = _extended(inputs, conditions, size)
    seen = extended if positive is None else _extended(positive, conditions, size)
    return extended, compose([run, *(condition.run(seen) for condition in conditions)])


def _extended(inputs: FlowInputs, conditions: Sequence[Condition], size: tuple[int, int]) -> FlowInputs:
    for condition in conditions:
        inputs = condition.apply(inputs, size)
    return inputs


def compose(runs: Sequence[SampledRun | None]) -> SampledRun | None:
    """The runs as a single run; None if there is none."""
    given = [run for run in runs if run is not None]
    return ComposedRun(given) if len(given) > 1 else next(iter(given), None)


class ComposedRun:
    """Nested runs: the first is next to the blocks, and only it may reach inside them by a tap."""

    def __init__(self, runs: Sequence[SampledRun]) -> None:
        self.runs = tuple(runs)

    @property
    def needs_vec(self) -> bool:
        return any(run.needs_vec for run in self.runs)

    def begin(self, sigma: float) -> None:
        for run in self.runs:
            run.begin(sigma)

    def see(self, x: Tensor, sigmas: Sequence[float]) -> None:
        for run in self.runs:
            if isinstance(run, SeesLatents):
                run.see(x, sigmas)

    def value(self, name: str, x: Any) -> Any:
        for run in self.runs:
            x = run.value(name, x)
        return x

    def double_block(
        self, name: str, block: DoubleStreamBlock, img: Tensor, txt: Tensor, mods: Any, pe: Tensor
    ) -> tuple[Tensor, Tensor]:
        def around(run: SampledRun, inner: Callable[..., Any]) -> Callable[..., Any]:
            return lambda img, txt, *rest: run.double_block(name, inner, img, txt, rest[:-1], rest[-1])  # type: ignore[arg-type]

        return self._nested(block, around)(img, txt, *mods, pe)

    def single_block(
        self, name: str, block: SingleStreamBlock, x: Tensor, txt_len: int, mods: Any, pe: Tensor
    ) -> Tensor:
        def around(run: SampledRun, inner: Callable[..., Any]) -> Callable[..., Any]:
            return lambda x, *rest: run.single_block(name, inner, x, txt_len, rest[:-1], rest[-1])  # type: ignore[arg-type]

        return self._nested(block, around)(x, *mods, pe)

    def _nested(self, block: Callable[..., Any], around: Callable[..., Callable[..., Any]]) -> Callable[..., Any]:
        for run in self.runs:
            block = around(run, block)
        return block
