"""A Linear in ggml's blocks, as GGUF files hold them: 2 to 8.5 bits a weight, and a scale for each few of them.

The idea. Large numbers are rare, and a scale for a whole row lets one of them coarsen all others. ggml cuts each row
into blocks of 32 and gives each a scale of its own, in fp16. The types of the first generation are

    w ~ d (q - 2^(b-1))        Q4_0 (b = 4), Q5_0, Q8_0 (q signed)
    w ~ d q + m                Q4_1, Q5_1: m is the smallest value of the block

and cost 16 bits a block (32 with m): 4.5 bits a weight for Q4_0, 8.5 for Q8_0. The K types have super-blocks of 256:
two fp16 numbers scale integer scales of the blocks inside, which cost 4 to 8 bits each instead of 16,

    w ~ (d s_j) q - (d' m_j)   Q2_K (16 blocks of 16), Q4_K, Q5_K (8 of 32), integers of 4 or 6 bits: 2.6, 4.5, 5.5 bits
    w ~ (d s_j) q              Q3_K, Q6_K (16 of 16), integers of 6 or 8 bits: 3.4, 6.6 bits a weight

and IQ4_NL, IQ4_XS look q up in a table of 16 levels that are dense around zero.

The error. A block of n normal numbers reaches to about 2 of their deviations (n = 32), so b bits round by
4 / 2^b / sqrt(12) of a deviation: 7 % in four bits, 0.5 % in eight. What is far from zero on one side only is what m
saves. `quantize` does what ggml's reference does, to the bit, for the first generation; for Q4_K, Q5_K and Q6_K it
searches scales for a small squared error, and comes within 6 % of the smallest that its d allows.

The cost. In memory what the file has. Each forward widens the weight and multiplies in the dtype of x, so it is never
faster than bf16: a pass over the codes and over the weight that is written, for a product that reads it once more.
ggml multiplies int8 by int8 instead, which rounds the tokens, too.

Here values are computed in fp32 in ggml's order, so they are those of ggml and of gguf-py to the bit, and rounded once;
ComfyUI-GGUF and diffusers compute in fp16, 1e-3 of the largest weight off. Codes are kept flat: blocks follow each
other through the tensor, whether or not its rows are whole ones.

Source: ggml-quants.c and ggml-common.h (github.com/ggml-org/ggml); gguf-py's quants.py.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from itertools import product
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..errors import FileError, UsageError
from .contract import Leaf
from .frozen import Frozen
from .gguf_types import TYPES, is_whole, size_of

LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""what the codes of IQ4_NL and IQ4_XS stand for"""
CHUNK = 2**19
"""values that are widened or quantized at a time on the CPU, so that temporaries stay in its cache"""
Unpack = Callable[[Tensor, str, torch.dtype], Tensor]
"""(codes, type, dtype) -> values [n], flat"""


