"""Plans: lists of interventions, parsed from JSON, the command line or Python, and checked against a model.

    [{"kind": "skip", "blocks": ["single_blocks.9"]},
     {"kind": "scale", "sites": ["double_blocks.*.img_mod1.gate"], "value": 0.9, "steps": ["0-14"]}]

`parse_plan` checks the entries' keys and values; `check_plan` checks names, steps and conflicting writers.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from ..errors import UsageError, nearest
from ..files import expand_home
from ..jsonfile import first_finding, in_words, read_json
from ..params import FluxParams
from .attention_maps import AttentionMaps
from .capture import Capture
from .change import Add, Replace, Scale
from .custom import Custom
from .first_block_cache import FirstBlockCache
from .intervention import Intervention
from .lora import Lora
from .seam import Around, Placed, Write
from .share_kv import ShareKV
from .skip import Skip

KINDS: dict[str, type[Intervention]] = {
    kind.model_fields["kind"].default: kind
    for kind in (Skip, Capture, AttentionMaps, ShareKV, Scale, Add, Replace, FirstBlockCache, Lora)
}
AnyIntervention = Annotated[
    Skip | Capture | AttentionMaps | ShareKV | Scale | Add | Replace | FirstBlockCache | Lora,
    Field(discriminator="kind"),
]
PATHS = ("to", "file")
"""keys of files and folders, in an entry and in its tensor"""
Plan = tuple[AnyIntervention, ...]
_PLAN: TypeAdapter[Plan] = TypeAdapter(Plan)


def parse_plan(entries: Any) -> Plan:
    """A plan from parsed JSON or from interventions. UsageError names entry, finding and nearest known word."""
    if isinstance(entries, dict):
        entries = [entries]
    try:
        return _PLAN.validate_python(list(entries))
    except (ValidationError, TypeError) as error:
        raise UsageError(_finding(error, entries)) from None


def read_plan(path: str | Path) -> Plan:
    """The plan in a JSON file. FileError if it can't be read, UsageError if it is no plan."""
    entries = read_json(path, "the plan")
    if not isinstance(entries, list | dict):
        raise UsageError(f"{path}: a plan is a list of interventions")
    try:
        return parse_plan(_with_whole_paths(entries))
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None


def _with_whole_paths(found: Any) -> Any:
    """Parsed JSON, its paths without `~`. UsageError where there is no such home folder."""
    if isinstance(found, list):
        return [_with_whole_paths(one) for one in found]
    if isinstance(found, dict):
        whole = {key: expand_home(found[key], key) for key in PATHS if isinstance(found.get(key), str)}
        return {key: _with_whole_paths(value) for key, value in found.items()} | whole
    return found


def _finding(error: ValidationError | TypeError, entries: Any) -> str:
    if isinstance(error, TypeError):
        return f"a plan is a list of interventions, not {type(entries).__name__}"
    first = first_finding(error)
    where = [part for place, part in enumerate(first["loc"]) if place != 1]  # there is the kind
    number = int(where[0]) + 1 if where and isinstance(where[0], int) else 1
    entry = entries[number - 1] if isinstance(entries, Sequence) and len(entries) >= number else None
    kind = entry.get("kind") if isinstance(entry, dict) else getattr(entry, "kind", None)
    start = f"entry {number} of the plan"
    if first["type"].startswith("union_tag"):
        hint = nearest(str(kind), list(KINDS))
        return f"{start}: there is no intervention {kind!r}; kinds are {', '.join(KINDS)}.{hint}"
    key = str(where[1]) if len(where) > 1 else ""
    return in_words(first, f"{start} ({kind})", key, KINDS[kind].model_fields if kind in KINDS else ())


def short_form(kind: str, text: str) -> dict[str, Any]:
    """`single_blocks.9,layer.3@0-14` as a plan's entry: the blocks, and behind @ the steps, which must not be empty."""
    meant, at, steps = text.partition("@")
    if at and not steps.strip():
        raise UsageError(
            f"--{kind} {text}: no steps behind the @. Next: {meant.strip()}@0-14, or leave the @ out for all steps"
        )
    entry: dict[str, Any] = {"kind": kind, "blocks": meant}
    return {**entry, "steps": steps} if at else entry


def check_plan(
    plan: Iterable[Intervention], params: FluxParams, num_steps: int, branches: tuple[str, ...] = ("image",)
) -> None:
    """Check a plan for a model, without running it. UsageError for anything that does not fit."""
    for intervention in plan:
        intervention.check_steps(num_steps)
    place_all(plan, params, branches)


def place_all(
    plan: Iterable[Intervention], params: FluxParams, branches: tuple[str, ...]
) -> list[tuple[Intervention, Placed]]:
    """All functions of a plan, in its order, with fresh state. UsageError for two writers of the same value."""
    functions = [(intervention, placed) for intervention in plan for placed in intervention.place(params, branches)]
    writers: dict[str, list[Intervention]] = {}
    for second, placed in functions:
        if isinstance(placed, Around | Write):
            place = placed.block if isinstance(placed, Around) else placed.site
            for first in writers.setdefault(place, []):
                if not second.follow and _overlap(first, second):
                    raise UsageError(
                        f"{first.kind} and {second.kind} both write {place} at the same step. Next: give the second "
                        '"follow": true to apply it to the result of the first'
                    )
            writers[place].append(second)
    return functions


def _overlap(a: Intervention, b: Intervention) -> bool:
    """Whether two interventions have a step in common. An intervention never conflicts with itself."""
    if a is b:
        return False
    return a.steps is None or b.steps is None or bool(set(a.steps) & set(b.steps))


__all__ = ["KINDS", "Custom", "Plan", "check_plan", "parse_plan", "place_all", "read_plan", "short_form"]
