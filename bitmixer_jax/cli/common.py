"""What the commands share: flags, checks before the work, output."""

from __future__ import annotations

import argparse
import json
import pathlib
from typing import Any, NoReturn, Protocol


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Ends the process with status 2."""
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


class AddCommand(Protocol):
    """Adds a command: its name, the function that runs it, one line of help, an example."""

    def __call__(self, name: str, run: Any, help: str, example: str) -> argparse.ArgumentParser:
        """Returns the parser of its flags."""


def whole(text: str) -> int:
    """A whole number, 0 or more."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text}: give a whole number, 0 or more")
    return int(text)


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
        "--latency", type=pathlib.Path, metavar="FILE", help="measured seconds by layer and width"
    )


def add_out(command: argparse.ArgumentParser, help: str, required: bool = True) -> None:
    """--out and --overwrite."""
    command.add_argument("--out", required=required, type=pathlib.Path, help=help)
    command.add_argument("--overwrite", action="store_true", help="replace what is there")


def print_markdown(lines: list[str]) -> None:
    """Prints Markdown for a terminal."""
    from rich.console import Console
    from rich.markdown import Markdown

    Console().print(Markdown("\n".join(lines)))


def check_json(path: pathlib.Path | None) -> None:
    """Says before the work that --json could not be written."""
    if path is not None:
        from bitmixer_jax.files import check_new

        check_new(path, "--json")


def write_json(path: pathlib.Path | None, result: Any) -> None:
    """Writes a result where --json says."""
    from bitmixer_jax.errors import UserError

    if path is not None:
        try:
            path.write_text(json.dumps(result, indent=2) + "\n")
        except OSError as error:
            raise UserError(f"--json {path}: cannot write it ({error.strerror})") from None
