"""The LoRAs of a pipeline: which files are attached, and how strong each is, layer by layer and step by step.

Two kinds. `load` attaches a file until its handle is removed, at the handle's scale. A request's LoRAs (entries of its
plan) are attached when it is drawn, and stay until a request without them comes; entries that name the same file share
its branches, and where several are active their scales add up. Entries that name the file which makes the transformer
another model say how strong that is. Text encoders read a prompt once, so they have the largest of a file's scales at
all steps.
"""

from collections.abc import Hashable, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from ..errors import UsageError
from ..hooks import Lora
from ..hooks.sites import match_blocks, split
from ..lora import Handle, attach_file, attached, read_lora
from ..lora.dialects import Network
from ..lora.file import check_drawable, check_tokens
from ..lora.handle import Networks, Scales, checked_scale, own_params
from ..lora.known import Known, find_recorded, locate, record, record_of, remember
from ..lora.tensors import read_tokens
from ..model import Adapt
from ..strength import step_of
from ..terminal import note
from ..text import TextEncoder, TrainedWords
from .components import Components


class Loras:
    """Attaches LoRA files to the networks of a pipeline."""

    def __init__(self, components: Components) -> None:
        self.components = components
        self._known: WeakKeyDictionary[Handle, Known] = WeakKeyDictionary()
        self._asked: dict[tuple[str, bool, bool], Handle] = {}
        """files that the last request asked for, by hash and way"""
        self._naming: list[Handle] = []
        """files whose trained tokens the text encoders know"""
        self._of_model: Handle | None = None
        """a LoRA that makes the transformer another model, as a row of `variants` says"""
        self.also: list[Adapt] = []
        """what else sets numbers in the transformer by the noise level: an adapter that learns"""

    @property
    def own(self) -> list[Handle]:
        """Files that the user attached, by `load` or `lora.attach`, and will remove."""
        asked = [*self._asked.values(), self._of_model]
        return [handle for handle in attached(self.components.flux) if handle not in asked]

    @property
    def networks(self) -> Networks:
        """The transformer, and the text encoders that are modules; those that were freed have no LoRAs."""
        encoders = {"clip": self.components.clip, "t5": self.components.t5}
        text = {key: getattr(encoder, "model", encoder) for key, encoder in encoders.items()}
        return {"transformer": self.components.flux} | {k: x for k, x in text.items() if isinstance(x, nn.Module)}

    def load(self, file: str | Path, scale: float, allow_partial: bool, merge: bool) -> Handle:
        """Attach a file until its handle is removed. Errors as in `lora.attach`."""
        return self._attach(locate(str(file)), checked_scale(scale), allow_partial, merge)

    def become(self, file: Path, scale: float) -> None:
        """Attach the LoRA that makes the transformer another model, and may make its input wider. Errors likewise."""
        self._of_model = self._attach(file, scale, False, False, own=True)

    def _attach(self, path: Path, scale: float, allow_partial: bool, merge: bool, own: bool = False) -> Handle:
        params = own_params(self.components.flux)
        file = read_lora(path, params)
        if not own:
            check_drawable(file, params)
        check_tokens(file, params)
        known = remember(path)  # before anything is attached: it may not be readable
        if file.of("t5") and isinstance(self.components.t5, TextEncoder):
            self.components.t5.ready()
        handle = attach_file(file, self.networks, scale, allow_partial, merge)
        self._known[handle] = known
        return handle

    # What a request asks for ---------------------------------------------------------------------------------------

    def recorded(self, entries: Sequence[Lora]) -> list[Lora]:
        """The entries as a picture carries them, by name and hash. FileError, UsageError."""
        return [record_of(entry) for entry in entries]

    def own_entries(self) -> list[Lora]:
        """The files that the user attached, as a picture carries them. FileError for one that is gone."""
        return [self._record(handle) for handle in self.own]

    def _record(self, handle: Handle) -> Lora:
        if handle not in self._known:  # somebody else attached it
            self._known[handle] = remember(handle.file.header.path)
        file, is_partial = handle.file, bool(handle.file.unmatched)
        entry = Lora(file=file.name, scale=handle.scale, partial=is_partial, merge=handle.is_merged)
        return record(self._known[handle], entry)

    def branched(self, entries: Sequence[Lora]) -> bool:
        """Whether there will be branches beside layers when a request with these entries is drawn."""
        beside = self._of_model is not None or not all(handle.is_merged for handle in self.own)
        return beside or not all(x.merge for x in entries)

    def prepare(self, entries: Sequence[Lora], sigmas: Sequence[float]) -> "LoraSteps | None":
        """Attach what the entries of a request name, and nothing else beside `own`; returns what sets their scales.

        sigmas: the schedule, by which steps are counted.
        """
        groups: dict[tuple[str, bool, bool], list[Lora]] = {}
        recorded, of_model = self.recorded(entries), self._of_model
        its_own = [entry for entry in recorded if of_model and entry.sha256 == self._known[of_model].sha256]
        for entry in (one for one in recorded if one not in its_own):
            assert entry.sha256 is not None
            groups.setdefault((entry.sha256, entry.partial, entry.merge), []).append(entry)
        wanted, there = sorted(groups), list(self._asked)  # in one order, whatever was drawn before: sums round by it
        kept = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(wanted, there, strict=False))))
        for key in there[kept:]:
            self._asked.pop(key).remove()
        for key in wanted[kept:]:
            first = groups[key][0]
            scale = first.scale if first.merge else 1.0  # weights are summed once, at their scale
            self._asked[key] = self._attach(find_recorded(first.file, key[0]), scale, first.partial, first.merge)
            note(self._asked[key].summary)
        uses: list[tuple[Handle, Sequence[Lora]]] = [(self._asked[key], groups[key]) for key in wanted]
        if of_model and its_own:
            uses.append((of_model, its_own))
        elif of_model:
            of_model.write(of_model.scale)  # that of its row
        asked = [handle for handle, _ in uses]
        ranked = [x for x in attached(self.components.flux) if x.file.schedule is not None and x not in asked]
        if not (uses or ranked or self.also):
            return None
        steps = LoraSteps(uses, sigmas, [*ranked, *self.also])
        steps.set(sigmas[0])
        return steps

    def text_key(self) -> tuple[tuple[Known | Handle, bool, float], ...]:
        """What of the LoRAs an encoded prompt depends on: files that train text encoders, how they are attached, scale.

        A handle stands for a file that somebody else attached.
        """
        networks = self.networks.values()
        handles = dict.fromkeys(handle for network in networks for handle in attached(network))
        return tuple(
            (self._known.get(handle, handle), handle.is_merged, handle.text_scale)
            for handle in handles
            if handle.file.of("clip") or handle.file.of("t5") or handle.file.named_tokens
        )

    def words(self, entries: Sequence[Lora]) -> TrainedWords:
        """The trained tokens that T5 knows while a request with these entries is drawn. FileError, NonFiniteError."""
        params, asked = own_params(self.components.flux), self.recorded(entries)
        files = [read_lora(find_recorded(x.file, x.sha256), params) for x in asked if x.sha256 is not None]
        every = [*(handle.tokens for handle in self.own), *map(read_tokens, files)]
        return TrainedWords({word: x for of in every for word, x in of.get("t5", {}).items()})

    def name_tokens(self) -> None:
        """Give the text encoders the trained tokens of the files that are attached. UsageError where two have one."""
        handles = [handle for handle in attached(self.components.flux) if handle.file.named_tokens]
        if handles == self._naming:
            return
        words = [word for handle in handles for word in handle.file.named_tokens]
        if twice := next((word for word in words if words.count(word) > 1), None):
            raise UsageError(f"two files have vectors for {twice!a}. Next: leave one of them out")
        encoders: dict[Network, Any] = {"clip": self.components.clip, "t5": self.components.t5}
        for network, encoder in encoders.items():
            vectors = {word: x for handle in handles for word, x in handle.tokens.get(network, {}).items()}
            encoder.trained = TrainedWords(vectors)
        self._naming = handles


