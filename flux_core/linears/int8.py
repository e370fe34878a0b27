"""A Linear in eight bits: int8 weights with a scale for each row, and inputs rotated and quantized token by token.

The idea. int8 has 255 numbers at equal distances. A row of a transformer has a few large numbers, which set the scale,
and many small ones, which then share a few of the codes. An orthogonal R of the features changes no product,
x W^T = (x R) (W R)^T, and may spread the large numbers over all of them:

    s_n = max_k |(W R)_nk| / 127        c_nk = round((W R)_nk / s_n)        W R ~ c s        (rows n, once)
    t_m = max_k |(x R)_mk| / 127        d_mk = round((x R)_mk / t_m)        x R ~ d t        (tokens m, in every call)

and y_mn = t_m s_n sum_k(d_mk c_nk) + b_n. The sum is of integers, exact in int32; scales and bias are its last step.
R is block-diagonal, a block for each group of 256 features: the fourth Kronecker power of

    H4 = 1/2 [[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]],

a Hadamard matrix with equal sums of rows (ConvRot, arXiv 2512.03673). It is symmetric, so R R = 1, and rotating again
undoes it. A product with it is four stages of additions, as in a fast Fourier transform.

The error. A rotated number is the sum of 256 with signs, over 16, and so near-Gaussian whatever the row was like. The
largest of a few thousand is about four times their root of the mean square r, so steps are r / 30, and rounding to the
nearest is off by a step / sqrt(12), 0.9 % of r. e4m3 rounds each number by 2.6 % of itself, and no rotation changes
that: it pays for equal steps only. Measured on flux-mini with both sides quantized, of the squared error of its
velocity in fp8 (`fp8.py`): rotated int8 0.09, int8 without rotation 0.23, fp8 with rotation 1.11.

The trade-off. Cards multiply int8 from Turing on, fp8 from Ada on. Where both are there int8 is the slower one: cuBLAS
has no int8 product with scales of rows, and the rotation is ten additions for each number, or a product with a matrix
of signs, where a kernel quantizes. On an H200 a step takes 0.77 of one in bf16, in fp8 0.69; products alone, by the
Triton kernel (`kernels/int8_product.py`), are as fast as cuBLAS's in fp8. Without Triton it is `torch._int_mm`, whose
sums are written and read again.

Where a device has no int8 units, tokens are rotated, and multiplied by the rotated weights, codes * scale, in the dtype
of x: as small in memory, no faster. Then only the weights are rounded.

Gradients pass to x as (g W R) R: by the rotated weights, and the product is rotated back, which has as many rows as
there are tokens. Rotating W back would be four stages of additions over all weights in every backward.

Precision. The rotation runs in fp32, in the order of ComfyUI's CUDA kernel for fp32 weights (comfy-kitchen,
`int8_linear.cu`): stages with strides 1, 4, 16 and 64, each sum from left to right. So a file has the same bits
wherever it was written. A matrix product with R, as in ComfyUI without CUDA, sums in an order that libraries choose.
Then the scale of one row in a hundred differs in its last bit; no code of flux-mini's 15 million does, in either, from
those of fp64. A rotation of codes is exact in any order: the sums are whole numbers of sixteenths below 2^15.

The file is ComfyUI's format `int8_tensorwise`, whose scales are those of rows all the same. Its fixed name for a row's
scale is `weight_scale` [N, 1]; `comfy_quant` holds JSON with the group.

Not here: int8 attention, static scales, codes below eight bits, rotations that are folded into other layers.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import is_out_of_memory
from .contract import Leaf, QuantizedTokens
from .frozen import Rows, Scaled

GROUP = 256
"""features that are rotated together, where their number divides by it"""
LARGEST = 127
"""of the codes"""
SMALLEST = 1e-30
"""of the scales, for rows of zeros; ComfyUI's"""
FORMAT = "int8_tensorwise"
"""ComfyUI's name of the format"""

ON_CPU, ELSEWHERE = 2**11, 2**15
"""groups that are rotated at a time: there they stay in the cache, here 33 MB bound what each operation leaves"""
ROWS_AT_A_TIME = 2048
"""of a product whose sums are written before they are scaled: they take four bytes each"""
FEWEST_ROWS = 32
"""that cuBLAS multiplies in int8; a multiple"""

