"""The LoRA flags of commands that draw: from what the user typed to entries of a plan, checked by their headers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..checkpoint.files import adapter_path
from ..errors import FileError, UsageError
from ..hooks import Lora
from ..hooks.lora import Typed
from ..hooks.plan import parse_plan
from ..lora.known import checked, find_recorded, locate, record, remember
from ..request.fields import FIELDS, LORAS, pop_fields
from ..terminal import note, one_line
from ..variants import Variant, named_like


def entries_of(fields: dict[str, Any], variant: Variant, told: set[str] | None = None) -> list[Lora]:
    """The LoRAs that these flags name, by their hashes; removes the flags. UsageError, FileError.

    told: files of which nothing more is to be noted; those of the flags are added.
    """
    return [entry for entry, _ in typed_entries(fields, variant, told)]


def typed_entries(fields: dict[str, Any], variant: Variant, told: set[str] | None = None) -> list[tuple[Lora, Typed]]:
    """`entries_of`, each with what was typed."""
    flags = pop_fields(fields, LORAS)
    typed = [Typed.of(words) for words in _groups(flags.get("lora"))]
    own = None if typed else _own_at(flags, variant)
    if not typed and (idle := [FIELDS[name].flag for name, value in flags.items() if value]):
        raise UsageError(f"{idle[0]} does nothing without --lora. Next: add --lora FILE")
    if own:
        return [(own, Typed(own.file, f"{own.scale:g}"))]
    if typed and flags.get("lora_scale") is not None and all(one.scale is not None for one in typed):
        raise UsageError(_idle_scale("every --lora has a scale of its own"))
    if flags.get("lora_scale") is None:
        _note_settings(typed, set() if told is None else told)
    scale = FIELDS["lora_scale"].parse(_text(flags.get("lora_scale")), 1.0)
    options = bool(flags.get("lora_allow_partial")), bool(flags.get("lora_merge"))
    entries = parse_plan([one.entry(scale, *options) for one in typed])
    return [(checked(entry, variant.params), one) for entry, one in zip(entries, typed, strict=True)]  # type: ignore[arg-type]


def _note_settings(typed: Sequence[Typed], told: set[str]) -> None:
    """Say what files without a scale are made to be drawn with, where their names tell: some with an eighth of it."""
    for one in typed:
        if one.scale is None and one.file not in told and (row := named_like(Path(one.file))):
            told.add(one.file)
            note(f"{one_line(one.file)} is named like the LoRA of --name {row.name}, which sets {row.settings}")


def _own_at(flags: dict[str, Any], variant: Variant) -> Lora | None:
    """The model's own LoRA at the scale of --lora-scale, which is popped; None without the flag or such a LoRA."""
    if flags.get("lora_scale") is None or not _has_own(variant):
        return None
    return _own(variant).model_copy(update={"scale": FIELDS["lora_scale"].parse(_text(flags.pop("lora_scale")))})


def _has_own(variant: Variant) -> bool:
    """Whether a LoRA makes the transformer that model."""
    return variant.adapter is not None and not variant.takes.words


def _own(variant: Variant) -> Lora:
    """That LoRA, as pictures carry it. FileError, AccessError, DiskError."""
    path = adapter_path(variant)
    assert path is not None
    return record(remember(path), Lora(file=path.name))


def _checked(entry: Lora, variant: Variant) -> Lora:
    """`checked`; the model's own LoRA was, when it became the model's."""
    if entry.sha256 is not None and _has_own(variant) and entry.sha256 == _own(variant).sha256:
        return entry
    return checked(entry, variant.params)


def _idle_scale(reason: str) -> str:
    return f"--lora-scale is for LoRAs without a scale of their own, and {reason}. Next: leave it out"


