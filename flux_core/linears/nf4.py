"""A Linear in four bits: NF4 or FP4, as bitsandbytes keeps them.

The idea. Weights are about normally distributed, so sixteen numbers that lie where such numbers are (`codebooks.NF4`)
serve better than sixteen at equal distances. The weight is read as one long row, across its own rows, and cut into
blocks b of 64; each has its largest number in fp32, and each number a code of four bits, two in a byte, the first in
the high half:

    a_b = max |w_i| for i in b        c_i = the code of the number q[c] nearest to w_i / a_b        w_i ~ q[c_i] a_b

A number in fp32 for each block is half a bit for each weight. Double quantization makes that an eighth: a, less its
mean m, has codes of eight bits in its turn, in blocks B of 256, and a weight takes 4.13 bits. Their numbers
(`dynamic_map`) are closer to each other the smaller they are:

    A_B = max |a_b - m| for b in B        d_b = the code of the number p[d] nearest to (a_b - m) / A_B
    a_b ~ p[d_b] A_B + m

The error is half of the gap that a number lies in, or less: 0.15 of its block's largest in NF4, 0.17 in FP4. Of
normal numbers that is 9.2 % in the mean (rms) in NF4 and 12.2 % in FP4, where e4m3 is off by 2.5 %. Double quantization
changes no digit of these.

The cost. The weight is widened in every forward: four bits are read and sixteen written for each number, and the
product reads those again. Little for a picture's thousands of tokens, much for a single vector.

Rounding. Here a number is computed in fp32 and rounded once, to the dtype of the product. bitsandbytes first rounds to
the dtype that the weight had before it was quantized, then to that of the product: the same where both are one.

Files are read and written with bitsandbytes' names (`checkpoint/bnb.py`). The codes that `quantize` finds, on
any device, are those of its operator for all devices on a CPU, to the bit; its own kernels may choose the other of two
numbers that are about as near.

Source: Dettmers et al., QLoRA (arXiv 2305.14314), and bitsandbytes 0.50, `backends/default/ops.py`.

Not here: training of the weights, products that read codes, other codebooks.
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .codebooks import CODEBOOKS
from .contract import Leaf
from .frozen import Frozen

BLOCK, NESTED_BLOCK = 64, 256
TINY = 1e-38
"""what blocks of zeros are divided by"""
CHUNK = 1 << 22
"""numbers that are quantized at once, a multiple of any block: what is needed meanwhile takes sixteen bytes for each"""
ORIGINAL = {torch.bfloat16: "bfloat16", torch.float16: "float16"}
"""the dtypes that a file may say its weights had; others are said to have been fp32"""


class Nested(NamedTuple):
    """What the codes of absmax stand for, where it is quantized in its turn."""

    absmax: Tensor
    """fp32, the largest number of each block of absmax"""
    quant_map: Tensor
    """fp32 [256]"""
    offset: Tensor
    """fp32 [], the mean of absmax"""
    blocksize: int


def multiply_blocks(x: Tensor, factors: Tensor, blocksize: int) -> Tensor:
    """x [n], each block of it multiplied by its factor, in place. The last block may be shorter."""
    whole = len(x) // blocksize
    x[: whole * blocksize].view(whole, blocksize).mul_(factors[:whole, None])
    x[whole * blocksize :].mul_(factors[whole:])
    return x


def widen_absmax(absmax: Tensor, nested: Nested | None) -> Tensor:
    """absmax in fp32, [blocks]."""
    if nested is None:
        return absmax
    values = nested.quant_map.index_select(0, absmax.int())
    return multiply_blocks(values, nested.absmax, nested.blocksize).add_(nested.offset)


def unpack(
    codes: Tensor,
    quant_map: Tensor,
    absmax: Tensor,
    nested: Nested | None,
    shape: Sequence[int],
    blocksize: int,
    dtype: torch.dtype,
) -> Tensor:
    """The dense weight, rounded once.

    codes: two in each byte, [ceil(n / 2), 1]; quant_map: fp32 [16]; absmax: fp32, or codes if nested, [ceil(n / 64)].
    """
    pairs = torch.stack((quant_map.repeat_interleave(16), quant_map.repeat(16)), dim=1)  # what each byte stands for
    # Two fp32 numbers are looked up as one of 64 bits: a quarter of the time that an index for each number takes.
    values = pairs.view(torch.int64).flatten().index_select(0, codes.flatten().int()).view(torch.float32)
    values = multiply_blocks(values[: math.prod(shape)], widen_absmax(absmax, nested), blocksize)
    return values.view(shape).to(dtype)


def to_dense(
    tensors: Mapping[str, Tensor],
    shape: tuple[int, ...],
    details: Mapping[str, Any],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The numbers that a file's tensors stand for, computed in fp32 and rounded once.

    tensors: by role (`checkpoint.bnb.ROLES`, and "weight"); details: what its quant_state says. Raises nothing for
    values that are not finite.
    """
    of = tensors["absmax"], _nested(tensors, details)
    return unpack(as_bytes(tensors["weight"]), tensors["quant_map"], *of, shape, details["blocksize"], dtype)


