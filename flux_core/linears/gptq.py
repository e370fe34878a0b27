"""GPTQ: weights rounded to e4m3 one column after the other, where each compensates the errors of those before it.

The idea. Plain rounding takes every weight to its nearest code. Its error in a Linear's output is the same at similar
tokens, so it shifts a picture the same way step after step. But features of an input are correlated, and the error of
one column can be compensated by the columns that are not rounded yet (Frantar et al., arXiv 2210.17323,
after Optimal Brain Surgeon). With x the inputs of a Linear in a calibration, the aim is the output:

    minimize  |(W - Q) X|^2 = trace((W - Q) H (W - Q)^T),     H = sum_x x x^T + d I,     Q: e4m3 times its row's scale

Rows are independent. With column k rounded, the best that the others j > k can do for a row is

    e = (w_k - q_k) / u_kk        w_j -= e u_kj        U upper triangular, U^T U = H^-1

Columns go in the order of their energy H_kk, the largest first, while most of the others are still free. The
damping d keeps updates small, so that a few prompts do not overfit. As a share of H's mean diagonal, and the part that
is left of the squared error of plain rounding in flux-mini's velocity, on other prompts:

    d                                   0.01   0.02   0.05   0.1    0.5
    calibrated on 32 prompts            0.42   0.39   0.42   0.44   0.48
    calibrated on the first 8 of them   0.56   0.55   0.54   0.50   0.52

The trade-off. Codes, scales, file and kernels are those of `fp8.py`, and so is the time of a step. It costs a
calibration, once: trajectories of the model's own, a K x K matrix for each Linear, and minutes where plain rounding
takes seconds.

Precision. The factor is computed in fp64. With so little damping H's eigenvalues lie up to K / 0.02 apart, at full size
3/4 of a million, which would leave fp32 a digit or two; and it is little work beside the gathering. All else is fp32.

Not here: error feedback without H, corrected biases, smoothed inputs and tokens that are kept in bf16. Each was tried
on flux-mini, and took a tenth of the error away at most (docs/performance.md).
"""

import math

import torch
from torch import Tensor

from .fp8 import E4M3, LARGEST, QuantizedTokens, quantize_rows

DAMPING = 0.02
"""of H's mean diagonal, added to it"""
BLOCK = 128
"""columns after whose rounding all that follow are updated, in one product"""


def gptq(weight: Tensor, moment: Tensor, block: int = BLOCK) -> QuantizedTokens:
    """weight [N, K] -> codes e4m3 [N, K] and the scales fp32 [N, 1] that plain rounding has.

    moment: sum of x x^T over the inputs, in any unit, fp32 [K, K], on the device that computes. Where it is
    zero or not finite this is plain rounding.
    """
    weight = weight.to(moment.device)
    scale = quantize_rows(weight).scale
    order = moment.diagonal().argsort(descending=True, stable=True)
    u = factor(moment[order][:, order])
    columns = (weight / scale).t()[order].contiguous()  # [K, N]: those not rounded yet, behind the rounded ones
    for start in range(0, len(columns), block):
        here = columns[start : start + block]
        rows = u[start : start + block]
        near, far = rows[:, start : start + block], rows[:, start + block :]
        errors = torch.empty_like(here)
        for k, column in enumerate(here):
            rounded = column.clamp(-LARGEST, LARGEST).to(E4M3).float()  # an update may exceed 448
            errors[k] = (column - rounded) / near[k, k]
            here[k] = rounded
            here[k + 1 :].addr_(near[k, k + 1 :], errors[k], alpha=-1)
        columns[start + block :].addmm_(far.t(), errors, alpha=-1)
    return QuantizedTokens(columns[order.argsort()].t().contiguous().to(E4M3), scale)


def factor(moment: Tensor, damping: float = DAMPING) -> Tensor:
    """U, fp32 [K, K], upper triangular with U^T U = (moment + d I)^-1; the identity if it is zero or not finite.

    The damping is raised until the sum is positive definite.
    """
    mean = moment.diagonal().double().mean().item()
    eye = torch.eye(len(moment), dtype=torch.float64, device=moment.device)
    if not 0 < mean < math.inf:
        return eye.float()
    # Cholesky from the last row on, J H J = L L^T with J the reversal: then U = J L^-1 J, without H^-1 itself.
    flipped = moment.double().flip(0, 1)
    while True:
        flipped.diagonal().add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(flipped)
        if not failed:
            break
        damping *= 2
    return torch.linalg.solve_triangular(lower, eye, upper=False).flip(0, 1).float()
