"""`train`: a LoRA from a folder of pictures, by a TOML file, by flags, or by an example that ships."""

from typing import Any

from ..errors import UsageError
from ..request.training import EXAMPLES, SETTINGS
from ..terminal import tell
from .table import TRAIN

_FIELDS = {field.name: field for field in TRAIN}


def train(config: str = "", example: str | None = None, dry_run: bool = False, **flags: Any) -> None:
    """Train what the settings say; `--dry-run` prints the plan alone. An example without data is printed to be filled.

    UsageError, FileError, AccessError, DiskError, NonFiniteError.
    """
    _FIELDS["example"].parse(example)
    if config and example:
        raise UsageError("a file of settings and --example are two ways to begin. Next: give one of them")
    from ..training.run import run
    from ..training.settings import NOTO, example_file, read_settings

    if example in EXAMPLES and example != NOTO:
        tell(example_file(example))
        return
    assert flags.keys() <= {field.name for field in SETTINGS}
    run(read_settings(config, example, flags), dry_run)
