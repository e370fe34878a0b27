"""Plans: lists of interventions, parsed from JSON, the command line or Python, and checked against a model.

    [{"kind": "skip", "blocks": ["single_blocks.9"]},
     {"kind": "scale", "sites": ["double_blocks.*.img_mod1.gate"], "value": 0.9, "steps": ["0-14"]}]

`parse_plan` checks the entries' keys and values; `check_plan` checks names, steps and conflicting writers.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from ..errors import FluxError, HookError, UsageError, nearest
from ..files import expand_home
from ..jsonfile import first_finding, in_words, read_json
from ..params import FluxParams
from .attention_maps import AttentionMaps
from .attention_mask import AttentionMask
from .capture import Capture
from .change import Add, Replace, Scale
from .custom import Custom
from .first_block_cache import FirstBlockCache
from .intervention import Intervention
from .lora import Lora
from .python import OfPython, Python, is_python, pinned
from .seam import Around, Placed, Read, Write
from .share_kv import ShareKV
from .sites import is_inside, split
from .skip import Skip
from .step_cache import StepCache
from .velocity import Sampler, Wrap

_KINDS = (
    Skip, Capture, AttentionMaps, AttentionMask, ShareKV, Scale, Add, Replace, FirstBlockCache, Lora,
    Custom, Wrap, Sampler, Python, StepCache,
)  # fmt: skip
KINDS: dict[str, type[Intervention]] = {kind.model_fields["kind"].default: kind for kind in _KINDS}
AnyIntervention = Annotated[
    Skip | Capture | AttentionMaps | AttentionMask | ShareKV | Scale | Add | Replace | FirstBlockCache | Lora
    | Custom | Wrap | Sampler | Python | StepCache,
    Field(discriminator="kind"),
]  # fmt: skip
PATHS = ("to", "file", "fn")
"""keys of files and folders, in an entry and in its tensor"""
READ = ("file", "fn")
"""those of files to read, which may lie beside the plan"""
Plan = tuple[AnyIntervention, ...]
_PLAN: TypeAdapter[Plan] = TypeAdapter(Plan)


def parse_plan(entries: Any) -> Plan:
    """A plan from parsed JSON or from interventions. UsageError names entry, finding and nearest known word."""
    if isinstance(entries, dict | Intervention):
        entries = [entries]
    try:
        return _PLAN.validate_python(list(entries))
    except (ValidationError, TypeError) as error:
        raise UsageError(_finding(error, entries)) from None


def read_plan(path: str | Path) -> Plan:
    """The plan in a JSON file, or that a function of a Python file returns (`my.py`, or `my.py:name`).

    Only for a file that the user himself named: the Python that it names is run. FileError if a file can't be read,
    UsageError if it is no plan.
    """
    if is_python(str(path)):
        return (pinned(Python(fn=str(path))),)
    entries = read_json(path, "the plan")
    if not isinstance(entries, list | dict):
        raise UsageError(f"{path}: a plan is a list of interventions")
    try:
        return pin(parse_plan(_with_whole_paths(entries, Path(path).parent)))
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None


def pin(plan: Plan) -> Plan:
    """The plan with its functions from files loaded. Only for what the user himself wrote. FileError, UsageError."""
    return tuple(pinned(entry) if isinstance(entry, OfPython) else entry for entry in plan)


def _with_whole_paths(found: Any, folder: Path) -> Any:
    """Parsed JSON, its paths without `~`, those of files to read in `folder` where they are there. UsageError."""
    if isinstance(found, list):
        return [_with_whole_paths(one, folder) for one in found]
    if isinstance(found, dict):
        whole = {key: expand_home(found[key], key) for key in PATHS if isinstance(found.get(key), str)}
        for key in whole.keys() & set(READ):
            if (folder / re.sub(r":\w+$", "", whole[key])).exists():
                whole[key] = str(folder / whole[key])
        return {key: _with_whole_paths(value, folder) for key, value in found.items()} | whole
    return found


def from_python(fn: Callable[[FluxParams], Any], called: str, params: FluxParams) -> tuple[Intervention, ...]:
    """The interventions that a function returns. HookError for an exception, or anything else that it returns."""
    try:
        plan = listed(fn(params))
    except Exception as error:
        if isinstance(error, FluxError):
            raise HookError(f"{called}: {error}") from error
        raise HookError(f"{called} raised {type(error).__name__}: {error}") from error
    if others := [entry.kind for entry in plan if isinstance(entry, Lora | Python)]:
        raise HookError(f"{called}: a function returns no {others[0]}. Next: --lora for LoRAs")
    return plan


def expanded(plan: Iterable[Intervention], params: FluxParams) -> tuple[Intervention, ...]:
    """The plan with what its Python functions return in their places: fresh state for one picture. HookError."""
    return tuple(
        one for entry in plan for one in (entry.interventions(params) if isinstance(entry, Python) else (entry,))
    )


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
    names, steps = names_and_steps(f"--{kind}", text)
    entry: dict[str, Any] = {"kind": kind, "blocks": names}
    return entry if steps is None else {**entry, "steps": steps}


def names_and_steps(flag: str, text: str) -> tuple[str, str | None]:
    """What a flag's text names, and the steps behind an @, None without one. UsageError for an @ without steps."""
    names, at, steps = text.partition("@")
    if at and not steps.strip():
        raise UsageError(
            f"{flag} {text}: no steps behind the @. Next: {names.strip()}@0-14, or leave the @ out for all steps"
        )
    return names, steps if at else None


