"""The sixteen numbers that codes of four bits stand for, in NF4 and FP4. Plain data: headers are checked without torch.

NF4 is for numbers that are normally distributed: eight quantiles of the positive half, seven of the negative, and 0,
stretched so that the ends are 1 and -1 (QLoRA, arXiv 2305.14314). FP4 has a sign, two bits of exponent and one of
mantissa, here as multiples of its largest number. Both are fp32 numbers, those of bitsandbytes to the bit.
"""

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_FP4 = (0.0, 0.0052083334885537624, 2 / 3, 1.0, 1 / 3, 0.5, 1 / 6, 0.25)
FP4 = (*_FP4, *(0.0 - x for x in _FP4))
CODEBOOKS = {"nf4": NF4, "fp4": FP4}
"""by bitsandbytes' name of the type; the place of a number is its code"""
