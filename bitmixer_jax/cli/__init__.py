"""The command line: ``bitmixer train | evaluate | cost | search | front | export | predict ...``.

Exit status: 0; 2 for a user's mistake (one line on standard error); 143 after SIGTERM and 130
after an interrupt, once the state is saved; 75 when another process of several was lost. Heavy
imports wait until a command runs.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence

from bitmixer_jax.cli import (
    benchmark,
    cost,
    evaluate,
    export,
    front,
    predict,
    prepare,
    search,
    train,
)
from bitmixer_jax.cli.common import Parser
from bitmixer_jax.cli.streams import Output, fill_closed


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

    for module in (train, evaluate, cost, search, front, export, predict, prepare, benchmark):
        module.add(command)
    return parser


def command_line() -> None:
    """Runs the command that the process was started with, and ends the process."""
    fill_closed()
    shown = logging.StreamHandler()
    shown.setFormatter(logging.Formatter("bitmixer: warning: %(message)s"))
    logger = logging.getLogger("bitmixer_jax")
    logger.addHandler(shown)
    logger.propagate = False  # absl would show them again
    status = main()
    if status == 2:
        # What went wrong was said in one line. On a full disk, threads of orbax and TensorBoard
        # would add their tracebacks while the interpreter shuts down.
        os._exit(status)
    sys.exit(status)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status.

    A reader that closes the pipe (``| head -1``) does not end the work. Where standard output
    cannot be written, on a full disk for example, the work goes on and the status is 2.
    """
    fill_closed()
    output, errors = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = Output(output), Output(errors)
    try:
        try:
            status = _run(argv)
        except SystemExit as end:  # of --help, or of arguments that do not parse
            if _lost_output(sys.stdout):
                raise SystemExit(end.code or 2) from None
            raise
        return status or 2 if _lost_output(sys.stdout) else status
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = output, errors


def _lost_output(output: Output) -> bool:
    """Returns whether text was lost, and says so."""
    output.flush()
    if output.failure is None:
        return False
    reason = output.failure.strerror
    print(f"bitmixer: standard output cannot be written ({reason})", file=sys.stderr)
    return True


def _run(argv: Sequence[str] | None) -> int:
    from bitmixer_jax.errors import UserError, one_line

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
        print(f"bitmixer: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("bitmixer: interrupted; the same command goes on where it can", file=sys.stderr)
        return 130
    except (OSError, MemoryError) as error:
        print(f"bitmixer: {one_line(_machine_error(error))}", file=sys.stderr)
        return 2
    except (RuntimeError, AssertionError) as error:
        if (text := _backend_error(error)) is None:
            raise
        print(f"bitmixer: {one_line(text)}", file=sys.stderr)
        return 2


def _backend_error(error: RuntimeError | AssertionError) -> str | None:
    """Says that JAX cannot start, or that no thread can; None for any other error."""
    if "can't start new thread" in str(error):
        return "no more threads can be started; give this process more memory and threads"
    import jax

    try:
        jax.devices()
    except Exception as cause:  # jax raises several kinds, one of them without a text
        lines = str(cause).splitlines() or ["no such devices"]
        chosen = os.environ.get("JAX_PLATFORMS", "")
        return f"JAX cannot start: {lines[0]} (the environment has JAX_PLATFORMS={chosen})"
    return None


def _machine_error(error: OSError | MemoryError) -> str:
    """Says in one line what the machine refused, where no command knew more about it."""
    if isinstance(error, MemoryError):
        return "memory ran out; give this process more, or ask for less at once"
    named = f"{error.filename}: " if error.filename else ""
    lines = str(error.strerror or error).splitlines() or [type(error).__name__]
    return f"{named}{lines[0]}; check paths, permissions, free space and limits of this process"