class LoraSteps:
    """Sets the scales of a request's LoRAs, and T-LoRAs' ranks, at each step of a schedule (`model.Adapt`)."""

    def __init__(
        self, uses: Sequence[tuple[Handle, Sequence[Lora]]], sigmas: Sequence[float], also: Sequence[Adapt] = ()
    ) -> None:
        """also: what has no scales of the request, and hangs on the noise level."""
        self.uses, self.sigmas, self.also = uses, sigmas, also
        self._scales: dict[Hashable, list[Scales]] = {}

    def group(self, sigma: float) -> Hashable:
        """Which entries are active at that sigma, and how many ranks."""
        return self._active(sigma), *(one.group(sigma) for one in (*(handle for handle, _ in self.uses), *self.also))

    def _active(self, sigma: float) -> tuple[bool, ...]:
        if not self.uses:
            return ()
        step = step_of(sigma, self.sigmas)
        return tuple(entry.at_step(step) for _, entries in self.uses for entry in entries)

    def set(self, sigma: float) -> None:
        """Write the scales and ranks of the step at that sigma, where they differ from those in memory."""
        active = self._active(sigma)
        if active not in self._scales:
            self._scales[active] = [_scales(handle, entries, sigma, self) for handle, entries in self.uses]
        for (handle, entries), scales in zip(self.uses, self._scales[active], strict=True):
            handle.write(scales, text_scale(entries), handle.file.active(sigma))
        for one in self.also:
            one.set(sigma)


def _scales(handle: Handle, entries: Sequence[Lora], sigma: float, steps: LoraSteps) -> Scales:
    """The sum of the active entries' scales: one number, or where some are for blocks one for each layer and norm."""
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
    return {name: everywhere + of_block.get(split(name)[0], 0.0) for name in handle.names}


def text_scale(entries: Sequence[Lora]) -> float:
    """The scale in the text encoders, which read a prompt once: the largest of those that are for all blocks."""
    return max((entry.scale for entry in entries if entry.blocks is None), key=abs, default=0.0)
