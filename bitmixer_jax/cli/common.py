"""What the commands share: flags, checks before the work, output."""

from __future__ import annotations

import argparse
import contextlib
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn, Protocol

_MAX_COUNT = 1_000_000
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


def count(text: str) -> int:
    """A number of things that are made one by one: 0 to a million."""
    number = whole(text)
    if number > _MAX_COUNT:
        raise argparse.ArgumentTypeError(f"{text}: give at most {_MAX_COUNT:,}")
    return number


def seed(text: str) -> int:
    """A seed of random numbers: 0 to 2^32 - 1."""
    number = whole(text)
    if number >= 2**32:
        raise argparse.ArgumentTypeError(f"{text}: give less than 2^32")
    return number


def add_workdir(command: argparse.ArgumentParser) -> None:
    """--workdir DIR[@STAGE]."""
    command.add_argument(
        "--workdir",
        required=True,
        metavar="DIR[@STAGE]",
        help="folder of a trained run; @STAGE: as it was at the end of that stage",
    )


def add_data_dir(command: argparse.ArgumentParser) -> None:
    """--data_dir."""
    command.add_argument("--data_dir", help="where the data are, if not where training found them")


def add_json(command: argparse.ArgumentParser) -> None:
    """--json FILE."""
    command.add_argument("--json", type=path, metavar="FILE", help="write the result there")


def add_policy(command: argparse.ArgumentParser, help: str, default: str | None = None) -> None:
    """--policy, and --set LAYER=WIDTH."""
    command.add_argument("--policy", default=default, help=help)
    command.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="LAYER=WIDTH",
        help="change a layer of --policy, such as stage2.block1.conv1=2 or 'stage2.*=2' "
        "(repeatable)",
    )


def changes_of(arguments: argparse.Namespace) -> dict[str, int]:
    """Returns the widths that --set gave, by layer.

    Raises:
      UserError: not LAYER=WIDTH, or there is no policy to change.
    """
    from bitmixer_jax.errors import UserError
    from bitmixer_jax.policy import parse_changes

    if arguments.set and arguments.policy is None:
        raise UserError("--set changes a policy: give one, such as --policy 4", "missing-value")
    return parse_changes(arguments.set)


class RenamedFlag(argparse.Action):
    """A flag of an earlier version: it works as the one called ``new``, and says so."""

    def __init__(self, option_strings: list[str], dest: str, new: str, **settings: Any) -> None:
        self._new = new
        dest = new.removeprefix("--")
        super().__init__(option_strings, dest, help=argparse.SUPPRESS, **settings)
        self.default = argparse.SUPPRESS

    def __call__(self, parser: Any, namespace: Any, values: Any, option: str | None = None) -> None:
        """Sets the value of the new flag."""
        from bitmixer_jax.deprecated import tell

        tell(str(option), self._new)
        setattr(namespace, self.dest, values)


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


def progress_bar(description: str) -> Callable[[list[Any]], Iterable[Any]]:
    """Returns a function that wraps a list of calls with a progress bar, on a terminal."""

    def wrap(calls: list[Any]) -> Iterable[Any]:
        from rich.console import Console
        from rich.progress import track

        shown = Console().is_terminal
        return track(calls, description=description, transient=True, disable=not shown)

    return wrap


@contextlib.contextmanager
def search_bar() -> Iterator[Callable[[int, int, float], None]]:
    """Shows how far a search is, on a terminal; gives what `search.search_policy` calls."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(transient=True, disable=not Console().is_terminal) as progress:
        task = progress.add_task("searching")

        def on_scores(number: int, total: int, best: float) -> None:
            what = f"searching: least loss {best:.4f}"
            progress.update(task, total=total, completed=number, description=what)

        yield on_scores


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
            f"--json {path}: already exists and is no result of this command; choose another path",
            "exists",
        )


def write_json(path: pathlib.Path | None, result: Any) -> None:
    """Writes a result where --json says."""
    from bitmixer_jax.files import cannot_write, write_whole

    if path is not None:
        try:
            write_whole(path, json.dumps(result, indent=2) + "\n")
        except OSError as error:
            raise cannot_write(path, error, "--json") from None
