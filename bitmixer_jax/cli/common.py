"""Shared parts of the commands: flags, checks before the work, output."""

from __future__ import annotations

import argparse
import contextlib
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn, Protocol

_MAX_COUNT = 1_000_000
_MIN_COLUMNS = 20  # a narrower terminal cannot show a table


class Parser(argparse.ArgumentParser):
    """A parser of arguments that reports a mistake in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Prints the message and ends the process with status 2."""
        from bitmixer_jax.errors import one_line

        self.exit(2, f"{self.prog}: {one_line(message)}; see {self.prog} --help\n")


def path(text: str) -> pathlib.Path:
    """Reads a path, with ``~`` expanded."""
    from bitmixer_jax.errors import UserError
    from bitmixer_jax.files import user_path

    try:
        return user_path(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


class AddCommand(Protocol):
    """Type of the function that adds a command to the command line."""

    def __call__(self, name: str, run: Any, help: str, example: str) -> argparse.ArgumentParser:
        """Adds a command.

        Args:
          name: of the command.
          run: function that runs it, with the parsed arguments.
          help: one line that says what it does.
          example: a command line.

        Returns:
          the parser of its flags.
        """


def whole(text: str) -> int:
    """Reads a whole number, 0 or more, of at most 18 digits."""
    if not (text.isdecimal() and text.isascii() and len(text) < 19):
        raise argparse.ArgumentTypeError(f"{text[:40]}: give a whole number, 0 or more")
    return int(text)


def count(text: str) -> int:
    """Reads a number of things to make, 0 to a million."""
    number = whole(text)
    if number > _MAX_COUNT:
        raise argparse.ArgumentTypeError(f"{text}: give at most {_MAX_COUNT:,}")
    return number


def seed(text: str) -> int:
    """Reads a seed of random numbers, 0 to 2^32 - 1."""
    number = whole(text)
    if number >= 2**32:
        raise argparse.ArgumentTypeError(f"{text}: give a number below 2^32")
    return number


def add_count(command: argparse.ArgumentParser, flag: str, default: int, help: str) -> None:
    """Adds a flag for a number of things to make."""
    help = f"{help} (default {default})"
    command.add_argument(flag, type=count, default=default, metavar="N", help=help)


def add_seed(command: argparse.ArgumentParser, of: str) -> None:
    """Adds --seed."""
    command.add_argument("--seed", type=seed, default=0, help=f"seed of {of} (default 0)")


def add_workdir(command: argparse.ArgumentParser) -> None:
    """Adds --workdir."""
    command.add_argument(
        "--workdir",
        required=True,
        metavar="DIR[@STAGE]",
        help="folder of a run; @STAGE: the network at the end of that stage",
    )


def add_data_dir(command: argparse.ArgumentParser) -> None:
    """Adds --data_dir."""
    command.add_argument(
        "--data_dir", help="folder of the data, if they are no longer where training found them"
    )


def add_json(command: argparse.ArgumentParser) -> None:
    """Adds --json."""
    command.add_argument("--json", type=path, metavar="FILE", help="write the result to this file")


def add_policy(
    command: argparse.ArgumentParser,
    help: str = "a width (3), one per layer (4,3,2,...), or a policy file",
    default: str | None = None,
) -> None:
    """Adds --policy, and --set to change some of its layers.

    Args:
      command: the parser of the command.
      help: what the policy is for.
      default: None: --set needs --policy; "": without --policy --set changes the widest policy.
    """
    if default == "":
        help += " (default: the widest width)"
    command.add_argument("--policy", default=default, help=help)
    command.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="LAYER=WIDTH",
        help="change the width of layers of the policy, such as stage2.block1.conv1=2 or "
        "'stage2.*=2' (repeatable)",
    )


def changes_of(arguments: argparse.Namespace) -> dict[str, int]:
    """Returns the widths of --set, by layer name.

    Raises:
      UserError: a word is not LAYER=WIDTH, or there is no policy to change.
    """
    from bitmixer_jax.errors import UserError
    from bitmixer_jax.policy import parse_changes

    if arguments.set and arguments.policy is None:
        raise UserError("--set changes a policy; give one, such as --policy 4", "missing-value")
    return parse_changes(arguments.set)


class RenamedFlag(argparse.Action):
    """A flag of an earlier version. It works as the flag ``new``, and logs a warning."""

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
    """Adds --latency."""
    command.add_argument(
        "--latency",
        type=path,
        metavar="FILE",
        help="file of measured times by layer and width, for the cost latency_ms",
    )


def add_out(command: argparse.ArgumentParser, help: str, required: bool = True) -> None:
    """Adds --out and --overwrite."""
    command.add_argument("--out", required=required, type=path, help=help)
    command.add_argument("--overwrite", action="store_true", help="replace files that exist")


def print_markdown(lines: list[str]) -> None:
    """Prints lines of Markdown, formatted for a terminal."""
    from rich.console import Console
    from rich.markdown import Markdown

    console = Console()
    if console.width < _MIN_COLUMNS:  # such as COLUMNS=0
        console = Console(width=80)
    console.print(Markdown("\n".join(lines)))


def progress_bar(description: str) -> Callable[[list[Any]], Iterable[Any]]:
    """Returns a function that wraps a list of calls with a progress bar.

    The bar is shown on a terminal only.
    """

    def wrap(calls: list[Any]) -> Iterable[Any]:
        from rich.console import Console
        from rich.progress import track

        terminal = Console().is_terminal
        return track(calls, description=description, transient=True, disable=not terminal)

    return wrap


@contextlib.contextmanager
def search_bar() -> Iterator[Callable[[int, int, float], None]]:
    """Shows the progress of a search on a terminal; yields the function that a search calls."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(transient=True, disable=not Console().is_terminal) as progress:
        task = progress.add_task("searching")

        def on_scores(number: int, total: int, best: float) -> None:
            what = f"searching: least loss {best:.4f}"
            progress.update(task, total=total, completed=number, description=what)

        yield on_scores


def check_json(path: pathlib.Path | None, key: str) -> None:
    """Checks that --json can be written and does not name a file with other content.

    An earlier result of the same command may be replaced.

    Args:
      path: of the file, if any.
      key: an entry that each result of the command has.

    Raises:
      UserError: the file cannot be written, or exists and is not such a result.
    """
    if path is None:
        return
    from bitmixer_jax.errors import UserError
    from bitmixer_jax.files import check_new, read_json

    check_new(path, "--json")
    if not path.is_file() or not path.stat().st_size:
        return
    try:
        content = read_json(path)
    except (OSError, ValueError):
        content = None
    if not isinstance(content, dict) or key not in content:
        raise UserError(
            f"--json {path}: already exists and is no result of this command; choose another path",
            "exists",
        )


def write_json(path: pathlib.Path | None, result: Any) -> None:
    """Writes a result to the file of --json, if any."""
    from bitmixer_jax.files import cannot_write, write_whole

    if path is not None:
        try:
            write_whole(path, json.dumps(result, indent=2) + "\n")
        except OSError as error:
            raise cannot_write(path, error, "--json") from None
