"""`run`: the commands in a job file, one after the other, once all of them have been checked."""

from ..errors import FluxError, UsageError, nearest
from ..request.jobs import flags_of, read_jobs
from .table import COMMANDS


def run(file: str) -> None:
    """Run the jobs of a file. UsageError for an unknown command or flag, with the job's number, before any job runs."""
    runnable = [word for word, command in COMMANDS.items() if command.fields and not command.positional]
    checked = []
    for number, job in enumerate(read_jobs(file), 1):
        name, where = str(job.get("command", "generate")), f"{file}, job {number}"
        if name not in runnable:
            known = ", ".join(runnable)
            raise UsageError(f"{where}: no command {name[:60]!r}; there are {known}.{nearest(name, runnable)}")
        checked.append((where, COMMANDS[name], flags_of(job, COMMANDS[name].fields, where)))
    for where, command, flags in checked:
        try:
            command.run(**flags)
        except FluxError as error:
            raise type(error)(f"{where}: {error}") from error
