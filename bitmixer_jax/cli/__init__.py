"""The command line: ``bitmixer train | evaluate | cost | search | front | export | predict ...``.

Exit status: 0; 2 for a user's mistake (one line on standard error); 143 after SIGTERM and 130
after an interrupt, once the state is saved; 75 when another process of several was lost. Heavy
imports wait until a command runs.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from bitmixer_jax.cli import exports, policies, training
from bitmixer_jax.cli.common import Parser


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="bitmixer",
        description="Networks whose layers change bit-width at runtime (Bit-Mixer).",
        epilog="example: bitmixer train --config experiments/configs/digits.py --workdir runs/d",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(
        name: str, run: Callable[..., int], help: str, example: str
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=help,
            description=help[0].upper() + help[1:] + ".",
            epilog=f"example: {example}",
            allow_abbrev=False,
        )
        sub.set_defaults(run=run)
        return sub

    for group in (training, policies, exports):
        group.add(command)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status."""
    from bitmixer_jax.errors import UserError

    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    overrides = [word for word in rest if word.startswith("--config.")]
    unknown = [word for word in rest if word not in overrides]
    if unknown or (overrides and arguments.command != "train"):
        hint = ""
        if any(word.startswith("--config") for word in rest):
            hint = " (write settings as --config.NAME=VALUE)"
        parser.error(f"unknown arguments: {' '.join(unknown or overrides)}{hint}")
    arguments.overrides = overrides
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        return arguments.run(arguments)
    except UserError as error:
        print(f"bitmixer: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("bitmixer: interrupted; the same command goes on where it can", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 1
