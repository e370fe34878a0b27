"""A Linear in eight bits: e4m3 weights with a scale for each row, and inputs quantized token by token.

The idea. A FLUX.1 step at a megapixel is bound by matrix products, and a card with fp8 units multiplies e4m3 numbers
about twice as fast as bf16. e4m3 has a sign, four bits of exponent and three of mantissa: 448 is its largest number and
2^-9 its smallest, too narrow a range for numbers as they come. So each row is first stretched to fill it:

    s_n = max_k |w_nk| / 448        c_nk = e4m3(w_nk / s_n)        w_nk ~ c_nk s_n        (rows n of the weight, once)
    t_m = max_k |x_mk| / 448        d_mk = e4m3(x_mk / t_m)        x_mk ~ d_mk t_m        (tokens m, in every call)

and y_mn = t_m s_n sum_k(d_mk c_nk) + b_n. The scales are outside of the sum, so the product runs in fp8, with scales
and bias in its last step: `torch._scaled_mm`, out in bf16.

The error. Three bits of mantissa round a number by at most 2^-4 of itself, and one below 2^-6 s_n (a 28,672nd of its
row's largest) by at most 2^-10 s_n. In the mean (rms) that is about 2.5 %; the errors in a row are independent, so a
product of random numbers is off by as much for the weights and by 3.5 % for both sides, however long the row. Fast
accumulation, which sums with fewer bits than fp32, is far below that.

The trade-off. A scale for each row and token costs no time over one for the whole tensor, and an outlier spoils its own
row only; a scale for each block of 128 would be finer, and slower. Scales of tokens are found in every call, one pass
over x unless a kernel has quantized it before (`QuantizedTokens`). Static scales from a calibration
would save the pass and clip what was not calibrated for, so those in ComfyUI's files are not used.

Where a device has no fp8 units the weights are dequantized in the forward, w = c s, and the product runs in the dtype
of x: as small in memory, no faster. Then only the weights are rounded.

Gradients pass through to x, by codes and scales, so that layers below can be trained; the weights are frozen.

Not here: fp8 attention, training of the weights, e5m2 (which has the range of gradients), other blocks than rows.
"""

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatch
from functools import cache, partial
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..errors import is_out_of_memory
from .contract import Leaf, QuantizedTokens
from .frozen import Rows, Scaled

E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max
"""448"""
MARGIN = 16.0
"""by which tokens' codes stay below LARGEST where a branch's are behind them: numbers down to a 1792nd of the largest
keep their precision, where without it is a 28,672nd"""
Quantize = Callable[[Tensor], QuantizedTokens]
"""[..., K] -> e4m3 [..., K] with a scale for each token"""

BF16 = {
    "img_in": "64 features of each token: under 0.1 % of the arithmetic, and every pixel passes through it",
    "txt_in": "once a step, and all of the prompt's tokens pass through it",
    "time_in.*": "one vector a step, not all tokens: nothing to gain",
    "guidance_in.*": "the same",
    "vector_in.*": "the same",
    "*_mod.lin": "the same vector; its output scales every token of the block, and a table replaces it",
    "*.modulation.lin": "the same in the single blocks",
    "final_layer.*": "64 features of each token, and no later layer corrects them",
}
"""Linears of the transformer that stay in bf16, by patterns of their names, and why"""


def stays_bf16(name: str) -> bool:
    """Whether the Linear of that name stays in bf16 (`BF16`)."""
    return any(fnmatch(name, pattern) for pattern in BF16)


def quantize_rows(x: Tensor) -> QuantizedTokens:
    """x [..., K] in e4m3, with a scale for each row."""
    # The reciprocal is written out: CUDA divides by a Python number that way, the CPU does not, and a file written on
    # either must hold what the other computes.
    scale = x.abs().amax(dim=-1, keepdim=True).float().clamp(min=1e-12) * (1 / LARGEST)
    return QuantizedTokens((x / scale).to(E4M3), scale)  # the quotient is fp32, like the scale


