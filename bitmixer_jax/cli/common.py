"""What the commands share: flags, checks before the work, output."""

from __future__ import annotations

import argparse
import json
import pathlib
from typing import Any, NoReturn, Protocol

_MOST = 1_000_000
_NARROWEST = 20  # columns of a terminal that a table is drawn for


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Ends the process with status 2."""
        from bitmixer_jax.errors import one_line

        self.exit(2, f"{self.prog}: {one_line(message)}; see {self.prog} --help\n")


def path(text: str) -> pathlib.Path:
    """Reads a path; ``~`` is expanded."""
    from bitmixer_jax.errors import UserError
    from bitmixer_jax.files import user_path

    try:
        return user_path(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


class AddCommand(Protocol):
    """Adds a command: its name, the function that runs it, one line of help, an example."""

    def __call__(self, name: str, run: Any, help: str, example: str) -> argparse.ArgumentParser:
        """Returns the parser of its flags."""


def whole(text: str) -> int:
    """A whole number, 0 or more, of at most 18 digits."""
    if not (text.isdecimal() and text.isascii() and len(text) < 19):
        raise argparse.ArgumentTypeError(f"{text[:40]}: give a whole number, 0 or more")
    return int(text)


def few(text: str) -> int:
    """A number of things that are made one by one: 0 to a million."""
    number = whole(text)
    if number > _MOST:
        raise argparse.ArgumentTypeError(f"{text}: give at most {_MOST:,}")
    return number


def seed(text: str) -> int:
    """A seed of random numbers: 0 to 2^32 - 1."""
    number = whole(text)
    if number >= 2**32:
        raise argparse.ArgumentTypeError(f"{text}: give less than 2^32")
    return number


def add_set(command: argparse.ArgumentParser) -> None:
    """--set LAYER=WIDTH."""
    command.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="LAYER=WIDTH",
        help="change a layer of --policy, such as stage2.block1.conv1=2 or 'stage2.*=2' "
        "(repeatable)",
    )


def add_latency(command: argparse.ArgumentParser) -> None:
    """--latency FILE."""
    command.add_argument(
        "--latency", type=path, metavar="FILE", help="measured seconds by layer and width"
    )


def add_out(command: argparse.ArgumentParser, help: str, required: bool = True) -> None:
    """--out and --overwrite."""
    command.add_argument("--out", required=required, type=path, help=help)
    command.add_argument("--overwrite", action="store_true", help="replace what is there")


def print_markdown(lines: list[str]) -> None:
    """Prints Markdown for a terminal."""
    from rich.console import Console
    from rich.markdown import Markdown

    console = Console()
    if console.width < _NARROWEST:  # such as COLUMNS=0
        console = Console(width=80)
    console.print(Markdown("\n".join(lines)))


def check_json(path: pathlib.Path | None, key: str) -> None:
    """Checks that --json can be written: to a new file, or over an earlier result with ``key``.

    Raises:
      UserError: the file cannot be written, or is no such result.
    """
    if path is None:
        return
    from bitmixer_jax.errors import UserError
    from bitmixer_jax.files import check_new, read_json

    check_new(path, "--json")
    if not path.is_file() or not path.stat().st_size:
        return
    try:
        found = read_json(path)
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict) or key not in found:
        raise UserError(
            f"--json {path}: already exists and is no result of this command; choose another path"
        )


def write_json(path: pathlib.Path | None, result: Any) -> None:
    """Writes a result where --json says."""
    from bitmixer_jax.files import cannot_write, write_whole

    if path is not None:
        try:
            write_whole(path, json.dumps(result, indent=2) + "\n")
        except OSError as error:
            raise cannot_write(path, error, "--json") from None
