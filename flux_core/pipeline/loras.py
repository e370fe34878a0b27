"""The LoRAs of a pipeline: which files are attached, and how strong each is, layer by layer and step by step.

Two kinds. `load` attaches a file until its handle is removed, at the handle's scale. A request's LoRAs (entries of its
plan) are attached when it is drawn, and stay until a request without them comes; entries that name the same file share
its branches, and where several are active their scales add up. Text encoders read a prompt once, so they have the
largest of a file's scales at all steps.
"""

from collections.abc import Hashable, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from torch import nn

from ..hooks import Lora
from ..hooks.sites import match_blocks, split
from ..lora import Handle, attach_file, read_lora
from ..lora.file import check_drawable
from ..lora.handle import Networks, Scales, checked_scale
from ..lora.known import Known, find_recorded, locate, record, record_of, remember
from ..strength import step_of
from ..terminal import note
from .components import Components


class Loras:
    """Attaches LoRA files to the networks of a pipeline."""

    def __init__(self, components: Components) -> None:
        self.components = components
        self.own: list[Handle] = []
        """files that the user loaded and will remove"""
        self._known: dict[Handle, Known] = {}
        self._asked: dict[tuple[str, bool, bool], tuple[Handle, Known]] = {}
        """files that the last request asked for, by hash and way"""

    @property
    def networks(self) -> Networks:
        """The transformer, and the text encoders that are modules."""
        encoders = {"clip": self.components.clip, "t5": self.components.t5}
        text = {key: getattr(encoder, "model", encoder) for key, encoder in encoders.items()}
        return {"transformer": self.components.flux} | {k: x for k, x in text.items() if isinstance(x, nn.Module)}

    def load(self, file: str | Path, scale: float, allow_partial: bool, merge: bool) -> Handle:
        """Attach a file until its handle is removed. Errors as in `lora.attach`."""
        checked_scale(scale)
        handle, known = self._attach(locate(str(file)), allow_partial, merge)
        handle.scale = scale
        self.own.append(handle)
        self._known[handle] = known
        return handle

    def _attach(self, path: Path, allow_partial: bool, merge: bool) -> tuple[Handle, Known]:
        params = self.components.flux.params
        file = read_lora(path, params)
        check_drawable(file, params)
        return attach_file(file, self.networks, 1.0, allow_partial, merge), remember(path)

    # What a request asks for ---------------------------------------------------------------------------------------

    def recorded(self, entries: Sequence[Lora]) -> list[Lora]:
        """The entries as a picture carries them, by name and hash. FileError, UsageError."""
        return [record_of(entry) for entry in entries]

    def own_entries(self) -> list[Lora]:
        """The files that the user loaded, as a picture carries them."""
        self._forget_removed()
        return [
            record(self._known[handle], Lora(file=handle.file.name, scale=handle.scale, merge=handle.is_merged))
            for handle in self.own
        ]

    def prepare(self, entries: Sequence[Lora], sigmas: Sequence[float]) -> "LoraSteps | None":
        """Attach what the entries of a request name, and nothing else beside `own`; returns what sets their scales.

        sigmas: the schedule, by which steps are counted.
        """
        self._forget_removed()
        groups: dict[tuple[str, bool, bool], list[Lora]] = {}
        for entry in self.recorded(entries):
            assert entry.sha256 is not None
            groups.setdefault((entry.sha256, entry.partial, entry.merge), []).append(entry)
        wanted, there = sorted(groups), list(self._asked)  # in one order, whatever was drawn before: sums round by it
        kept = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(wanted, there, strict=False))))
        for key in there[kept:]:
            self._asked.pop(key)[0].remove()
        for key in wanted[kept:]:
            first = groups[key][0]
            self._asked[key] = self._attach(find_recorded(first.file, key[0]), first.partial, first.merge)
            note(self._asked[key][0].summary)
        if not groups:
            return None
        steps = LoraSteps([(self._asked[key][0], groups[key]) for key in wanted], sigmas)
        steps.set(sigmas[0])
        return steps

    def text_key(self) -> Hashable:
        """What of the LoRAs an encoded prompt depends on: files that train text encoders, and their scales."""
        self._forget_removed()
        attached = [*((handle, self._known[handle]) for handle in self.own), *self._asked.values()]
        return tuple(
            (known.sha256, handle.is_merged, handle.text_scale)
            for handle, known in attached
            if handle.file.of("clip") or handle.file.of("t5")
        )

    def _forget_removed(self) -> None:
        self.own = [handle for handle in self.own if handle.is_attached]
        self._known = {handle: self._known[handle] for handle in self.own}


class LoraSteps:
    """Sets the scales of a request's LoRAs at each step of a schedule (`model.Adapt`)."""

    def __init__(self, uses: Sequence[tuple[Handle, Sequence[Lora]]], sigmas: Sequence[float]) -> None:
        self.uses, self.sigmas = uses, sigmas
        self._scales: dict[Hashable, list[Scales]] = {}

    def group(self, sigma: float) -> Hashable:
        """Which entries are active at that sigma."""
        step = step_of(sigma, self.sigmas)
        return tuple(entry.at_step(step) for _, entries in self.uses for entry in entries)

    def set(self, sigma: float) -> None:
        """Write the scales of the step at that sigma, where they differ from those in memory."""
        active = self.group(sigma)
        if active not in self._scales:
            self._scales[active] = [_scales(handle, entries, sigma, self) for handle, entries in self.uses]
        for (handle, entries), scales in zip(self.uses, self._scales[active], strict=True):
            handle.write(scales, text_scale(entries))


def _scales(handle: Handle, entries: Sequence[Lora], sigma: float, steps: LoraSteps) -> Scales:
    """The sum of the active entries' scales: one number, or where some are for blocks one for each layer."""
    step = step_of(sigma, steps.sigmas)
    active = [entry for entry in entries if entry.at_step(step)]
    everywhere = float(sum(entry.scale for entry in active if entry.blocks is None))
    if not any(entry.blocks for entry in active):
        return everywhere
    params: Any = handle.networks["transformer"].params
    of_block: dict[str, float] = {}
    for entry in active:
        for block in match_blocks(entry.blocks, params) if entry.blocks else ():
            of_block[block] = of_block.get(block, 0.0) + entry.scale
    return {name: everywhere + of_block.get(split(name)[0], 0.0) for name in handle.places["transformer"]}


def text_scale(entries: Sequence[Lora]) -> float:
    """The scale in the text encoders, which read a prompt once: the largest of those that are for all blocks."""
    return max((entry.scale for entry in entries if entry.blocks is None), key=abs, default=0.0)
