"""The command line: ``bitmixer train | evaluate | cost | search | front | prepare | benchmark``.

Exit status: 0; 2 for a user's mistake (one line on standard error); 143 after SIGTERM and 130
after an interrupt, once the state is saved. Heavy imports wait until a command runs.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
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

    train = command(
        "train",
        _train,
        "train a network, or go on where a run was stopped",
        "bitmixer train --config experiments/configs/digits.py --workdir runs/digits "
        "--config.seed=1 --config.stages.mixed.epochs=40",
    )
    train.add_argument(
        "--config", required=True, metavar="FILE[:VARIANT]", help="Python file with get_config()"
    )
    train.add_argument("--workdir", required=True, type=pathlib.Path, help="folder of the run")
    train.add_argument("--config.NAME", metavar="VALUE", help="change a setting (repeatable)")

    evaluate = command(
        "evaluate",
        _evaluate,
        "test accuracy by uniform width, of random policies, of one policy",
        "bitmixer evaluate --workdir runs/digits --random 100 --policy 4,3,2,2,3,4 --json out.json",
    )
    evaluate.add_argument(
        "--workdir",
        required=True,
        metavar="DIR[@STAGE]",
        help="folder of a run; @STAGE: as it was at the end of that stage",
    )
    evaluate.add_argument(
        "--policy", help="a width (3), one per layer (4,3,2,...), or a policy file"
    )
    _add_set(evaluate)
    evaluate.add_argument(
        "--random", type=_whole, default=0, metavar="N", help="number of random policies"
    )
    evaluate.add_argument(
        "--seed", type=_whole, default=0, help="of the random policies (default 0)"
    )
    evaluate.add_argument("--no-uniform", action="store_true", help="leave the uniform widths out")
    evaluate.add_argument(
        "--levels", action="store_true", help="also count the levels each layer uses"
    )
    evaluate.add_argument(
        "--recalibrate",
        action="store_true",
        help="estimate BN statistics of pairs of widths never visited in training",
    )
    evaluate.add_argument("--data_dir", help="where the data are, if not where training found them")
    evaluate.add_argument(
        "--json", type=pathlib.Path, metavar="FILE", help="write the result there"
    )

    cost = command(
        "cost",
        _cost,
        "what a policy costs; change the widths of some layers",
        "bitmixer cost --workdir runs/digits --policy 4 --set 'stage3.*=2' --out policy.json",
    )
    whose = cost.add_mutually_exclusive_group(required=True)
    whose.add_argument("--workdir", metavar="DIR", help="folder of a run")
    whose.add_argument("--model", help="name of a network for ImageNet or CIFAR, such as resnet18")
    cost.add_argument("--policy", help="as of evaluate (default: the widest width)")
    _add_set(cost)
    _add_latency(cost)
    _add_out(cost, "write the policy there", required=False)

    search = command(
        "search",
        _search,
        "find the best policy within a budget",
        "bitmixer search --workdir runs/digits --method greedy --budget avg_bits=3 "
        "--out policy.json",
    )
    _add_search(search)
    search.add_argument(
        "--budget",
        required=True,
        action="append",
        metavar="COST=MOST",
        help="avg_bits=3, bitops=60%% (of the widest), bytes=40000, ...; repeat to combine",
    )
    _add_out(search, "the policy file to write")

    front = command(
        "front",
        _front,
        "find the best policies over the whole range of a cost, and plot them",
        "bitmixer front --workdir runs/digits --method evolution --cost bitops --out runs/front",
    )
    _add_search(front)
    front.add_argument(
        "--cost", default="bitops", help="avg_bits, bitops (default), bytes, latency_ms, ..."
    )
    front.add_argument(
        "--random",
        type=_whole,
        default=100,
        metavar="N",
        help="random policies to draw beside it (default 100)",
    )
    _add_out(front, "folder for front.json, front.png and widths.png")

    prepare = command(
        "prepare",
        _prepare,
        "verify a data set and keep a local copy for training",
        "bitmixer prepare cifar10 --source cifar-10-python.tar.gz --data_dir data",
    )
    prepare.add_argument("name", help="cifar10, fashion_mnist or mnist")
    prepare.add_argument("--source", required=True, type=pathlib.Path, help="archive or folder")
    prepare.add_argument(
        "--data_dir",
        type=pathlib.Path,
        help="where the copy goes (default: $BITMIXER_DATA or a cache folder)",
    )

    benchmark = command(
        "benchmark",
        _benchmark,
        "time of a training step against that of the float twin, in one run",
        "bitmixer benchmark --model resnet20 --batch_size 128 --json speed.json",
    )
    benchmark.add_argument(
        "--model", default="resnet20", help="name of the network (default resnet20)"
    )
    benchmark.add_argument(
        "--batch_size", type=_whole, default=128, help="over all devices (default 128)"
    )
    benchmark.add_argument(
        "--steps", type=_whole, default=20, help="timed steps of each kind (default 20)"
    )
    benchmark.add_argument("--compute_dtype", default="float32", help="float32 or bfloat16")
    benchmark.add_argument(
        "--json", type=pathlib.Path, metavar="FILE", help="write the result there"
    )
    return parser


def _add_set(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="LAYER=WIDTH",
        help="change a layer of --policy, such as stage2.block1.conv1=2 or 'stage2.*=2' "
        "(repeatable)",
    )


def _add_latency(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--latency", type=pathlib.Path, metavar="FILE", help="measured seconds by layer and width"
    )


def _add_out(command: argparse.ArgumentParser, help: str, required: bool = True) -> None:
    command.add_argument("--out", required=required, type=pathlib.Path, help=help)
    command.add_argument("--overwrite", action="store_true", help="replace what is there")


def _add_search(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--workdir", required=True, metavar="DIR[@STAGE]", help="folder of a trained run"
    )
    command.add_argument(
        "--method", default="greedy", help="greedy (default), ilp, evolution or random"
    )
    command.add_argument(
        "--seed", type=_whole, default=0, help="of the images and of the method (default 0)"
    )
    command.add_argument(
        "--evaluations",
        type=_whole,
        default=512,
        metavar="N",
        help="policies that evolution and random evaluate (default 512)",
    )
    command.add_argument(
        "--sensitivity",
        default="measured",
        help="for ilp: measured (default), or hessian: from second derivatives",
    )
    command.add_argument(
        "--images",
        type=_whole,
        default=2000,
        metavar="N",
        help="images that score a policy (default 2000)",
    )
    command.add_argument(
        "--split", default="", help="their split (default: what training left out, if anything)"
    )
    command.add_argument("--data_dir", help="where the data are, if not where training found them")
    _add_latency(command)


def _whole(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text}: give a whole number, 0 or more")
    return int(text)


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
    except BrokenPipeError:
        return 1


def _train(arguments: argparse.Namespace) -> int:
    from bitmixer_jax.runs import train_and_report
    from bitmixer_jax.training import Interrupted, load_config

    config = load_config(arguments.config, arguments.overrides)
    try:
        folder, summary = train_and_report(config, arguments.workdir)
    except Interrupted as signal:
        return 128 + int(signal.args[0])
    _print_markdown(summary)
    print(f"plots and summary: {folder}")
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    from bitmixer_jax.report import table
    from bitmixer_jax.runs import evaluate_workdir

    _check_json(arguments.json)
    result = evaluate_workdir(
        arguments.workdir,
        policy=arguments.policy,
        changes=arguments.set,
        random=arguments.random,
        seed=arguments.seed,
        uniform=not arguments.no_uniform,
        data_dir=arguments.data_dir,
        recalibrate_unvisited=arguments.recalibrate,
        count_levels=arguments.levels,
    )
    levels = result.pop("levels", None)
    _print_markdown(table(result))
    if levels:
        print("layer, bits: levels used by weights, by activations (share at the top level)")
        for row in levels:
            print(
                f"{row.layer}, {row.bits}: {row.weights}/{2**row.bits}, "
                f"{row.activations}/{2**row.bits} ({100 * row.saturated:.1f}%)"
            )
    _write_json(arguments.json, result)
    return 0


def _cost(arguments: argparse.Namespace) -> int:
    from bitmixer_jax.cost import costs, describe
    from bitmixer_jax.runs import choose_policy, network_of

    if arguments.out is not None:
        from bitmixer_jax.files import check_free

        check_free(arguments.out, arguments.overwrite)
    model = network_of(arguments.workdir, arguments.model)
    text = arguments.policy or str(model.space.widest)
    policy = choose_policy(model, text, arguments.set)
    print(f"policy {','.join(map(str, policy))}")
    _print_markdown(describe(model, policy, costs(model, arguments.latency)))
    if arguments.out is not None:
        from bitmixer_jax.bits import save_policy

        save_policy(arguments.out, policy, model.names, model.space, overwrite=arguments.overwrite)
        print(f"written: {arguments.out}")
    return 0


def _settings(arguments: argparse.Namespace) -> Any:
    from bitmixer_jax.search.workdir import Settings

    return Settings(
        method=arguments.method,
        seed=arguments.seed,
        evaluations=arguments.evaluations,
        sensitivity=arguments.sensitivity,
        images=arguments.images,
        split=arguments.split,
        data_dir=arguments.data_dir,
        latency=arguments.latency,
    )


def _search(arguments: argparse.Namespace) -> int:
    from bitmixer_jax.search.workdir import search_workdir

    lines = search_workdir(
        arguments.workdir,
        arguments.budget,
        arguments.out,
        _settings(arguments),
        overwrite=arguments.overwrite,
    )
    _print_markdown(lines)
    print(f"policy: {arguments.out}")
    return 0


def _front(arguments: argparse.Namespace) -> int:
    from bitmixer_jax.search.workdir import front_workdir

    lines = front_workdir(
        arguments.workdir,
        arguments.cost,
        arguments.out,
        _settings(arguments),
        random=arguments.random,
        overwrite=arguments.overwrite,
    )
    _print_markdown(lines)
    print(f"front and plots: {arguments.out}")
    return 0


def _prepare(arguments: argparse.Namespace) -> int:
    from bitmixer_jax.data import default_data_dir, prepare

    data_dir = arguments.data_dir or default_data_dir()
    print(f"ready: {prepare(arguments.name, arguments.source, data_dir)}")
    return 0


def _benchmark(arguments: argparse.Namespace) -> int:
    from bitmixer_jax.benchmark import benchmark, describe

    _check_json(arguments.json)
    result = benchmark(
        arguments.model,
        batch_size=arguments.batch_size,
        steps=arguments.steps,
        compute_dtype=arguments.compute_dtype,
    )
    print(describe(result))
    _write_json(arguments.json, result)
    return 0


def _print_markdown(lines: list[str]) -> None:
    from rich.console import Console
    from rich.markdown import Markdown

    Console().print(Markdown("\n".join(lines)))


def _check_json(path: pathlib.Path | None) -> None:
    if path is not None:
        from bitmixer_jax.files import check_new

        check_new(path, "--json")


def _write_json(path: pathlib.Path | None, result: Any) -> None:
    from bitmixer_jax.errors import UserError

    if path is not None:
        try:
            path.write_text(json.dumps(result, indent=2) + "\n")
        except OSError as error:
            raise UserError(f"--json {path}: cannot write it ({error.strerror})") from None


if __name__ == "__main__":
    sys.exit(main())