def as_bytes(codes: Tensor) -> Tensor:
    """Packed codes of any dtype as uint8 [ceil(n / 2), 1], in the same memory."""
    return codes.reshape(-1).view(torch.uint8)[:, None]


def _nested(tensors: Mapping[str, Tensor], details: Mapping[str, Any]) -> Nested | None:
    if "nested_absmax" not in tensors:
        return None
    absmax = tensors["nested_absmax"]
    offset = torch.tensor(details["nested_offset"], dtype=torch.float32, device=absmax.device)
    return Nested(absmax, tensors["nested_quant_map"], offset, details["nested_blocksize"])


def codebook(quant_type: str, device: torch.device) -> Tensor:
    """The numbers that codes stand for, fp32 [16]."""
    return torch.tensor(CODEBOOKS[quant_type], dtype=torch.float32, device=device)


def dynamic_map(device: torch.device) -> Tensor:
    """The numbers between -1 and 1 that codes of eight bits stand for, fp32 [256], sorted.

    Besides 0 and 1, for each i from 0 to 6: the middles of 2^i equal parts of [0.1, 1], times 10^(i - 6), and their
    negatives. So a number of any size has a neighbour, and larger ones have more of them (arXiv 1511.04561).
    """
    numbers = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32, device="cpu")
        middles = 10.0 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2)
        numbers += middles.tolist() + (-middles).tolist()
    return torch.tensor(sorted(numbers), dtype=torch.float32, device=device)


