"""`run`: the commands in a job file, one after the other, once all of them have been checked."""

from typing import Any

from ..errors import FluxError, UsageError, nearest
from ..hooks import Lora
from ..hooks.plan import read_plan
from ..hooks.python import no_code
from ..request.fields import CODE
from ..request.jobs import flags_of, read_jobs
from .table import COMMANDS


def _check_trust(flags: dict[str, Any], where: str) -> None:
    """UsageError for a job that would run Python, or whose plan reads or writes files: it may have been downloaded."""
    said = [f"--{name}" for name in CODE if name in flags]
    with no_code(f"{where}: a job"):
        plan = read_plan(flags["plan"]) if "plan" in flags and not said else ()
    said += [f"the plan's {entry.kind}" for entry in plan if not entry.portable and not isinstance(entry, Lora)]
    if said:
        raise UsageError(
            f"{where}: a job cannot make us run Python, or read and write the files of a plan ({', '.join(said)}). "
            "Next: type it on the command line"
        )


def run(file: str) -> None:
    """Run the jobs of a file. UsageError for an unknown command or flag, with the job's number, before any job runs."""
    runnable = [word for word, command in COMMANDS.items() if command.fields and not command.positional]
    checked = []
    for number, job in enumerate(read_jobs(file), 1):
        name, where = str(job.get("command", "generate")), f"{file}, job {number}"
        if name not in runnable:
            known = ", ".join(runnable)
            raise UsageError(f"{where}: no command {name[:60]!r}; there are {known}.{nearest(name, runnable)}")
        flags = flags_of(job, COMMANDS[name].fields, where)
        _check_trust(flags, where)
        checked.append((where, COMMANDS[name], flags))
    for where, command, flags in checked:
        try:
            with no_code("a job"):
                command.run(**flags)
        except FluxError as error:
            raise type(error)(f"{where}: {error}") from error