def dequantize(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The dense weight, codes * scale, of e4m3 [N, K] and the scales of its rows [N], rounded once."""
    return (codes.float() * scale[:, None]).to(dtype)


def to_dense(
    tensors: Mapping[str, Tensor],
    shape: tuple[int, ...],
    details: Mapping[str, Any],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The numbers that codes and scales in a file stand for, rounded once. Scales are of the tensor, rows or blocks.

    tensors: "weight" in any dtype, and "weight_scale", if it has one.
    """
    weight, scale = tensors["weight"], tensors.get("weight_scale")
    if scale is None:
        return weight.to(dtype)
    if scale.numel() == 1:
        return (weight.float() * scale.float().reshape(())).to(dtype)
    blocks = scale.float().reshape(len(weight), -1, 1)
    return (weight.float().reshape(*blocks.shape[:2], -1) * blocks).reshape(shape).to(dtype)


@cache
def has_fp8_units(device: torch.device) -> bool:
    """Whether the device multiplies e4m3 rows by their scales in hardware: tried, and compared with fp64.

    Running out of memory in the trial is raised and not cached: the next call tries again.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        return False  # the CPU has the function, but it is slow
    draw = torch.Generator("cpu").manual_seed(0)  # leaves global seeds alone
    x, weight, bias = (
        torch.randn(size, generator=draw, dtype=torch.float32, device="cpu").to(device)
        for size in ((32, 64), (48, 64), (48,))
    )
    try:
        found = scaled_product(*quantize_rows(x), *quantize_rows(weight), bias.bfloat16())
    except (RuntimeError, NotImplementedError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        return False
    exact = x.double() @ weight.double().t() + bias.double()
    return bool((found.double() - exact).norm() < 0.1 * exact.norm())


def scaled_product(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """x @ weight.T for e4m3 [M, K] with scales [M, 1] and e4m3 [N, K] with scales [N, 1] -> bf16 [M, N]."""
    scales = {"scale_a": x_scale, "scale_b": weight_scale.t()}
    return torch._scaled_mm(x, weight.t(), **scales, bias=bias, out_dtype=torch.bfloat16, use_fast_accum=True)


def product_of_tokens(x: QuantizedTokens, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """x @ weight.T in fp8, for tokens [..., K] and e4m3 [N, K] with its scales [N] -> bf16 [..., N]."""
    rows = x.codes.reshape(-1, weight.shape[1]), x.scale.reshape(-1, 1)
    y = scaled_product(*rows, weight, weight_scale[:, None], bias)
    return y.reshape(*x.codes.shape[:-1], len(weight))


class Fp8Linear(Scaled, Leaf):
    """An nn.Linear in e4m3, with `weight` and `bias` under the same names; the weight is frozen."""

    quantize: Quantize = staticmethod(quantize_rows)
    """quantizes inputs that are not `QuantizedTokens`; a kernel may replace it"""

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
        """The Linear, quantized; on `meta` without values."""
        weight = linear.weight.detach()
        if weight.is_meta:  # where arithmetic would take longer than reading the values
            codes, scale = torch.empty_like(weight, dtype=E4M3), weight.new_empty(len(weight), dtype=torch.float32)
        else:
            codes, scale = quantize_rows(weight)
        return cls(codes, scale.flatten(), None if linear.bias is None else linear.bias.detach())

    @classmethod
    def read(
        cls,
        tensors: Mapping[str, Tensor],
        shape: tuple[int, ...],
        details: Mapping[str, Any],
        bias: Tensor | None,
    ) -> Self:
        """The layer of a file's codes in e4m3, and their scale: none, of the tensor, or of rows."""
        weight, scale = tensors["weight"], tensors.get("weight_scale")
        one = torch.ones(1, dtype=torch.float32, device=weight.device) if scale is None else scale.float()
        return cls(weight, one.flatten().expand(len(weight)).contiguous(), bias)

    @classmethod
    def joined(cls, parts: Sequence[Self], bias: Tensor | None) -> Self:
        """One layer of the rows of several."""
        codes = torch.cat([part.weight.detach().view(torch.uint8) for part in parts]).view(E4M3)
        return cls(codes, torch.cat([part.weight_scale for part in parts]), bias)

    def tensors(self) -> dict[str, Tensor]:
        """What a file gets for it, by the ending behind its name."""
        return {"weight": self.weight.detach(), "weight_scale": self.weight_scale}

    def forward(self, x: Tensor | QuantizedTokens) -> Tensor:
        """[..., K] -> [..., N]"""
        if isinstance(x, QuantizedTokens):
            return product_of_tokens(x, self.weight, self.weight_scale, self.bias)
        return self.multiply_rows(x)

    def multiply_rows(self, x: Tensor, rows: Rows = None) -> Tensor:
        """Those rows of its forward."""
        if not self.scaled:
            return self.multiply_widened(x, rows)
        return self.differentiable(x, partial(self.multiply, rows=rows), rows)

    def multiply(self, x: Tensor, rows: Rows = None) -> Tensor:
        """Its forward in fp8."""
        return product_of_tokens(self.quantize(x), *self.numbers(rows))

    def widen(self, dtype: torch.dtype) -> Tensor:
        """codes * scale"""
        return dequantize(self.weight, self.weight_scale, dtype)

    def has_units(self, device: torch.device) -> bool:
        return has_fp8_units(device)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {'scaled' if self.scaled else 'weight only'}"
