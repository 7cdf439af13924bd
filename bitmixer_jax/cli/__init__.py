"""The command line: ``bitmixer train | evaluate | cost | search | front | export | predict ...``.

Exit status: 0 for success, 2 for a mistake of the user (one line on standard error), 143 after
SIGTERM and 130 after an interrupt (the state of a training is saved first), and 75 if another
process of the training was lost. JAX is imported only when a command runs, so that ``--help``
answers at once.
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

# The flag that does what the message of an error with this code proposes.
_FLAGS = {"exists": "overwrite", "uncalibrated": "recalibrate"}


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
    """Runs the command of ``sys.argv``, and ends the process."""
    fill_closed()
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("bitmixer: warning: %(message)s"))
    logger = logging.getLogger("bitmixer_jax")
    logger.addHandler(handler)
    logger.propagate = False  # absl would print the warnings a second time
    status = main()
    if status == 2:
        # The error was printed in one line. On a full disk, threads of orbax and TensorBoard would
        # print tracebacks while the interpreter shuts down.
        os._exit(status)
    sys.exit(status)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status.

    The command goes on if a reader closes the pipe, as in ``| head -1``. It also goes on if
    standard output cannot be written, for example on a full disk; then the status is 2.

    Args:
      argv: words of the command; None: those of ``sys.argv``.
    """
    fill_closed()
    output, errors = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = Output(output), Output(errors)
    try:
        try:
            status = _run(argv)
        except SystemExit as end:  # from --help, or from wrong arguments
            if _lost_output(sys.stdout):
                raise SystemExit(end.code or 2) from None
            raise
        return status or 2 if _lost_output(sys.stdout) else status
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = output, errors


def _lost_output(output: Output) -> bool:
    """Returns whether printed text was lost, and says so on standard error."""
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
    except KeyboardInterrupt:
        print("bitmixer: interrupted; run the same command again to continue", file=sys.stderr)
        return 130
    except UserError as error:
        flag = _FLAGS.get(error.code, "")
        text = f"{error} (--{flag})" if getattr(arguments, flag, None) is False else str(error)
    except (OSError, MemoryError) as error:
        text = _machine_error(error)
    except (RuntimeError, AssertionError) as error:
        text = _backend_error(error)
        if not text:
            raise
    print(f"bitmixer: {one_line(text)}", file=sys.stderr)
    return 2


def _backend_error(error: RuntimeError | AssertionError) -> str:
    """Returns a line if JAX or a thread cannot start, and "" for any other error."""
    if "can't start new thread" in str(error):
        return "no more threads can be started; allow this process more memory and threads"
    import jax

    from bitmixer_jax.errors import reason

    try:
        jax.devices()
    except Exception as cause:  # JAX raises several types, one of them without a text
        platforms = os.environ.get("JAX_PLATFORMS", "")
        return f"JAX cannot start: {reason(cause)} (the environment has JAX_PLATFORMS={platforms})"
    return ""


def _machine_error(error: OSError | MemoryError) -> str:
    """Returns a line about an error of the machine that no command has explained."""
    from bitmixer_jax.errors import reason

    if isinstance(error, MemoryError):
        return "memory ran out; allow this process more memory, or do less at a time"
    named = f"{error.filename}: " if error.filename else ""
    return f"{named}{reason(error)}; check paths, permissions, free space and process limits"
