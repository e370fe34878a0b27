"""`train`: a LoRA from pictures, by a TOML file, by flags, by an example that ships, or by another trainer's config."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from ..request.training import EXAMPLES, SETTINGS
from ..terminal import note, tell
from .table import TRAIN

if TYPE_CHECKING:
    from ..training.settings import Settings

_FIELDS = {field.name: field for field in TRAIN}


def train(
    config: str = "",
    example: str | None = None,
    from_config: str | None = None,
    dry_run: bool = False,
    **flags: Any,
) -> None:
    """Train what the settings say; `--dry-run` prints the plan alone. An example without data is printed to be filled.

    UsageError, FileError, AccessError, DiskError, NonFiniteError.
    """
    _FIELDS["example"].parse(example)
    ways = [way for way, given in (("a file of settings", config), ("--example", example),
                                   ("--from-config", from_config)) if given]  # fmt: skip
    if len(ways) > 1:
        raise UsageError(f"{' and '.join(ways)} are two ways to begin. Next: give one of them")
    from ..training.run import run
    from ..training.settings import NOTO, ZIB, example_file, read_settings

    if example in EXAMPLES and example not in (NOTO, ZIB):
        tell(example_file(example))
        return
    assert flags.keys() <= {field.name for field in SETTINGS}
    given = _of_another(from_config, flags, dry_run) if from_config else read_settings(config, example, flags)
    run(given, dry_run)


def _of_another(path: str, flags: Mapping[str, Any], dry_run: bool) -> "Settings":
    """The settings of another trainer's config, and flags over them. What became of its keys is told: of all in a dry
    run, with the settings, else of those that are left out."""
    from ..training.configs import read_config
    from ..training.settings import read_settings, settings_lines

    found = read_config(path)
    for line in found.lines() if dry_run else [str(fate) for fate in found.fates if fate.lacks]:
        (tell if dry_run else note)(line)
    settings = read_settings(None, None, flags, found.values)
    for line in ("", "# settings, as a TOML file has them", *settings_lines(settings), "") if dry_run else ():
        tell(line)
    return settings