def _groups(value: Any) -> Sequence[Any]:
    """The words of each --lora. A file of prompts gives one text, or in JSON a list."""
    if not value:
        return ()
    if isinstance(value, str):
        return [value]
    return value if any(isinstance(item, list) for item in value) else [value]


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def checked_plan(plan: Sequence[Any], variant: Variant) -> tuple[Any, ...]:
    """A plan with its LoRAs `checked`."""
    return tuple(_checked(entry, variant) if isinstance(entry, Lora) else entry for entry in plan)


def located(recorded: Sequence[Lora], given: Sequence[Any], variant: Variant) -> list[tuple[Lora, Typed | None]]:
    """A picture's LoRAs, whose files are among those given, or are remembered; each with what was typed for it.

    Files given beside are appended. FileError asks for a file that is nowhere.
    """
    if recorded and _has_own(variant):
        _own(variant)  # which is remembered
    typed = [Typed.of(words) for words in _groups(given)]
    files = {locate(one.file): one for one in typed}
    found: list[tuple[Lora, Typed | None]] = []
    used: set[Path] = set()
    for entry in recorded:
        assert entry.sha256 is not None
        path = find_recorded(entry.file, entry.sha256, files)
        used.add(path)
        found.append((entry, files.get(path)))
    return found + [(Lora(file=str(path)), one) for path, one in files.items() if path not in used]


def found_again(recorded: Sequence[Lora], given: Sequence[Any], variant: Variant, what: str) -> list[Lora]:
    """The LoRAs that `what` records, `checked`, at their own scales. FileError for a file that is none of them,
    UsageError for a scale."""
    found = located(recorded, given, variant)
    names = ", ".join(one_line(entry.file) for entry in recorded)
    for entry, typed in found:
        if typed is not None and typed.text is not None:
            raise UsageError(
                f"--lora {typed.file} {typed.text}: {what} has scales of its own, and they are kept. Next: leave "
                f"{typed.text} out, or draw anew"
            )
        if entry.sha256 is None and typed is not None:
            those = (
                f"none of {what}'s LoRAs, by its SHA-256 ({names})" if recorded else f"no LoRA of {what}: it has none"
            )
            raise FileError(f"{typed.file} is {those}. Next: leave it out, or draw anew")
    return [_checked(entry, variant) for entry, _ in found]


def changed_plan(plan: Sequence[Any], fields: dict[str, Any], variant: Variant) -> tuple[Any, ...]:
    """A recorded picture's plan with the LoRAs of the flags: a scale typed for one of its files replaces the recorded
    one, other files are added. Removes the flags."""
    flags = pop_fields(fields, LORAS)
    options = bool(flags.get("lora_allow_partial")), bool(flags.get("lora_merge"))
    default = FIELDS["lora_scale"].parse(_text(flags.get("lora_scale")))
    recorded, given = [x for x in plan if isinstance(x, Lora)], flags.get("lora") or ()
    if default is not None and not (recorded or given) and _has_own(variant):
        recorded = [_own(variant)]
    found, entries = located(recorded, given, variant), list[Lora]()
    if default is not None and all(one is not None and one.scale is not None for _, one in found):
        raise UsageError(_idle_scale("each has one" if found else "the picture has no LoRA"))
    if any(options) and not given:
        flag = FIELDS["lora_allow_partial" if options[0] else "lora_merge"].flag
        raise UsageError(f"{flag} does nothing without --lora. Next: add --lora FILE")
    for entry, one in found:
        scale = entry.scale if default is None else default
        is_new = entry.sha256 is None
        if one is not None and (is_new or one.scale is not None):
            changed: Mapping[str, Any] = one.entry(1.0 if default is None else default, *options)
            (new,) = parse_plan([{**changed, "blocks": entry.blocks} if entry.blocks else changed])
            entries.append(checked(new, variant.params))  # type: ignore[arg-type]
        else:
            partial, merge = options if one is not None else (False, False)
            update = {"scale": scale, "partial": entry.partial or partial, "merge": entry.merge or merge}
            entries.append(_checked(entry.model_copy(update=update), variant))
    return (*(x for x in plan if not isinstance(x, Lora)), *entries)
