"""The types of tensors in GGUF files: ggml's numbers, names, and the sizes of their blocks. No torch.

Source: ggml.h and ggml-common.h (github.com/ggml-org/ggml). A block is a run of values in a row of the tensor; all of
its bytes lie together.
"""

import math
from typing import NamedTuple


class GgmlType(NamedTuple):
    """A type that is read here."""

    number: int
    """in files"""
    block: int
    """values in a block"""
    size: int
    """bytes of a block"""


TYPES = {
    "F32": GgmlType(0, 1, 4),
    "F16": GgmlType(1, 1, 2),
    "BF16": GgmlType(30, 1, 2),
    "Q4_0": GgmlType(2, 32, 18),
    "Q4_1": GgmlType(3, 32, 20),
    "Q5_0": GgmlType(6, 32, 22),
    "Q5_1": GgmlType(7, 32, 24),
    "Q8_0": GgmlType(8, 32, 34),
    "Q2_K": GgmlType(10, 256, 84),
    "Q3_K": GgmlType(11, 256, 110),
    "Q4_K": GgmlType(12, 256, 144),
    "Q5_K": GgmlType(13, 256, 176),
    "Q6_K": GgmlType(14, 256, 210),
    "IQ4_NL": GgmlType(20, 32, 18),
    "IQ4_XS": GgmlType(23, 256, 136),
}
PLAIN = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""types without blocks -> torch's dtypes"""

_OTHERS = {
    9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 21: "IQ3_S", 22: "IQ2_S", 24: "I8",
    25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4",
    41: "Q1_0", 4: "Q4_2 (removed)", 5: "Q4_3 (removed)", 31: "Q4_0_4_4 (removed)", 32: "Q4_0_4_8 (removed)",
    33: "Q4_0_8_8 (removed)", 36: "IQ4_NL_4_4 (removed)", 37: "IQ4_NL_4_8 (removed)", 38: "IQ4_NL_8_8 (removed)",
}  # fmt: skip
NAMES = {found.number: name for name, found in TYPES.items()} | _OTHERS
"""every number that ggml has given to a type -> its name, for people where the type is not read"""


def is_whole(kind: str, shape: tuple[int, ...]) -> bool:
    """Whether the rows (last axis) of a tensor of that shape are whole blocks."""
    block = TYPES[kind].block
    return block == 1 or (len(shape) > 0 and shape[-1] % block == 0)


def size_of(kind: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor whose values are whole blocks."""
    _, block, size = TYPES[kind]
    return math.prod(shape) // block * size