def scaled(x: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """x [n] divided by its blocks' largest numbers, and these; in fp32.

    As bitsandbytes does it to the bit: by a reciprocal, in a last block that is shorter by a division.
    """
    whole = len(x) // blocksize * blocksize
    blocks, rest = x[:whole].float().view(-1, blocksize), x[whole:].float()
    absmax = blocks.abs().amax(dim=1)
    ratios = (blocks * (1 / absmax.clamp(min=TINY))[:, None]).flatten()
    if len(rest):
        largest = rest.abs().amax(dim=0, keepdim=True).clamp(min=TINY)
        ratios, absmax = torch.cat((ratios, rest / largest)), torch.cat((absmax, largest))
    return ratios.clamp_(-1, 1), absmax


def nearest(x: Tensor, numbers: Tensor) -> Tensor:
    """The code, as uint8, of the number nearest to each of x; of two as near the smaller."""
    ascending, codes = numbers.sort(stable=True)
    places = torch.bucketize(x, (ascending[:-1] + ascending[1:]) / 2, out_int32=True)
    return codes.to(torch.uint8).index_select(0, places)


def quantize(
    x: Tensor, blocksize: int = BLOCK, quant_type: str = "nf4", double: bool = True
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A weight of any shape as (tensors by role, details), which `to_dense` takes.

    double: whether absmax is quantized, too.
    """
    numbers = codebook(quant_type, x.device)
    codes, largest = [], []
    for chunk in x.flatten().split(CHUNK):
        ratios, absmax = scaled(chunk, blocksize)
        high, low = nearest(F.pad(ratios, (0, len(ratios) % 2)), numbers).view(-1, 2).unbind(dim=1)
        codes.append(high << 4 | low)
        largest.append(absmax)
    absmax = torch.cat(largest)
    tensors = {"weight": torch.cat(codes)[:, None], "absmax": absmax, "quant_map": numbers}
    details = {"quant_type": quant_type, "blocksize": blocksize, "dtype": ORIGINAL.get(x.dtype, "float32")}
    if double:
        # A card sums in another order, and a mean that differs in its last bit is other codes.
        offset, numbers = absmax.cpu().mean().to(x.device), dynamic_map(x.device)
        ratios, nested = scaled(absmax - offset, NESTED_BLOCK)
        tensors |= {"absmax": nearest(ratios, numbers), "nested_absmax": nested, "nested_quant_map": numbers}
        details |= {"nested_blocksize": NESTED_BLOCK, "nested_offset": offset.item()}
    return tensors, details


def empty(x: Tensor) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `quantize` gives for a weight of that shape, without values."""
    blocks = -(-x.numel() // BLOCK)
    tensors = {
        "weight": x.new_empty((-(-x.numel() // 2), 1), dtype=torch.uint8),
        "absmax": x.new_empty(blocks, dtype=torch.uint8),
        "quant_map": x.new_empty(16, dtype=torch.float32),
        "nested_absmax": x.new_empty(-(-blocks // NESTED_BLOCK), dtype=torch.float32),
        "nested_quant_map": x.new_empty(256, dtype=torch.float32),
    }
    details = {"quant_type": "nf4", "blocksize": BLOCK, "dtype": ORIGINAL.get(x.dtype, "float32")}
    return tensors, details | {"nested_blocksize": NESTED_BLOCK, "nested_offset": 0.0}


class Nf4Linear(Frozen, Leaf):
    """An nn.Linear in NF4 or FP4. absmax stays as it was stored, so double quantization saves memory here, too."""

    CODES = ("weight", "absmax", "quant_map", "nested_absmax", "nested_quant_map", "nested_offset")
    absmax: Tensor
    quant_map: Tensor
    nested_absmax: Tensor | None
    nested_quant_map: Tensor | None
    nested_offset: Tensor | None
    unpack = staticmethod(unpack)
    """widens the codes; a kernel may replace it"""

    def __init__(
        self, tensors: Mapping[str, Tensor], shape: tuple[int, ...], details: Mapping[str, Any], bias: Tensor | None
    ) -> None:
        """tensors, details: as for `to_dense`; shape: (N, K); bias: [N] in the dtype that the model computes in."""
        super().__init__()
        self.out_features, self.in_features = shape
        self.quant_type, self.blocksize, self.original = (details[x] for x in ("quant_type", "blocksize", "dtype"))
        self.weight = nn.Parameter(as_bytes(tensors["weight"]), requires_grad=False)
        self.register_buffer("absmax", tensors["absmax"])
        self.register_buffer("quant_map", tensors["quant_map"])
        nested = _nested(tensors, details)
        self.nested_blocksize = nested.blocksize if nested else 0
        self.register_buffer("nested_absmax", nested and nested.absmax)
        self.register_buffer("nested_quant_map", nested and nested.quant_map)
        self.register_buffer("nested_offset", nested and nested.offset)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @classmethod
    def read(
        cls, tensors: Mapping[str, Tensor], shape: tuple[int, ...], details: Mapping[str, Any], bias: Tensor | None
    ) -> Self:
        """The layer of a file's tensors, with their codes."""
        return cls(tensors, shape, details, bias)

    @classmethod
    def of(cls, linear: nn.Linear) -> Self:
        """The Linear in NF4 with double quantization; on `meta` without values."""
        weight = linear.weight.detach()
        tensors, details = (empty if weight.is_meta else quantize)(weight)
        return cls(tensors, tuple(weight.shape), details, None if linear.bias is None else linear.bias.detach())

    @classmethod
    def joined(cls, parts: Sequence[Self], bias: Tensor | None) -> Self | None:
        """One layer of the rows of several, with their codes; None where blocks would reach from one into the next.

        absmax becomes fp32 if any is nested: its own blocks and their mean belong to one part only.
        """
        first = parts[0]
        kinds = {(part.quant_type, part.blocksize, part.in_features) for part in parts}
        if len(kinds) > 1 or any(part.out_features * part.in_features % part.blocksize for part in parts[:-1]):
            return None
        tensors = {
            "weight": torch.cat([part.weight.detach() for part in parts]),
            "absmax": torch.cat([widen_absmax(part.absmax, part.nested) for part in parts]),
            "quant_map": first.quant_map,
        }
        details = {"quant_type": first.quant_type, "blocksize": first.blocksize, "dtype": first.original}
        return cls(tensors, (sum(part.out_features for part in parts), first.in_features), details, bias)

    @property
    def nested(self) -> Nested | None:
        if self.nested_absmax is None or self.nested_quant_map is None or self.nested_offset is None:
            return None
        return Nested(self.nested_absmax, self.nested_quant_map, self.nested_offset, self.nested_blocksize)

    def tensors(self) -> dict[str, Tensor]:
        """What a safetensors file gets for it, by the ending behind the layer's name, as bitsandbytes writes it."""
        state = {"quant_type": self.quant_type, "blocksize": self.blocksize, "dtype": self.original}
        state |= {"shape": [self.out_features, self.in_features]}
        found = {"weight": self.weight.detach(), "weight.absmax": self.absmax, "weight.quant_map": self.quant_map}
        if nested := self.nested:
            found |= {"weight.nested_absmax": nested.absmax, "weight.nested_quant_map": nested.quant_map}
            state |= {"nested_blocksize": nested.blocksize, "nested_dtype": "float32"}
            state |= {"nested_offset": nested.offset.item()}
        text = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8, device="cpu")
        found[f"weight.quant_state.bitsandbytes__{self.quant_type}"] = text
        return found if self.bias is None else found | {"bias": self.bias.detach()}

    def widen(self, dtype: torch.dtype) -> Tensor:
        """The dense weight [N, K], rounded once."""
        shape = self.out_features, self.in_features
        return self.unpack(self.weight, self.quant_map, self.absmax, self.nested, shape, self.blocksize, dtype)

    def dense(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """The dense weight, and the bias."""
        return self.widen(dtype), self.bias

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]"""
        return self.multiply_widened(x)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.quant_type}{', double quantization' if self.nested else ''}"
