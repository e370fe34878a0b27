"""Sampling of a rectified flow, with the official names."""

from .flow import (
    OnStep,
    SampledRun,
    Step,
    Velocity,
    denoise,
    euler,
    flow_velocity,
    get_noise,
    get_schedule,
    image_ids,
    invert,
    pack,
    prepare,
    start_from_image,
    time_shift,
    unpack,
)

__all__ = [
    "OnStep",
    "SampledRun",
    "Step",
    "Velocity",
    "denoise",
    "euler",
    "flow_velocity",
    "get_noise",
    "get_schedule",
    "image_ids",
    "invert",
    "pack",
    "prepare",
    "start_from_image",
    "time_shift",
    "unpack",
]
