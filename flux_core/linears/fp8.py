"""A Linear in eight bits: e4m3 weights with a scale for each row, and inputs quantized token by token.

The idea. A FLUX.1 step at a megapixel is bound by matrix products, and a card with fp8 units multiplies e4m3 numbers
about twice as fast as bf16. e4m3 has a sign, four bits of exponent and three of mantissa: 448 is its largest number and
2^-9 its smallest, too narrow a range for numbers as they come. So each row is first stretched to fill it:

    s_n = max_k |w_nk| / 448        c_nk = e4m3(w_nk / s_n)        w_nk ~ c_nk s_n        (rows n of the weight, once)
    t_m = max_k |x_mk| / 448        d_mk = e4m3(x_mk / t_m)        x_mk ~ d_mk t_m        (tokens m, in every call)

and y_mn = t_m s_n sum_k(d_mk c_nk) + b_n. The scales stand outside of the sum, so the product runs in fp8, with scales
and bias in its last step: `torch._scaled_mm`, out in bf16.

The error. Three bits of mantissa round a number by at most 2^-4 of itself, and one below 2^-6 s_n (a 28,672nd of its
row's largest) by at most 2^-10 s_n. In the mean (rms) that is about 2.5 %; the errors in a row are independent, so a
product of random numbers is off by as much for the weights and by 3.5 % for both sides, however long the row. Fast
accumulation, which sums with fewer bits than fp32, is far below that.

The trade-off. A scale for each row and token costs no time over one for the whole tensor, and an outlier spoils its own
row only; a scale for each block of 128 would be finer, and slower. Scales of tokens are found in every call, one pass
over x where no kernel did it before (`product` takes what one has quantized). Static scales from a calibration would
save the pass and clip what was not calibrated for, so those in ComfyUI's files are not used.

Where a device has no fp8 units the weights are widened in the forward, w = c s, and the product runs in the dtype of x:
as small in memory, no faster. Then only the weights are rounded.

Not here: fp8 attention, training, e5m2 (which has the range of gradients), other blocks than rows.
"""

from collections.abc import Callable
from fnmatch import fnmatch
from functools import cache
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max
"""448"""

BF16 = {
    "img_in": "64 features of each token: under 0.1 % of the arithmetic, and every pixel comes through it",
    "txt_in": "once a step, and all that the picture knows of its prompt comes through it",
    "time_in.*": "one vector a step, not a row of tokens: nothing to win",
    "guidance_in.*": "the same",
    "vector_in.*": "the same",
    "*_mod.lin": "the same vector; what it gives scales every token of its block, and a table takes its place",
    "*.modulation.lin": "the same in the single blocks",
    "final_layer.*": "64 features of each token, and nothing behind it corrects them",
}
"""Linears of the transformer that stay in bf16, by patterns of their names, and why"""


def stays_bf16(name: str) -> bool:
    """Whether the Linear of that name is among `BF16`."""
    return any(fnmatch(name, pattern) for pattern in BF16)


class QuantizedTokens(NamedTuple):
    """Quantized tokens, x ~ codes * scale: what an Fp8Linear takes in the place of x, where a kernel made them."""

    codes: Tensor
    """e4m3 [..., K]"""
    scale: Tensor
    """fp32 [..., 1]"""


def quantize_rows(x: Tensor) -> QuantizedTokens:
    """x [..., K], row by row."""
    # By the reciprocal, written out: CUDA divides by a Python number so, the CPU does not, and a file that one of them
    # wrote shall hold what the other computes.
    scale = x.abs().amax(dim=-1, keepdim=True).float().clamp(min=1e-12) * (1 / LARGEST)
    return QuantizedTokens((x / scale).to(E4M3), scale)  # the quotient is fp32, like the scale


