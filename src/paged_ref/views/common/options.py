"""What command lines share: options with their bounds, and subcommands that are imported when they run.

A value out of bounds is a ValueError that names the option, the value and what is needed, raised before any work
starts. A bound that the library checks with the same words anyway is left to the library.
"""

from __future__ import annotations

import argparse
import importlib
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, Protocol

from ...extras.plain_text import plain
from .files import check_folder, check_writable
from .program import program

SUFFIXES = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


class Options(Protocol):
    """An ArgumentParser, or a group of one."""

    def add_argument(self, *names: str, **settings: Any) -> Any: ...


class _Checked(argparse.Action):
    """Stores what `check(option, value)` accepts. argparse lets a ValueError of an action through to the caller."""

    def __init__(self, *args: Any, check: Callable[[str, Any], None], **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._check = check

    def __call__(self, parser: object, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:
        self._check(self.option_strings[0], values)
        setattr(namespace, self.dest, values)


class _Output(_Checked):
    """A file that the command writes."""


def _number(
    parser: Options, option: str, default: Any = None, help: str = "", *, accepts: Callable[[Any], bool], needed: str,
    **settings: Any,
) -> None:  # fmt: skip
    def check(option: str, values: Any) -> None:
        verb = "holds" if isinstance(values, list) else "is"
        for value in values if isinstance(values, list) else [values]:
            if not accepts(value):
                raise ValueError(f"{option} {verb} {value}; {needed} is needed")

    if default is not None and "default" not in help:
        words = " ".join(map(str, default)) if isinstance(default, list) else default
        help = f"{help} (default {words})" if help else f"default {words}"
    parser.add_argument(option, action=_Checked, check=check, default=default, help=help, **settings)


def integer(
    parser: Options, option: str, default: int | list[int] | None = None, help: str = "", *, least: int | None = 1,
    metavar: str = "N", nargs: str | None = None,
) -> None:  # fmt: skip
    """An integer of at least `least`, or with `least=None` any; with `nargs="+"` a list of them."""
    _number(
        parser, option, default, help, accepts=lambda value: least is None or value >= least,
        needed=f"at least {least}", type=int, metavar=metavar, nargs=nargs,
    )  # fmt: skip


# Any number, which the library checks; a finite number above 0; a number between 0 and 1, both excluded.
number = partial(_number, accepts=lambda value: True, needed="", type=float, metavar="X")
positive = partial(
    _number, accepts=lambda value: 0 < value < math.inf, needed="a positive number", type=float, metavar="X"
)
share = partial(
    _number, accepts=lambda value: 0 < value < 1, needed="a share between 0 and 1", type=float, metavar="SHARE"
)


def size(parser: Options, option: str, default: int | None = None, help: str = "") -> None:
    """Bytes, as 65536, 64KiB or 1.5MiB."""
    parser.add_argument(option, type=_bytes, default=default, metavar="BYTES", help=help)


def _bytes(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(B|KiB|MiB|GiB)?", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; bytes are needed, as in 65536, 64KiB or 1.5MiB")
    return int(float(found[1]) * SUFFIXES[found[2] or "B"])


# --- options that several commands have ------------------------------------------------------------------------


def model(parser: Options) -> None:
    text = "Hugging Face directory, or NAME.gguf (default: embedded)"
    parser.add_argument("--model", default="tiny", metavar="DIR", help=text)


def backend(parser: Options) -> None:
    parser.add_argument("--backend", default="auto", metavar="NAME", help=f"attention backend (see {program()} info)")


def manager(parser: Options) -> None:
    from ...extras.managers import MANAGERS  # here, so that --help stays quick

    parser.add_argument("--manager", default="paged", choices=MANAGERS, help="default paged")


def block_size(parser: Options, default: int | None = 16, *, least: int | None = None) -> None:
    integer(parser, "--block-size", default, "tokens in a block", least=least)


def kv_tokens(parser: Options, default: int | None = None, help: str = "KV budget in tokens") -> None:
    integer(parser, "--kv-tokens", default, help, least=None)


def jobs(parser: Options) -> None:
    """Processes that run at the same time."""
    from ...tuned.threads import cores  # here, so that --help stays quick

    most = 4 * cores()
    _number(
        parser, "--jobs", None, "processes (default: one for each core)", type=int, metavar="N",
        accepts=lambda value: 1 <= value <= most, needed=f"1 to {most}, four for each core of this machine,",
    )  # fmt: skip


def seed(parser: Options, default: int | None = 0, help: str = "", *, least: int | None = None) -> None:
    integer(parser, "--seed", default, help, least=least)


def output(parser: Options, option: str, help: str, *, stdout: bool = False) -> None:
    """A file that the command writes. A place that cannot be written is refused now; with `stdout`, "-" is allowed."""

    def check(option: str, path: Path) -> None:
        if str(path) != "-":
            check_writable(path, option)
        elif not stdout:
            raise ValueError(f"{option} is -; a file is needed, this cannot go to standard output")

    parser.add_argument(option, action=_Output, check=check, type=Path, metavar="FILE", help=help)


def folder(parser: Options, option: str, help: str) -> None:
    """A directory that the command writes into, and makes. A place that cannot be written is refused now."""

    def check(option: str, path: Path) -> None:
        check_folder(path, option)

    parser.add_argument(option, action=_Checked, check=check, type=Path, metavar="DIR", help=help)


def json_output(parser: Options, help: str = "also write the results here", *, stdout: bool = False) -> None:
    output(parser, "--json", help, stdout=stdout)


def record_output(parser: Options, help: str = "write what happens as JSON lines") -> None:
    output(parser, "--record", help)


def svg_output(parser: Options, help: str = "write the plots here") -> None:
    output(parser, "--svg", help)


def printed(parser: Options) -> None:
    parser.add_argument("--size", metavar="WxH", help="of printed frames (default: COLUMNS and LINES, or 80x24)")
    parser.add_argument("--print", action="store_true", help="print frames, though this is a terminal")


def check_text(option: str, texts: Iterable[str]) -> None:
    """Raise ValueError for a text that the shell passed as bytes which are no UTF-8."""
    from ...extras.arguments import require_characters  # here, so that --help stays quick

    for text in texts:
        require_characters(option, text)


def first_given(args: argparse.Namespace, *names: str) -> str | None:
    """The first of these attributes that the command line gave, as its option: `full_layers` is --full-layers."""
    return next((f"--{name.replace('_', '-')}" for name in names if getattr(args, name) is not None), None)


def as_typed(error: ValueError, args: argparse.Namespace) -> str:
    """What the error says, with the options of the command in the place of the library's arguments: `min_tokens` is
    --min-tokens, and num_layers --layers. An error that names a file speaks of what stands in the file, and stays."""
    message, given = str(error), vars(args).values()
    words = [str(word) for value in given for word in (value if isinstance(value, list) else [value])]
    if any(word in message and os.path.exists(word) for word in words if word):
        return message

    def option(found: re.Match[str]) -> str:
        name = found[0]
        names = (name, name.removeprefix("num_"), name.replace("kv_cache", "kv"))
        return next((args.spelled[each] for each in names if each in args.spelled), name)

    # A word without _ is an argument only where a sentence about it begins.
    return re.sub(r"^[a-z]+(?= (?:is|holds) )|(?<![-./\w])[a-z]+(_[a-z]+)+\b", option, message)


# --- subcommands -----------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, whatever was typed, and whose texts keep their lines."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **settings)

    def error(self, message: str) -> NoReturn:
        super().error(plain(message))

    def print_help(self, file: Any = None) -> None:
        (file or sys.stdout).write(self.format_help())  # argparse's own drops the error of a stream that fails


class _Imported(Parser):
    """A subcommand whose module is imported when the command line names it, so that --help stays quick."""

    module = ""

    def add_all(self) -> None:
        """The arguments of the module, once."""
        if self.module:
            importlib.import_module(self.module).add_arguments(self)
            self.module = ""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self.add_all()
        found, rest = super().parse_known_args(args, namespace)
        self._check_files(found)
        own = {action.dest: action.option_strings[0] for action in self._actions if action.option_strings}
        found.spelled = own | getattr(found, "spelled", {})  # those of a command inside this one
        return found, rest

    def _check_files(self, found: argparse.Namespace) -> None:
        """Raise ValueError where a file that the command writes is also one that it reads or writes."""
        seen: dict[str, str] = {}
        for action in sorted(self._actions, key=lambda action: isinstance(action, _Output)):  # what it reads, first
            value = getattr(found, action.dest, None)
            if not isinstance(value, (str, Path)) or str(value) == "-":
                continue
            path, written = os.path.realpath(value), isinstance(action, _Output)
            name = action.option_strings[0] if action.option_strings else str(action.metavar)
            if written and path in seen:
                raise ValueError(f"{name} {value} is the file of {seen[path]}, too; a file of its own is needed")
            if os.path.isfile(path) or (written and not os.path.exists(path)):  # a device may be named twice
                seen[path] = name


def subcommands(
    parser: argparse.ArgumentParser, dest: str, commands: Mapping[str, tuple[str, str, Sequence[str]]], metavar: str,
    *, listed: bool = True,
) -> None:  # fmt: skip
    """`commands`: name -> (module with add_arguments(parser) and main(args) -> exit status, help, examples).

    An example is a command line without the name of the program. `listed=False`: the caller's help names the commands.
    """
    hidden = {} if listed else {"help": argparse.SUPPRESS}
    subparsers = parser.add_subparsers(
        dest=dest, required=True, metavar=metavar, parser_class=_Imported, prog=parser.prog, **hidden
    )
    for name, (module, summary, examples) in commands.items():
        shown = "\n".join(["examples:", *(f"  paged-ref {example}" for example in examples)])
        command = subparsers.add_parser(name, help=summary, description=summary, epilog=shown)
        command.module = module
        if name in os.environ.get("COMP_LINE", "").split():  # a shell completes it, and wants all arguments to be there
            command.add_all()