def unpack(codes: Tensor, kind: str, dtype: torch.dtype) -> Tensor:
    """The numbers [n], flat, that whole blocks of a type stand for: computed in fp32, rounded once. codes: uint8."""
    block, size = TYPES[kind].block, TYPES[kind].size
    blocks, widened = codes.reshape(-1, size), UNPACK[kind]
    if codes.device.type != "cpu" or torch.compiler.is_compiling():
        return widened(blocks).to(dtype).flatten()
    out = torch.empty((len(blocks), block), dtype=dtype, device=codes.device)
    step = max(1, CHUNK // block)
    for part, to in zip(blocks.split(step), out.split(step), strict=True):
        to.copy_(widened(part))
    return out.flatten()


def quantize(x: Tensor, kind: str) -> Tensor:
    """The codes of a tensor, flat uint8, for the types in `PACK`. UsageError unless its values are whole blocks."""
    block = TYPES[kind].block
    if kind not in PACK or x.numel() % block:
        raise UsageError(
            f"{list(x.shape)} values can't be written as {kind}: it is one of {', '.join(PACK)}, in blocks of {block}. "
            "Next: choose another type."
        )
    blocks = x.detach().reshape(-1, block)
    step = max(1, (CHUNK if x.device.type == "cpu" else 64 * CHUNK) // block)
    return torch.cat([PACK[kind](part.float()) for part in blocks.split(step)]).flatten()


def to_dense(
    tensors: Mapping[str, Tensor],
    shape: tuple[int, ...],
    details: Mapping[str, Any],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The numbers that a file's tensor stands for. tensors: "weight", uint8. details: {"type": "Q4_K"}. FileError."""
    codes, kind = checked(tensors["weight"], shape, details)
    return unpack(codes, kind, dtype).reshape(shape)


def checked(codes: Tensor, shape: tuple[int, ...], details: Mapping[str, Any]) -> tuple[Tensor, str]:
    """Codes, flat, and their type. FileError unless they are those of a tensor of that shape."""
    kind = details.get("type")
    if kind not in TYPES:
        raise FileError(f"the type {str(kind)[:40]!a} of a tensor is none of {', '.join(TYPES)}.")
    if math.prod(shape) % TYPES[kind].block or codes.dtype != torch.uint8 or codes.numel() != size_of(kind, shape):
        raise FileError(f"{codes.numel()} codes in {codes.dtype} are no tensor {list(shape)} of {kind}.")
    return codes.reshape(-1), kind


# Widening. Each function takes blocks, uint8 [n, bytes], and gives fp32 [n, values] -----------------------


def _half(blocks: Tensor, at: int) -> Tensor:
    """The fp16 number at that byte, fp32 [n, 1]."""
    return blocks[:, at : at + 2].view(torch.float16).float()


def _fields(codes: Tensor, bits: int, run: int) -> Tensor:
    """uint8 [n, bytes] cut into fields of some bits: for each run of bytes first the lowest field of each, then the
    next of each, and so on.
    """
    runs = codes.unflatten(1, (-1, run))
    return torch.stack([(runs >> shift) & (2**bits - 1) for shift in range(0, 8, bits)], dim=2).flatten(1)


def _below(codes: Tensor, offset: int) -> Tensor:
    """Codes with that offset taken away, int8."""
    return codes.view(torch.int8) - offset


def _scaled(q: Tensor, scale: Tensor, shift: Tensor | None = None) -> Tensor:
    """q [n, values] * scale [n, groups] + shift [n, groups]"""
    values = q.float().unflatten(1, (scale.shape[1], -1)).mul_(scale[..., None])
    return (values if shift is None else values.add_(shift[..., None])).flatten(1)


def _q4_0(b: Tensor) -> Tensor:
    return _scaled(_below(_fields(b[:, 2:], 4, 16), 8), _half(b, 0))


def _q4_1(b: Tensor) -> Tensor:
    return _scaled(_fields(b[:, 4:], 4, 16), _half(b, 0), _half(b, 2))


def _five_bits(b: Tensor, at: int) -> Tensor:
    """Of Q5_0 and Q5_1: the fifth bits of 32 values, then their lower ones."""
    return _fields(b[:, at + 4 :], 4, 16) | _fields(b[:, at : at + 4], 1, 1) << 4


def _q5_0(b: Tensor) -> Tensor:
    return _scaled(_below(_five_bits(b, 2), 16), _half(b, 0))


def _q5_1(b: Tensor) -> Tensor:
    return _scaled(_five_bits(b, 4), _half(b, 0), _half(b, 2))


def _q8_0(b: Tensor) -> Tensor:
    return _scaled(b[:, 2:].view(torch.int8), _half(b, 0))


def _q2_k(b: Tensor) -> Tensor:
    scale, low = (b[:, :16] & 15).float(), (b[:, :16] >> 4).float()
    return _scaled(_fields(b[:, 16:80], 2, 32), _half(b, 80) * scale, -(_half(b, 82) * low))


def _q3_k(b: Tensor) -> Tensor:
    scale = _below(_fields(b[:, 96:104], 4, 8) | _fields(b[:, 104:108], 2, 4) << 4, 32)
    q = _below(_fields(b[:, 32:96], 2, 32) | _fields(b[:, :32], 1, 32) << 2, 4)  # the third bit, if set, adds four
    return _scaled(q, _half(b, 108) * scale.float())


def _six_bits(b: Tensor) -> tuple[Tensor, Tensor]:
    """Of Q4_K and Q5_K: scale and minimum of each of 8 blocks, fp32 [n, 8], from 12 bytes."""
    first, second, last = b[:, 4:8], b[:, 8:12], b[:, 12:16]
    scale = torch.cat((first & 63, (last & 15) | (first >> 6 << 4)), dim=1)
    low = torch.cat((second & 63, (last >> 4) | (second >> 6 << 4)), dim=1)
    return _half(b, 0) * scale.float(), _half(b, 2) * low.float()


def _q4_k(b: Tensor) -> Tensor:
    scale, low = _six_bits(b)
    return _scaled(_fields(b[:, 16:], 4, 32), scale, -low)


def _q5_k(b: Tensor) -> Tensor:
    scale, low = _six_bits(b)
    return _scaled(_fields(b[:, 48:], 4, 32) | _fields(b[:, 16:48], 1, 32) << 4, scale, -low)


def _q6_k(b: Tensor) -> Tensor:
    q = _below(_fields(b[:, :128], 4, 64) | _fields(b[:, 128:192], 2, 32) << 4, 32)
    return _scaled(q, _half(b, 208) * b[:, 192:208].view(torch.int8).float())


def _levels(q: Tensor) -> Tensor:
    """The level that each code names."""
    table = torch.tensor(LEVELS, dtype=torch.float32, device=q.device)
    return table.index_select(0, q.flatten().int()).view(q.shape)


def _iq4_nl(b: Tensor) -> Tensor:
    return _scaled(_levels(_fields(b[:, 2:], 4, 16)), _half(b, 0))


def _iq4_xs(b: Tensor) -> Tensor:
    scale = _below(_fields(b[:, 4:8], 4, 1) | _fields(b[:, 2:4], 2, 1) << 4, 32)
    return _scaled(_levels(_fields(b[:, 8:], 4, 16)), _half(b, 0) * scale.float())


UNPACK: dict[str, Callable[[Tensor], Tensor]] = {
    "F32": lambda b: b.view(torch.float32),
    "F16": lambda b: b.view(torch.float16).float(),
    "BF16": lambda b: b.view(torch.bfloat16).float(),
    "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q8_0": _q8_0,
    "Q2_K": _q2_k, "Q3_K": _q3_k, "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl, "IQ4_XS": _iq4_xs,
}  # fmt: skip


# Quantizing. Each function takes fp32 [n, values] and gives blocks, uint8 [n, bytes] ----------------------


def _join(q: Tensor, bits: int, run: int) -> Tensor:
    """The bytes that `_fields` takes apart. [n, values] -> uint8 [n, bytes]"""
    fields = q.to(torch.uint8).unflatten(1, (-1, 8 // bits, run)).unbind(2)
    return reduce(torch.bitwise_or, (field << i * bits for i, field in enumerate(fields))).flatten(1)


def _halves(*numbers: Tensor) -> list[Tensor]:
    """fp32 [n, 1] each -> the bytes of fp16"""
    return [x.half().view(torch.uint8) for x in numbers]


def _over(x: Tensor, number: float) -> Tensor:
    """x / number, rounded as the CPU does it: CUDA would multiply by the reciprocal of a Python number."""
    return x / torch.full_like(x, number)


def _reciprocal(d: Tensor) -> Tensor:
    """1 / d, or 0"""
    return torch.where(d == 0, 0.0, 1.0 / d)


def _largest(x: Tensor) -> Tensor:
    """The number farthest from zero along the last axis, with its sign; of two as far the first."""
    return x.gather(-1, x.abs().argmax(dim=-1, keepdim=True))


def _symmetric(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and codes where the number farthest from zero gets the code 0."""
    half = 2 ** (bits - 1)
    d = _over(_largest(x), -half)
    return d, (x * _reciprocal(d) + (half + 0.5)).trunc().clamp_(0, 2 * half - 1)


def _with_minimum(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scale, minimum and codes where smallest and largest value get the first and the last code."""
    low, high = x.aminmax(dim=1, keepdim=True)
    d = _over(high - low, 2**bits - 1)
    return d, low, ((x - low) * _reciprocal(d) + 0.5).trunc().clamp_(0, 2**bits - 1)


def _to_q4_0(x: Tensor) -> Tensor:
    d, q = _symmetric(x, 4)
    return torch.cat([*_halves(d), _join(q, 4, 16)], dim=1)


def _to_q4_1(x: Tensor) -> Tensor:
    d, low, q = _with_minimum(x, 4)
    return torch.cat([*_halves(d, low), _join(q, 4, 16)], dim=1)


def _of_five_bits(q: Tensor) -> list[Tensor]:
    """What `_five_bits` reads."""
    q = q.to(torch.uint8)
    return [_join(q >> 4, 1, 1), _join(q & 15, 4, 16)]


def _to_q5_0(x: Tensor) -> Tensor:
    d, q = _symmetric(x, 5)
    return torch.cat([*_halves(d), *_of_five_bits(q)], dim=1)


def _to_q5_1(x: Tensor) -> Tensor:
    d, low, q = _with_minimum(x, 5)
    return torch.cat([*_halves(d, low), *_of_five_bits(q)], dim=1)


def _to_q8_0(x: Tensor) -> Tensor:
    d = _over(x.abs().amax(dim=1, keepdim=True), 127)
    y = x * _reciprocal(d)
    size = y.abs()
    whole = size.floor()
    q = y.sign() * (whole + (2 * (size - whole)).floor())  # halves go away from zero, where torch's go to even
    return torch.cat([*_halves(d), q.to(torch.int8).view(torch.uint8)], dim=1)


TRIED = [0.3 * i for i in range(-10, 11)]
"""by how much more than the codes there are a block is stretched, in search of its scale"""


def _keep(best: tuple[Tensor, ...], new: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """For each block that of two which has the smaller error, the first of each tuple."""
    better = new[0] < best[0]
    return tuple(torch.where(better, ours, theirs) for ours, theirs in zip(new, best, strict=True))


def _error(x: Tensor, dense: Tensor) -> Tensor:
    """Squared, of each block: [n, groups, 1]"""
    return (dense - x).square_().sum(-1, keepdim=True)


def _fit(x: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """scale and low >= 0 with the smallest error of scale * q - low for given codes (least squares)."""
    of_q, of_qq, of_x, of_qx = (y.sum(-1, keepdim=True) for y in (q, q * q, x, q * x))
    count = x.shape[-1]
    per = _reciprocal(count * of_qq - of_q * of_q)
    scale, low = (count * of_qx - of_q * of_x) * per, (of_q * of_qx - of_qq * of_x) * per
    low = torch.where(per == 0, -of_x / count, low)  # codes are all the same
    positive = low > 0
    return torch.where(positive, scale, of_qx * _reciprocal(of_qq)).clamp_(min=0), low.clamp_(min=0)


def _codes(x: Tensor, scale: Tensor, low: Tensor, top: int) -> Tensor:
    return ((x + low) * _reciprocal(scale)).round_().clamp_(0, top)


def _as_half(d: Tensor) -> Tensor:
    """d as fp16 has it, but not 0 unless it is: codes of scales can make up for a d that is too large."""
    return (d.sign() * d.abs().clamp_(min=2**-24)).half().float()


def _k_with_minimum(x: Tensor, bits: int) -> tuple[Tensor, ...]:
    """Of Q4_K and Q5_K: d and dmin, fp32 [n, 1]; scales and minima, uint8 [n, 8]; codes, uint8 [n, 256].

    The scale of each block is searched, then rounded with its minimum to the best of the nine pairs around it.
    """
    x, top = x.unflatten(1, (8, 32)), 2**bits - 1
    floor, ceiling = x.amin(-1, keepdim=True).clamp_(max=0), x.amax(-1, keepdim=True)
    per = _reciprocal(ceiling - floor)
    best: tuple[Tensor, ...] = (torch.full_like(per, torch.inf), per, per)
    for more in TRIED:
        q = ((x - floor) * ((top + more) * per)).round_().clamp_(0, top)
        scale, low = _fit(x, q)
        best = _keep(best, (_error(x, q * scale - low), scale, low))
    _, scale, low = best
    d, dmin = (_as_half(_over(y.amax(1, keepdim=True), 63)) for y in (scale, low))
    by_scale, by_low = (scale * _reciprocal(d)).round_(), (low * _reciprocal(dmin)).round_()
    best = (torch.full_like(per, torch.inf), by_scale, by_low)
    for i, j in product((0, -1, 1), repeat=2):
        s, m = (by_scale + i).clamp_(0, 63), (by_low + j).clamp_(0, 63)
        q = _codes(x, d * s, dmin * m, top)
        best = _keep(best, (_error(x, d * s * q - dmin * m), s, m))
    _, s, m = best
    q = _codes(x, d * s, dmin * m, top)
    return d[:, 0], dmin[:, 0], *(y.flatten(1).to(torch.uint8) for y in (s, m, q))


def _of_six_bits(scale: Tensor, low: Tensor) -> Tensor:
    """The 12 bytes that `_six_bits` reads."""
    first, second = (y[:, :4] | y[:, 4:] >> 4 << 6 for y in (scale, low))
    return torch.cat([first, second, (scale[:, 4:] & 15) | low[:, 4:] << 4], dim=1)


def _to_q4_k(x: Tensor) -> Tensor:
    d, dmin, scale, low, q = _k_with_minimum(x, 4)
    return torch.cat([*_halves(d, dmin), _of_six_bits(scale, low), _join(q, 4, 32)], dim=1)


def _to_q5_k(x: Tensor) -> Tensor:
    d, dmin, scale, low, q = _k_with_minimum(x, 5)
    return torch.cat([*_halves(d, dmin), _of_six_bits(scale, low), _join(q >> 4, 1, 32), _join(q & 15, 4, 32)], dim=1)


def _to_q6_k(x: Tensor) -> Tensor:
    """As in `_k_with_minimum`, by scales of either sign."""
    x = x.unflatten(1, (16, 16))
    per = _reciprocal(_largest(x))
    best: tuple[Tensor, ...] = (torch.full_like(per, torch.inf), per)
    for reach in (y for more in TRIED for y in (-32 - more, 31 + more)):  # codes of the number farthest from zero
        q = (x * (reach * per)).round_().clamp_(-32, 31)
        scale = (q * x).sum(-1, keepdim=True) * _reciprocal((q * q).sum(-1, keepdim=True))
        best = _keep(best, (_error(x, q * scale), scale))
    d = _as_half(_over(_largest(best[1].flatten(1)), -128))[..., None]
    whole = (best[1] * _reciprocal(d)).round_()
    best = (torch.full_like(per, torch.inf), whole)
    for i in sorted(range(-4, 5), key=abs):  # steps of a 128th, as fine as those before or finer
        s = (whole + i).clamp_(-128, 127)
        q = (x * _reciprocal(d * s)).round_().clamp_(-32, 31)
        best = _keep(best, (_error(x, d * s * q), s))
    s = best[1]
    q = ((x * _reciprocal(d * s)).round_().clamp_(-32, 31) + 32).flatten(1).to(torch.uint8)
    scales = s.flatten(1).to(torch.int8).view(torch.uint8)
    return torch.cat([_join(q & 15, 4, 64), _join(q >> 4, 2, 32), scales, *_halves(d[:, 0])], dim=1)


PACK: dict[str, Callable[[Tensor], Tensor]] = {
    "Q4_0": _to_q4_0, "Q4_1": _to_q4_1, "Q5_0": _to_q5_0, "Q5_1": _to_q5_1, "Q8_0": _to_q8_0,
    "Q4_K": _to_q4_k, "Q5_K": _to_q5_k, "Q6_K": _to_q6_k,
}  # fmt: skip
"""the types that can be written"""


class GgufLinear(Frozen, Leaf):
    """An nn.Linear whose weight is in ggml's blocks; it is frozen."""

    unpack: Unpack = staticmethod(unpack)
    """widens the codes; a kernel may replace it"""

    def __init__(self, codes: Tensor, kind: str, shape: tuple[int, int], bias: Tensor | None) -> None:
        """codes: uint8, flat, the blocks of a weight of that shape [N, K]; kind: "Q4_K"; bias: [N]."""
        super().__init__()
        self.kind = kind
        self.out_features, self.in_features = shape
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @classmethod
    def read(
        cls, tensors: Mapping[str, Tensor], shape: tuple[int, ...], details: Mapping[str, Any], bias: Tensor | None
    ) -> Self:
        """The layer of a file's weight. details: {"type": "Q4_K"}. FileError."""
        codes, kind = checked(tensors["weight"], shape, details)
        out_features, in_features = shape
        return cls(codes, kind, (out_features, in_features), bias)

    @classmethod
    def of(cls, linear: nn.Linear, kind: str = "Q8_0") -> Self:
        """The Linear, quantized; on `meta` without values. UsageError unless its rows are whole blocks."""
        weight = linear.weight.detach()
        N, K = weight.shape
        if not is_whole(kind, (N, K)):
            raise UsageError(f"rows of {K} values are no whole blocks of {kind}. Next: choose another type.")
        if weight.is_meta:
            codes = torch.empty(size_of(kind, (N, K)), dtype=torch.uint8, device=weight.device)
        else:
            codes = quantize(weight, kind)
        return cls(codes, kind, (N, K), None if linear.bias is None else linear.bias.detach())

    @classmethod
    def joined(cls, parts: Sequence[Self], bias: Tensor | None) -> Self | None:
        """One layer of the rows of several, or None where their types or inputs differ."""
        if len({(part.kind, part.in_features) for part in parts}) != 1:
            return None
        codes = torch.cat([part.weight.detach() for part in parts])
        return cls(codes, parts[0].kind, (sum(part.out_features for part in parts), parts[0].in_features), bias)

    @property
    def details(self) -> dict[str, Any]:
        """What `read` needs beside the tensors."""
        return {"type": self.kind}

    def tensors(self) -> dict[str, Tensor]:
        """What a file gets for it, by the ending behind the module's name."""
        return {"weight": self.weight.detach()}

    def widen(self, dtype: torch.dtype) -> Tensor:
        """The weight [N, K] that the blocks stand for."""
        return self.unpack(self.weight, self.kind, dtype).view(self.out_features, self.in_features)

    def dense(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """The widened weight."""
        return self.widen(dtype), self.bias

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]"""
        return self.multiply_widened(x)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.kind}"