def dequantize(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight that codes [N, K] and the scales of their rows [N] stand for, rounded once."""
    return (codes.float() * scale[:, None]).to(dtype)


@cache
def has_fp8_units(device: torch.device) -> bool:
    """Whether the device multiplies e4m3 rows by their scales in hardware: tried, and held against fp64."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        return False  # the CPU knows the function, and computes it as slowly as it can
    draw = torch.Generator("cpu").manual_seed(0)  # its own: nobody's seed shall depend on this
    x, weight, bias = (
        torch.randn(size, generator=draw, dtype=torch.float32, device="cpu").to(device)
        for size in ((32, 64), (48, 64), (48,))
    )
    try:
        found = scaled_product(*quantize_rows(x), *quantize_rows(weight), bias.bfloat16())
    except (RuntimeError, NotImplementedError, ValueError):
        return False
    exact = x.double() @ weight.double().t() + bias.double()
    return bool((found.double() - exact).norm() < 0.1 * exact.norm())


def scaled_product(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """e4m3 [M, K] with [M, 1] and e4m3 [N, K] with [N, 1] -> bf16 [M, N]."""
    scales = {"scale_a": x_scale, "scale_b": weight_scale.t()}
    return torch._scaled_mm(x, weight.t(), **scales, bias=bias, out_dtype=torch.bfloat16, use_fast_accum=True)


class Fp8Linear(nn.Module):
    """Takes the place of an nn.Linear, whose `weight` and `bias` it has by the same names."""

    weight_scale: Tensor
    quantize: Callable[[Tensor], QuantizedTokens] = staticmethod(quantize_rows)
    """a kernel may take its place"""

    def __init__(self, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> None:
        """weight: e4m3 [N, K]; weight_scale: fp32 [N]; bias: [N] in the dtype that the model computes in."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("weight_scale", weight_scale)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.choose_matmul()

    @classmethod
    def of(cls, linear: nn.Linear) -> Self:
        """The same Linear, quantized; on `meta` one that waits for its numbers."""
        weight = linear.weight.detach()
        if weight.is_meta:  # where arithmetic takes longer than reading the numbers will
            codes, scale = torch.empty_like(weight, dtype=E4M3), weight.new_empty(len(weight), dtype=torch.float32)
        else:
            codes, scale = quantize_rows(weight)
        return cls(codes, scale.flatten(), None if linear.bias is None else linear.bias.detach())

    def forward(self, x: Tensor | QuantizedTokens) -> Tensor:
        """[..., K] -> [..., N]"""
        if isinstance(x, QuantizedTokens):
            return self.product(x)
        if self.scaled:
            return self.product(self.quantize(x))
        return F.linear(x, dequantize(self.weight, self.weight_scale, x.dtype), self.bias)

    def product(self, x: QuantizedTokens) -> Tensor:
        """The forward of quantized rows -> bf16 [..., N]."""
        rows = x.codes.reshape(-1, self.in_features), x.scale.reshape(-1, 1)
        y = scaled_product(*rows, self.weight, self.weight_scale[:, None], self.bias)
        return y.reshape(*x.codes.shape[:-1], self.out_features)

    def scales_on(self, device: torch.device) -> bool:
        """Whether its product can run in fp8 there. The units take sides that are multiples of 16."""
        return self.in_features % 16 == self.out_features % 16 == 0 and has_fp8_units(device)

    def choose_matmul(self) -> None:
        """Decide how to multiply where the weights are now: for whoever puts others in their place."""
        self.scaled = self.scales_on(self.weight.device)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.choose_matmul()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """A move of the model moves all; a cast is for the layers around: codes and scales mean nothing in bf16."""
        kept = {"weight": self.weight.data, "weight_scale": self.weight_scale.data}
        super()._apply(fn, recurse)
        for name, old in kept.items():
            if (new := getattr(self, name)).dtype != old.dtype:
                new.data = old.to(new.device)
        self.choose_matmul()
        return self

    def extra_repr(self) -> str:
        how = "scaled" if self.scaled else "weight only"
        return f"in_features={self.in_features}, out_features={self.out_features}, {how}"


def quantize(model: nn.Module) -> frozenset[str]:
    """Put an Fp8Linear in the place of every Linear that is not among `BF16`, one by one. Returns their names."""
    linears = {name: one for name, one in model.named_modules() if isinstance(one, nn.Linear) and not stays_bf16(name)}
    names = frozenset(linears)
    while linears:  # each is let go before the next
        name, linear = linears.popitem()
        model.set_submodule(name, Fp8Linear.of(linear))
    return names


def is_quantized(model: nn.Module) -> bool:
    """Whether any Linear of it is an Fp8Linear."""
    return any(isinstance(one, Fp8Linear) for one in model.modules())