Quantize = Callable[[Tensor, int], QuantizedTokens]
"""[..., K] and a group -> int8 [..., K] with a scale for each token"""
Product = Callable[[QuantizedTokens, Tensor, Tensor, Tensor | None, torch.dtype], Tensor]
"""tokens [..., K], int8 [N, K], its scales [N], bias [N], and a dtype -> [..., N] in that dtype"""


# The rotation ------------------------------------------------------------------------------------------


def group_for(features: int) -> int:
    """The largest of 256, 64, 16 and 4 that divides the number of features, or 0: not rotated."""
    return next((group for group in (GROUP, 64, 16, 4) if features % group == 0), 0)


def stages(group: int) -> int:
    """n of group = 4^n. ValueError for another number."""
    n = (group.bit_length() - 1) // 2
    if group < 4 or 4**n != group:
        raise ValueError(f"a group of {group} features cannot be rotated: it has to be a power of 4")
    return n


def hadamard(group: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """The block of R for a group: H4's Kronecker power [group, group], orthogonal and symmetric. ValueError.

    Computed where it is used, from numbers of rows and columns in base 4: H4 is negative where two digits add up to 3.
    """
    count, number = stages(group), torch.arange(group, dtype=torch.int64, device=device)
    digits = number[:, None] ^ number
    negative = torch.zeros_like(digits, dtype=torch.bool)
    for stage in range(count):
        negative = negative ^ (digits >> 2 * stage & 3 == 3)
    return (1 - 2 * negative.to(dtype)) * group**-0.5


def rotate_tokens(x: Tensor, group: int) -> Tensor:
    """x R as a product with R, in the dtype of x: quicker than `rotate` for a product's numbers, in which the order of
    the sums is no file's matter. x itself for group 0. [..., K] -> [..., K]"""
    if not group:
        return x
    return (x.unflatten(-1, (-1, group)) @ hadamard(group, x.dtype, x.device)).flatten(-2)


def rotate(x: Tensor, group: int) -> Tensor:
    """x R in fp32, for each group of features; x itself, in fp32, for group 0. [..., K] -> [..., K]

    R R = 1: rotating again undoes it.
    """
    if not group:
        return x.float()
    groups = x.reshape(-1, group)
    parts = [groups] if torch.compiler.is_compiling() else groups.split(ON_CPU if x.device.type == "cpu" else ELSEWHERE)
    return torch.cat([_rotated(part.float(), stages(group)) for part in parts]).reshape(x.shape)


def _rotated(y: Tensor, stages: int) -> Tensor:
    """[n, group] -> [n, group]. A stage takes the last digit of a feature's number, in base 4, and puts it first."""
    group = y.shape[1]
    for _ in range(stages):
        a, b, c, d = y.reshape(-1, group // 4, 4).unbind(-1)
        both, less = a + b, a - b
        y = torch.stack((both + c - d, both - c + d, less + c + d, c - less + d), dim=1).reshape(-1, group)
    return y * group**-0.5  # a power of two, as each stage's half


# Numbers -----------------------------------------------------------------------------------------------


def quantize_rows(x: Tensor, group: int) -> QuantizedTokens:
    """x [..., K], rotated, in int8 with a scale for each row; computed in fp32, rounded to nearest, ties to even."""
    x = rotate(x, group)
    # By a tensor: a Python number is multiplied by its reciprocal on CUDA, and divided by on the CPU.
    largest = x.abs().amax(dim=-1, keepdim=True)
    scale = (largest / torch.full((), LARGEST, dtype=torch.float32, device=x.device)).clamp(min=SMALLEST)
    return QuantizedTokens((x / scale).round().to(torch.int8), scale)  # within 127: the largest is 127 scales


def dequantize(codes: Tensor, scale: Tensor, group: int, dtype: torch.dtype) -> Tensor:
    """The dense weight of int8 [N, K] and its rows' scales [N], rotated back, computed in fp32 and rounded once."""
    return (rotate(codes, group) * scale[:, None]).to(dtype)


def group_in(details: Mapping[str, Any]) -> int:
    """The group that a file's `comfy_quant` names; 0: not rotated. ValueError for one that is no power of 4."""
    group = int(details.get("convrot_groupsize", GROUP)) if details.get("convrot") else 0
    if group:
        stages(group)
    return group


def to_dense(
    tensors: Mapping[str, Tensor],
    shape: tuple[int, ...],
    details: Mapping[str, Any],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The numbers that a file's `weight` and `weight_scale` (of rows, or one) stand for. ValueError as `group_in`."""
    scale = tensors["weight_scale"].float().flatten()
    rows = tensors["weight"].reshape(len(scale), -1)
    return dequantize(rows, scale, group_in(details), dtype).reshape(shape)


# Products ----------------------------------------------------------------------------------------------


def product_of_tokens(
    x: QuantizedTokens, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """x @ weight.T of rotated int8 tokens [..., K] and int8 [N, K] with its scales [N]: exact sums, scaled in fp32 and
    rounded once to that dtype. The truth for the kernels. -> [..., N]"""
    rows, scales = x.codes.reshape(-1, weight.shape[1]), x.scale.reshape(-1, 1)
    parts = zip(rows.split(ROWS_AT_A_TIME), scales.split(ROWS_AT_A_TIME), strict=True)
    y = torch.cat([scaled(sums(codes, weight), scale, weight_scale, bias, dtype) for codes, scale in parts])
    return y.reshape(*x.codes.shape[:-1], len(weight))


def sums(codes: Tensor, weight: Tensor) -> Tensor:
    """codes @ weight.T for int8 [M, K] and [N, K], exact. -> int32 [M, N]"""
    if not codes.is_cuda:
        return torch._int_mm(codes, weight.t())
    return torch._int_mm(F.pad(codes, (0, 0, 0, -len(codes) % FEWEST_ROWS)), weight.t())[: len(codes)]


def scaled(sums: Tensor, scale: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """sums [M, N] times the scales of tokens [M, 1] and of a weight's rows [N], plus bias, in fp32; then that dtype."""
    y = sums * scale * weight_scale
    return (y if bias is None else y + bias).to(dtype)


@cache
def has_int8_units(device: torch.device) -> bool:
    """Whether the device multiplies int8 in hardware: tried, and compared with the exact sums.

    Running out of memory in the trial is raised and not cached: the next call tries again.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (7, 5):
        return False  # the CPU has the function; in bf16 or fp32 it is faster
    draw = torch.Generator("cpu").manual_seed(0)  # leaves global seeds alone
    x, weight = (
        torch.randint(-LARGEST, LARGEST + 1, size, generator=draw, dtype=torch.int8, device="cpu")
        for size in ((48, 64), (64, 64))
    )
    try:
        found = sums(x.to(device), weight.to(device))
    except (RuntimeError, NotImplementedError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        return False
    return torch.equal(found.cpu(), x.int() @ weight.int().t())


# The layer ---------------------------------------------------------------------------------------------


class Int8Linear(Scaled, Leaf):
    """An nn.Linear in int8, with `weight` and `bias` under the same names; the weight is rotated and frozen."""

    quantize: Quantize = staticmethod(quantize_rows)
    """quantizes inputs that are not `QuantizedTokens`; a kernel may replace it"""
    product: Product = staticmethod(product_of_tokens)
    """multiplies them; a kernel may replace it"""
    unpack: Callable[[Tensor, Tensor, int, torch.dtype], Tensor] = staticmethod(dequantize)
    """widens codes, scales and group to a dtype; a kernel may replace it"""

    def __init__(self, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, group: int) -> None:
        """weight: int8 [N, K], rotated in groups (0: not); weight_scale: fp32 [N]; bias: [N] in the dtype that the
        model computes in. ValueError where the group does not divide K."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        if group and stages(group) and self.in_features % group:
            raise ValueError(f"groups of {group} features do not divide {self.in_features}")
        self.group = group
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("weight_scale", weight_scale)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.choose_matmul()

    @classmethod
    def of(cls, linear: nn.Linear) -> Self:
        """The Linear, quantized; on `meta` without values."""
        weight, group = linear.weight.detach(), group_for(linear.in_features)
        if weight.is_meta:  # where arithmetic would take longer than reading the values
            codes, scale = (
                torch.empty_like(weight, dtype=torch.int8),
                weight.new_empty(len(weight), dtype=torch.float32),
            )
        else:
            codes, scale = quantize_rows(weight, group)
        return cls(codes, scale.flatten(), None if linear.bias is None else linear.bias.detach(), group)

    @classmethod
    def read(
        cls, tensors: Mapping[str, Tensor], shape: tuple[int, ...], details: Mapping[str, Any], bias: Tensor | None
    ) -> Self:
        """The layer of a file's `weight` and `weight_scale`, codes unchanged; one scale becomes one for each row."""
        scale = tensors["weight_scale"].float().flatten().expand(shape[0]).contiguous()
        return cls(tensors["weight"].reshape(shape), scale, bias, group_in(details))

    @classmethod
    def joined(cls, parts: Sequence[Self], bias: Tensor | None) -> Self | None:
        """One layer of the rows of several, codes unchanged; None where their groups differ."""
        if len({(part.in_features, part.group) for part in parts}) != 1:
            return None
        weight, scale = (torch.cat([getattr(part, name).detach() for part in parts]) for name in cls.CODES)
        return cls(weight, scale, bias, parts[0].group)

    def tensors(self) -> dict[str, Tensor]:
        """What a file gets beside its bias, as ComfyUI reads it."""
        rotation = {"convrot": True, "convrot_groupsize": self.group} if self.group else {}
        said = list(json.dumps({"format": FORMAT, **rotation}, separators=(",", ":")).encode())
        return {
            "weight": self.weight.detach(),
            "weight_scale": self.weight_scale[:, None],
            "comfy_quant": torch.tensor(said, dtype=torch.uint8, device="cpu"),
        }

    def forward(self, x: Tensor | QuantizedTokens) -> Tensor:
        """[..., K] -> [..., N], in the dtype of x; of tokens in that of the bias, or in bf16."""
        if isinstance(x, QuantizedTokens):
            return self.of_tokens(x, torch.bfloat16 if self.bias is None else self.bias.dtype)
        return self.multiply_rows(x)

    def multiply_rows(self, x: Tensor, rows: Rows = None) -> Tensor:
        """Those rows of its forward."""
        multiply = self.multiply if self.scaled else self.multiply_rotated
        return self.differentiable(x, partial(multiply, rows=rows), rows)

    def of_tokens(self, x: QuantizedTokens, dtype: torch.dtype, rows: Rows = None) -> Tensor:
        """Its forward of tokens that are rotated in its groups."""
        return self.product(x, *self.numbers(rows), dtype)

    def multiply(self, x: Tensor, rows: Rows = None) -> Tensor:
        """Its forward in int8."""
        return self.of_tokens(self.quantize(x, self.group), x.dtype, rows)

    def multiply_rotated(self, x: Tensor, rows: Rows = None) -> Tensor:
        """Its forward in the dtype of x: of rotated tokens by the rotated weight, which is less to rotate."""
        codes, scale, bias = self.numbers(rows)
        rotated = rotate_tokens(x.float(), self.group).to(x.dtype) if self.group else x
        return F.linear(rotated, self.unpack(codes, scale, 0, x.dtype), bias)

    def input_gradient(self, grad: Tensor, rows: Rows = None) -> Tensor:
        """`Scaled.input_gradient` by rotated codes, rotated back: fewer numbers than the weight has."""
        return rotate_tokens(super().input_gradient(grad, rows), self.group)

    def widen(self, dtype: torch.dtype) -> Tensor:
        """codes * scale, rotated back"""
        return self.unpack(self.weight, self.weight_scale, self.group, dtype)

    def has_units(self, device: torch.device) -> bool:
        return has_int8_units(device)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, group={self.group}, {'scaled' if self.scaled else 'weight only'}"
