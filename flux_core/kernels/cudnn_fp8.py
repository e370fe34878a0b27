"""Attention in e4m3 by cuDNN's own kernel, through NVIDIA's package `nvidia-cudnn-frontend`.

cuDNN takes q, k, v [B, H, L, D] with any strides and a scale for each of the three, and on Hopper writes e4m3 with one
scale. No attention is larger than the largest value, so the scale of values is that of the result, too.
`codes.quantize` rotates and centres q and k, which need no scale, and writes values in rows by one.
"""

from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .eight_bits import E4M3, P_LARGEST, Eight
from .launch import opaque


class Plan(NamedTuple):
    """A graph of cuDNN's, compiled for one shape."""

    graph: Any
    tensors: dict[str, Any]
    """its inputs and outputs, by name"""
    workspace: int
    """bytes"""


@lru_cache(16)
def plan_for(device: torch.device, B: int, H: int, L: int, D: int, padded: int) -> Plan:
    """Attention of q, k, v whose heads have `padded` rows in memory, to [B, L, H, D]."""
    import cudnn

    kinds = cudnn.data_type
    graph = cudnn.pygraph(
        io_data_type=kinds.FP8_E4M3,
        intermediate_data_type=kinds.FLOAT,
        compute_data_type=kinds.FLOAT,
        handle=handle_of(device),
    )

    def tensor(name: str, *sizes: int, stride: tuple[int, ...], kind: Any) -> Any:
        return graph.tensor(name=name, dim=list(sizes), stride=list(stride), data_type=kind)

    tensors = {
        name: tensor(name, B, H, L, D, stride=(H * padded * D, padded * D, D, 1), kind=kinds.FP8_E4M3) for name in "qkv"
    }
    for name in ("descale_q", "descale_k", "descale_v", "descale_s", "scale_s", "scale_o"):
        tensors[name] = tensor(name, 1, 1, 1, 1, stride=(1, 1, 1, 1), kind=kinds.FLOAT)
    o, _, amax_s, amax_o = graph.sdpa_fp8(**tensors, generate_stats=False, attn_scale=D**-0.5)
    o.set_output(True).set_dim([B, H, L, D]).set_stride([L * H * D, D, H * D, 1]).set_data_type(kinds.FP8_E4M3)
    for one in (amax_s, amax_o):
        one.set_output(True).set_dim([1, 1, 1, 1]).set_stride([1, 1, 1, 1]).set_data_type(kinds.FLOAT)
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A])
    graph.check_support()
    graph.build_plans()
    return Plan(graph, tensors | {"o": o, "amax_s": amax_s, "amax_o": amax_o}, graph.get_workspace_size())


@cache
def handle_of(device: torch.device) -> Any:
    """cuDNN's handle for a device, kept to the end of the process."""
    import cudnn

    with torch.cuda.device(device):
        return cudnn.create_handle()


@cache
def constants(device: torch.device) -> dict[str, Tensor]:
    """The scales that never change."""
    one, largest = (torch.full((1,), x, dtype=torch.float32, device=device) for x in (1.0, P_LARGEST["fp8"]))
    return {"descale_q": one, "descale_k": one, "scale_s": largest, "descale_s": 1 / largest}


def attend_codes(eight: Eight, tokens: int) -> Tensor:
    """Attention of codes by `codes.quantize`: e4m3 [B, tokens, H, D], by the scale of values."""
    import cudnn

    (B, H, padded, D), device, fp32 = eight.q.shape, eight.q.device, torch.float32
    plan, handle = plan_for(device, B, H, tokens, D, padded), handle_of(device)
    found = torch.empty((B, tokens, H, D), dtype=E4M3, device=device)
    amax_s, amax_o = (torch.empty(1, dtype=fp32, device=device) for _ in range(2))
    given = {"q": eight.q, "k": eight.k, "v": eight.v, "o": found, "amax_s": amax_s, "amax_o": amax_o}
    given |= {**constants(device), "descale_v": eight.v_scale[:1], "scale_o": eight.v_scale[1:]}
    cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream(device).cuda_stream)
    workspace = torch.empty(plan.workspace, dtype=torch.uint8, device=device)
    plan.graph.execute({plan.tensors[name]: x for name, x in given.items()}, workspace, handle=handle)
    return found


def _attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1] * q.shape[3])


@opaque("attend_cudnn_fp8", _attended)
def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`ops.attend` in e4m3, without a gradient. q, k, v: [B, H, L, D] -> [B, L, H*D]"""
    from .codes import quantize, widened  # which import Triton

    eight = quantize(q, k, v, "fp8")
    return widened(attend_codes(eight, q.shape[2]).flatten(2), eight.v_scale, q.dtype)
