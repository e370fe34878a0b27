"""The flags of plans: from what the user typed to interventions, with the functions of his own files loaded."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args

from ..errors import FileError, UsageError, nearest
from ..hooks import Custom, Intervention, StepCache
from ..hooks.plan import Plan, names_and_steps, parse_plan, pin, read_plan, short_form
from ..hooks.python import OfPython, file_and_name, is_python, load, reads_only
from ..hooks.step_cache import PresetName
from ..jsonfile import read_json
from ..terminal import one_line
from .fields import PLAN


def given_plan(flags: dict[str, Any]) -> Plan:
    """The interventions of --plan, --skip, --hook, --wrap, --sampler and --cache, in this order; removes these flags.

    FileError, UsageError.
    """
    found = {field.name: flags.pop(field.name) for field in PLAN if field.name in flags}
    entries = read_plan(found["plan"]) if "plan" in found else ()
    skips = parse_plan([short_form("skip", text) for text in found.get("skip", ())])
    hooks = _hooks(_flat(found.get("hook")), _flat(found.get("at")), found.get("hook_steps"))
    others = [{"kind": kind, "fn": text} for kind in ("wrap", "sampler") for text in _flat(found.get(kind))]
    caches = [_cache(found["cache"])] if "cache" in found else []  # the last: around all that costs forwards
    return (*entries, *skips, *hooks, *pin(parse_plan(others)), *caches)


def _cache(text: str) -> StepCache:
    """What --cache names: a preset, or what a search wrote to a file. FileError, UsageError."""
    presets = get_args(PresetName)
    if text in presets:
        return StepCache(preset=text)  # type: ignore[arg-type]
    if not Path(text).exists():
        raise FileError(f"--cache: there is no file {text}; presets are {', '.join(presets)}.{nearest(text, presets)}")
    (entry, *others) = parse_plan(read_json(text, "the cache"))
    if others or not isinstance(entry, StepCache):
        raise UsageError(f"{text} is no file of cache search. Next: --plan {text}, if it is a plan")
    return entry


def _hooks(functions: list[str], places: list[str], steps: str | None) -> Plan:
    """An entry for each --hook, at the --at of the same number, or all at the only one."""
    if not functions and (places or steps):
        raise UsageError(
            f"{'--at' if places else '--hook-steps'} does nothing without --hook. Next: add --hook FILE.py:NAME"
        )
    if functions and len(places) not in (1, len(functions)):
        raise UsageError(
            f"--hook needs a place: {len(functions)} function(s), {len(places)} --at. "
            'Next: add --at SITE, as in --at "single_blocks.*.img.q" (python cli.py sites lists them)'
        )
    places = places * len(functions) if len(places) == 1 else places
    return tuple(_hook(text, place, steps) for text, place in zip(functions, places, strict=True))


def _hook(text: str, place: str, steps: str | None) -> Custom:
    sites, own = names_and_steps("--at", place)
    entry = {"kind": "custom", "fn": text, "sites": sites, "steps": own or steps, "follow": True}
    (hook,) = pin(parse_plan([entry]))
    assert isinstance(hook, Custom)
    return hook.model_copy(update={"reads": reads_only(hook.function)})


def _flat(value: Any) -> list[str]:
    """The values of a flag that may be repeated."""
    values = [value] if isinstance(value, str) else value or []
    return [text for group in values for text in ([group] if isinstance(group, str) else group)]


def load_again(flags: dict[str, Any], plan: Iterable[Intervention], what: str) -> Plan:
    """Load the Python files that a recorded plan needs, from --plan and --hook; removes these flags.

    Returns what a JSON file of --plan says. FileError, UsageError, which asks for a file that is missing.
    """
    plan, found = list(plan), flags.pop("plan", None)
    code = found is not None and is_python(found)
    given = [*([found] if code else []), *_flat(flags.pop("hook", None))]
    wanted = [str(entry.sha256) for entry in plan if isinstance(entry, OfPython)]
    hashes = {path: load(path, wanted) for path, _ in (file_and_name(text, "plan") for text in given)}
    entries = read_plan(found) if found is not None and not code else ()
    check_given(plan, what, hashes)
    return entries


def check_given(plan: Iterable[Intervention], what: str, hashes: dict[Path, str] | None = None) -> None:
    """UsageError for the first function whose file was not given. hashes: of the files that were."""
    for entry in plan:
        if isinstance(entry, OfPython) and entry.is_missing:
            fn, sha256 = one_line(str(entry.fn)), str(entry.sha256)
            file = fn.rpartition(":")[0]
            other = next((found for path, found in (hashes or {}).items() if path.name == file), None)
            changed = f", and the {file} given has {other[:12]}…" if other else ""
            raise UsageError(
                f"{what} was made with {fn}, code that a file cannot bring along (SHA-256 {sha256[:12]}…){changed}. "
                f"Next: --hook {file}, with that file"
            )
