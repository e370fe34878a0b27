"""Makes a function the command of its file: its keyword arguments are the flags, and their defaults say the types.

    from flux_core.script import command

    @command
    def main(prompt="a castle", scale=2.0, words=("apple", "dog"), image=None):
        ...

`python FILE.py --scale 3` calls it at its definition, so it comes last; from Python it is `main(["--scale", "3"])`.
"""

import argparse
import inspect
from collections.abc import Callable, Sequence
from typing import Any


def command(fn: Callable[..., Any]) -> Callable[[Sequence[str] | None], Any]:
    """`main(argv=None)`, which calls fn with the flags in argv, or in the command line.

    A tuple takes one value or several, True or False is a flag with its `--no-`, None is for text. The help is what the
    docstrings of file and function say.
    """
    texts = filter(None, (fn.__globals__["__doc__"], fn.__doc__))
    parser = argparse.ArgumentParser(description="\n".join(texts), formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, parameter in inspect.signature(fn).parameters.items():
        default = parameter.default
        flags = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
        kind: dict[str, Any] = {"type": str if default is None else type(default)}
        if isinstance(default, tuple):
            kind = {"type": type(default[0]), "nargs": "+"}
        elif isinstance(default, bool):
            kind = {"action": argparse.BooleanOptionalAction}
        parser.add_argument(*flags, default=default, help=None if default is None else "%(default)s", **kind)

    def main(argv: Sequence[str] | None = None) -> Any:
        return fn(**vars(parser.parse_args(argv)))

    if fn.__module__ == "__main__":
        main()
    return main
