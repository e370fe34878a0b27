"""The command line: parses flags, runs a command, reports errors.

Only the standard library and tables of plain data are imported here, so that help and errors in flags appear at once;
a command's module is imported when it runs. `-` and `_` are the same in every flag.
"""

import argparse
import re
import sys
import textwrap
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from .commands.table import COMMANDS, GROUPS, Command
from .errors import FluxError, UsageError, nearest
from .hub.client import read_env
from .request.fields import Field
from .terminal import abandon_stdout, note, one_line, tolerate_any_encoding, warnings_as_notes
from .version import __version__

INTERRUPTED, BROKEN_PIPE, UNEXPECTED = 130, 141, 1


class Help(argparse.HelpFormatter):
    """Lines that break at spaces only: names of models and flags have hyphens, and are copied."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises UsageError instead of exiting."""

    def error(self, message: str) -> NoReturn:
        dashed = " (a value that begins with - is written --flag=-value)" if "expected" in message else ""
        raise UsageError(f"{message}{dashed}. See `{self.prog} --help`")


def build_parser(name: str) -> Parser:
    """The parser of one command."""
    command = COMMANDS[name]
    program = _program(sys.argv[0])
    prog = program if name == "generate" else f"{program} {name}"
    parser = Parser(prog=prog, description=command.help, allow_abbrev=False, argument_default=None)
    parser.formatter_class = lambda prog: Help(prog, max_help_position=32, width=110)
    if name == "generate":
        parser.description = f'Draw pictures from words: {program} --prompt "a red apple"'
        others = ", ".join(f"{other} ({entry.help})" for other, entry in COMMANDS.items() if other != name)
        parser.epilog = f"other commands: {others}; each has its --help"
        parser.add_argument("--version", action="version", version=f"flux_core {__version__}")
    for field in command.positional:
        several: dict[str, Any] = {"nargs": "+"} if field.multiple else {}
        several |= {} if field.default is None else {"nargs": "?"}
        parser.add_argument(field.name, metavar=field.metavar or None, help=field.help or None, **several)
    for field in command.fields:
        _add(parser, field)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _program(path: str) -> str:
    """The program as the user typed it, from `sys.argv[0]`: flux1 (flux1.exe), python -m flux_core or python cli.py."""
    script = Path(path)
    if script.stem == "flux1":
        return "flux1"
    return "python -m flux_core" if script.parts[-2:] == ("flux_core", "__main__.py") else "python cli.py"


def _add(parser: Parser, field: Field) -> None:
    """Add a flag to the parser. Values stay text: the request converts and checks them, wherever they come from."""
    flags = sorted((field.flag, *field.flags), key=len)
    text = (field.help + field.default_text).replace("%", "%%")
    if field.kind is bool:
        parser.add_argument(*flags, dest=field.name, action="store_true", default=None, help=text)
    else:
        count: dict[str, Any] = {"nargs": "+"} if field.multiple else {}
        count |= {"action": "append"} if field.repeated else {}
        count |= {"nargs": "?", "const": field.const} if field.const else {}
        parser.add_argument(*flags, dest=field.name, metavar=field.value_name, help=text, **count)


def parse(argv: Sequence[str]) -> tuple[Command, dict[str, Any]]:
    """The command and the values of its flags. UsageError for an unknown flag, with the nearest known flag."""
    words = [_dashes(word) for word in argv]
    name, words = _command(words)
    words = _steps_of_hook(words, COMMANDS[name])
    parser = build_parser(name)
    flags, unknown = parser.parse_known_args(words)
    if unknown:
        raise UsageError(_unknown(unknown, words, parser))
    values = {key: value for key, value in vars(flags).items() if value is not None}
    del values["debug"]
    return COMMANDS[name], values


def _command(words: list[str]) -> tuple[str, list[str]]:
    """A command's name, of one word or two, and the words behind it. UsageError for an unknown word of a group."""
    for count in (2, 1):
        if (name := " ".join(words[:count])) in COMMANDS:
            return name, words[count:]
    if words and words[0] in GROUPS:
        _help_on_group(*words[:2])
    return "generate", words


def _help_on_group(group: str, word: str = "--help") -> NoReturn:
    """Print a group's commands and exit. UsageError for a word that is none of them."""
    inside = {name.split()[1]: command for name, command in COMMANDS.items() if name.startswith(f"{group} ")}
    prog = f"{_program(sys.argv[0])} {group}"
    if word not in ("--help", "-h"):
        hint = nearest(word, inside)
        raise UsageError(f"no command {group} {word[:60]}; there are {', '.join(inside)}.{hint} See `{prog} --help`")
    width = max(map(len, inside))
    print(f"usage: {prog} COMMAND ...\n\n{GROUPS[group]}\n\ncommands:")
    print("\n".join(f"  {name:<{width}}  {command.help}" for name, command in inside.items()))
    print("\neach has its --help")
    raise SystemExit(0)


def _dashes(word: str) -> str:
    """`--num_steps=4` -> `--num-steps=4`; words that are no flags are returned unchanged."""
    flag, equals, value = word.partition("=")
    return flag.replace("_", "-") + equals + value if flag.startswith("--") and " " not in flag else word


def _steps_of_hook(words: list[str], command: Command) -> list[str]:
    """The words with --hook-steps for --steps, where there is a --hook and the command has both meanings of it."""
    names = {field.name for field in command.fields}
    given = {word.partition("=")[0] for word in words}
    if not names >= {"num_steps", "hook_steps"} or "--hook" not in given or "--hook-steps" in given:
        return words
    return [re.sub(r"^--steps(?=$|=)", "--hook-steps", word) for word in words]


def _unknown(words: list[str], argv: Sequence[str], parser: Parser) -> str:
    """The error text for words of `argv` that no flag takes."""
    flag = next((word.partition("=")[0] for word in words if word.startswith("-")), None)
    if flag is None:
        before, _, value = argv[max(argv.index(words[0]) - 1, 0)].partition("=")
        if value and any(before in action.option_strings and action.nargs == "+" for action in parser._actions):
            return f"{before}= takes one value, and {words[0]!r} follows it. Next: write {before} {value} {words[0]}"
        return f"unexpected {words[0]!r}: a prompt follows --prompt, in quotes; a command comes first"
    known = [option for action in parser._actions for option in action.option_strings]
    return f"unknown flag {flag}.{nearest(flag, known)} See `{parser.prog} --help`"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code. An error is one line on stderr; `--debug` adds the traceback."""
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
        with warnings_as_notes():
            command.run(**flags)
        return 0
    except SystemExit as end:  # argparse exits after --help and --version
        return int(end.code or 0)
    finally:
        if sys.stdout is not None:
            sys.stdout.flush()


def _report(error: Exception) -> int:
    """Print an error and return its exit code."""
    if isinstance(error, FluxError):
        note(f"error: {one_line(str(error))}")
        return error.exit_code
    note(f"unexpected error: {type(error).__name__}: {error}\nrun with --debug to see where it comes from")
    return UNEXPECTED
