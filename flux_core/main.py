"""The grammar of the command line.

Only the standard library and tables of plain data are imported here, so that help and wrong flags are
answered at once; a command's module is imported when it runs. `-` and `_` are the same in every flag.
"""

import argparse
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from .commands.table import COMMANDS, Command
from .errors import FluxError, UsageError, nearest
from .hub.client import read_env
from .request.fields import Field
from .terminal import abandon_stdout, note, tolerate_any_encoding
from .version import __version__

INTERRUPTED, BROKEN_PIPE, UNEXPECTED = 130, 141, 1


class Parser(argparse.ArgumentParser):
    """argparse, with our errors instead of its exit."""

    def error(self, message: str) -> NoReturn:
        dashed = " (a value that begins with - is written --flag=-value)" if "expected" in message else ""
        raise UsageError(f"{message}{dashed}. See `{self.prog} --help`")


def build_parser(name: str) -> Parser:
    """The parser of one command."""
    command = COMMANDS[name]
    program = _program(sys.argv[0])
    prog = program if name == "generate" else f"{program} {name}"
    parser = Parser(prog=prog, description=command.help, allow_abbrev=False, argument_default=None)
    parser.formatter_class = lambda prog: argparse.HelpFormatter(prog, max_help_position=32, width=110)
    if name == "generate":
        parser.description = f'Draw pictures from words: {program} --prompt "a red apple"'
        others = ", ".join(f"{word} ({row.help})" for word, row in COMMANDS.items() if word != name)
        parser.epilog = f"other commands: {others}; each has its --help"
        parser.add_argument("--version", action="version", version=f"flux_core {__version__}")
    if command.positional:
        parser.add_argument(command.positional)
    for field in command.fields:
        _add(parser, field)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _program(path: str) -> str:
    """The command that was typed, from `sys.argv[0]`: flux1 (on Windows flux1.exe), python -m flux_core or cli.py."""
    started = Path(path)
    if started.stem == "flux1":
        return "flux1"
    return "python -m flux_core" if started.parts[-2:] == ("flux_core", "__main__.py") else "python cli.py"


def _add(parser: Parser, field: Field) -> None:
    """One flag. Values stay text: the request converts and checks them, for every way it is built."""
    flags = sorted((field.flag, *field.flags), key=len)
    text = (field.help + field.default_text).replace("%", "%%")
    if field.kind is bool:
        parser.add_argument(*flags, dest=field.name, action="store_true", default=None, help=text)
    else:
        several: dict[str, Any] = {"nargs": "+"} if field.multiple else {}
        several |= {"nargs": "?", "const": field.const} if field.const else {}
        shown: dict[str, Any] = {"metavar": field.value_name, "help": text, **several}
        parser.add_argument(*flags, dest=field.name, **shown)


def parse(argv: Sequence[str]) -> tuple[Command, dict[str, Any]]:
    """The command and the flags that were given; UsageError names the nearest to one that does not exist."""
    words = [_dashes(word) for word in argv]
    name = words.pop(0) if words and words[0] in COMMANDS else "generate"
    parser = build_parser(name)
    flags, unknown = parser.parse_known_args(words)
    if unknown:
        raise UsageError(_unknown(unknown, parser))
    given = {key: value for key, value in vars(flags).items() if value is not None}
    del given["debug"]
    return COMMANDS[name], given


def _dashes(word: str) -> str:
    """`--num_steps=4` -> `--num-steps=4`; what is no flag stays as it is."""
    flag, equals, value = word.partition("=")
    return flag.replace("_", "-") + equals + value if flag.startswith("--") and " " not in flag else word


def _unknown(words: list[str], parser: Parser) -> str:
    flag = next((word.partition("=")[0] for word in words if word.startswith("-")), None)
    if flag is None:
        return f"unexpected {words[0]!r}: a prompt goes behind --prompt, in quotes; a command comes first"
    known = [option for action in parser._actions for option in action.option_strings]
    return f"unknown flag {flag}.{nearest(flag, known)} See `{parser.prog} --help`"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. An error is one message on stderr; `--debug` shows more."""
    argv = sys.argv[1:] if argv is None else argv
    tolerate_any_encoding()
    try:
        return _run(argv)
    except BrokenPipeError:
        abandon_stdout()
        return BROKEN_PIPE
    except KeyboardInterrupt:
        note("interrupted")
        return INTERRUPTED
    except Exception as error:
        if "--debug" in argv:
            note(traceback.format_exc())
        return _report(error)


def _run(argv: Sequence[str]) -> int:
    try:
        command, flags = parse(argv)
        read_env()
        command.run(**flags)
        return 0
    except SystemExit as done:  # argparse leaves so after --help and --version
        return int(done.code or 0)
    finally:
        if sys.stdout is not None:
            sys.stdout.flush()


def _report(error: Exception) -> int:
    if isinstance(error, FluxError):
        note(f"error: {error}")
        return error.exit_code
    note(f"unexpected error: {type(error).__name__}: {error}\nrun with --debug to see where it comes from")
    return UNEXPECTED