def listed(plan: Any) -> tuple[Intervention, ...]:
    """A plan, or a single intervention, as a tuple; entries may be JSON. UsageError for anything else."""
    if plan is None or isinstance(plan, Intervention | dict):
        plan = [] if plan is None else [plan]
    if not isinstance(plan, Iterable) or isinstance(plan, str):
        return parse_plan(plan)  # which says what is wrong
    return tuple(entry if isinstance(entry, Intervention) else parse_plan([entry])[0] for entry in plan)


def check_plan(
    plan: Intervention | Iterable[Intervention],
    params: FluxParams,
    num_steps: int,
    branches: tuple[str, ...] = ("image",),
) -> None:
    """Check a plan for a model, without running it. UsageError for anything that does not fit."""
    # what Python returns is checked when it is run; a record of code can only be asked for
    plan = [x for x in listed(plan) if not (isinstance(x, Python) or (isinstance(x, OfPython) and x.is_missing))]
    for intervention in plan:
        intervention.check_steps(num_steps)
    if len([x for x in plan if isinstance(x, StepCache)]) > 1:
        raise UsageError(
            "two step_caches leave out steps, and the slopes of each are for its own alone. Next: leave out one, which "
            "may be --cache"
        )
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


def hidden(functions: Iterable[tuple[Intervention, Placed]]) -> Iterator[str]:
    """A line for people for each block that is skipped at steps where functions inside it would be called."""
    functions = list(functions)
    skips = {placed.block: one for one, placed in functions if isinstance(one, Skip) and isinstance(placed, Around)}
    for one, placed in functions:
        sites = placed.sites if isinstance(placed, Read) else (placed.site,) if isinstance(placed, Write) else ()
        for block, site in map(split, sites):
            if is_inside(site) and block in skips and _overlap(one, skips[block]):
                yield f"{block} is skipped: {one.label} has no effect at {block}.{site} then"
                del skips[block]  # one line is enough


def _overlap(a: Intervention, b: Intervention) -> bool:
    """Whether two interventions have a step in common. An intervention never conflicts with itself."""
    if a is b:
        return False
    return a.steps is None or b.steps is None or bool(set(a.steps) & set(b.steps))


__all__ = ["KINDS", "Custom", "Plan", "check_plan", "parse_plan", "place_all", "read_plan", "short_form"]
