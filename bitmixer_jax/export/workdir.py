"""What the command line does with a workdir: export it, and verify what was written.

An export is written beside its place, loaded again in its own engine, compared with the network on
real images, and only then takes its place; the report lies beside it, as OUT.report.json.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
from collections.abc import Sequence
from typing import Any

import numpy as np

from bitmixer_jax.errors import UserError
from bitmixer_jax.evaluation import random_policies
from bitmixer_jax.export.integer_model import FloatStem, IntegerModel, to_integer_model
from bitmixer_jax.export.packed import load_packed, save_packed
from bitmixer_jax.export.verify import EXACT, Engine, Tolerance, require, summary, verify
from bitmixer_jax.files import cannot_write, check_free, hold, user_path, write_whole
from bitmixer_jax.loaded_model import from_variables
from bitmixer_jax.models import Network
from bitmixer_jax.pairs import uncalibrated_pairs
from bitmixer_jax.policy import closest
from bitmixer_jax.runs import choose_policy
from bitmixer_jax.runtime import Runtime
from bitmixer_jax.training import Run, load_trained
from bitmixer_jax.training.checkpoints import digest

_PYTORCH_FILES = {"model.py", "weights.safetensors", "__pycache__"}
FORMATS = ("packed", "onnx", "pytorch", "safetensors", "stablehlo")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What to export, and how to verify it.

    Attributes:
      format: one of FORMATS.
      policy: as `policy.parse_policy` reads it; for onnx: that policy alone. Empty: all policies.
      changes: to the policy, as `policy.parse_changes` reads them.
      storage_dtype: of the weights of one policy in ONNX: "int8", "int4" or "int2".
      fast: one policy in ONNX in 8 bits throughout, which answers differently (`onnx_int8`).
      tables: dtype of the norms in a packed file: "float32" or "float16".
      images: test images to compare on (no labels are used).
      random: random policies to compare, beside the uniform ones.
      seed: of these.
      data_dir: instead of the one that training used.
    """

    format: str
    policy: str = ""
    changes: Sequence[str] = ()
    storage_dtype: str = "int8"
    fast: bool = False
    norm_dtype: str = "float32"
    images: int = 500
    random: int = 10
    seed: int = 0
    data_dir: str | None = None

    def __post_init__(self) -> None:
        """Raises UserError for values that do not go together."""
        if self.format not in FORMATS:
            hint = closest(self.format, FORMATS)
            raise UserError(f"--format {self.format!r}: unknown{hint}; one of {', '.join(FORMATS)}")
        for name, value, usual, only in (
            ("--policy", self.policy, "", "onnx"),
            ("--storage_dtype", self.storage_dtype, "int8", "onnx"),
            ("--norm_dtype", self.norm_dtype, "float32", "packed"),
        ):
            if value != usual and self.format != only:
                raise UserError(f"{name} {value}: of --format {only} alone")
        for name, given in (
            ("--storage_dtype", self.storage_dtype != "int8"),
            ("--fast", self.fast),
        ):
            if given and not self.policy:
                raise UserError(f"{name}: of one policy alone in ONNX; give --policy")
        if self.fast and self.storage_dtype != "int8":
            raise UserError(
                f"--fast --storage_dtype {self.storage_dtype}: only int8 is fast; give one of them"
            )
        if self.changes and not self.policy:
            raise UserError("--set changes a policy: give one, such as --policy 4")
        for name, number in (("--images", self.images), ("--random", self.random)):
            if number < 1:
                raise UserError(f"{name} {number}: give 1 or more")


class Source:
    """The network to export, and its answers.

    Attributes:
      run, model, variables, runtime: as `load_trained` and `Runtime.load` give them.
      policy: int32 ``[L]`` the one to export, or None.
      images: uint8 ``[N, H, W, C]`` of the test split, for comparison.
      integer_model: the network as exports take it.
    """

    def __init__(self, workdir: str, settings: Settings):
        self.run: Run
        self.model: Network
        self.run, self.model, self.variables = load_trained(workdir)
        if self.model.quant.space is None:
            raise UserError(f"{workdir}: a float twin has no widths; export what was made from it")
        self.runtime = Runtime.load(workdir)
        self.policy = None
        if settings.policy:
            self.policy = choose_policy(self.model, settings.policy, settings.changes)
            self.runtime.check(self.policy)
        test = self.run.load(self.run.test_split, settings.data_dir)
        self.images = test.subset(np.arange(min(settings.images, len(test)))).images
        about = self.run.dataset_info
        assert about is not None  # `load_trained` sets it
        self.integer_model: IntegerModel = to_integer_model(
            self.model,
            self.variables,
            mean=about["mean"],
            std=about["std"],
            classes=tuple(about["classes"]),
            weights_digest=digest(self.variables),
            about={
                "model": dict(self.run.model),
                "dataset": self.run.dataset,
                "images": self.runtime.reader.to_json(),
            },
        )

    def training_images(self, settings: Settings) -> np.ndarray:
        """Some hundred training images, to see which values occur between layers."""
        data = self.run.load(self.run.train_split, settings.data_dir)
        order = np.random.default_rng(settings.seed).permutation(len(data))
        return data.subset(np.sort(order[:500])).images

    def policies(self, settings: Settings) -> list[np.ndarray]:
        """Those to compare: uniform and random ones whose pairs training visited."""
        if self.policy is not None:
            return [self.policy]
        space, layers = self.model.space, self.model.num_layers
        asked = [space.uniform(width, layers) for width in space.choices]
        asked += list(random_policies(self.model, settings.random, settings.seed))
        stats = self.variables["batch_stats"]
        known = [p for p in asked if not uncalibrated_pairs(self.model, stats, p[None])]
        if not known:
            raise UserError("export: training visited all pairs of no policy; train for longer")
        return known


def export_workdir(
    workdir: str, out: pathlib.Path, settings: Settings, overwrite: bool = False
) -> list[str]:
    """Exports a trained network to ``out``, a file (a folder for pytorch), and verifies it.

    A hidden lock file beside ``out`` keeps a second process from the same place. A killed export
    leaves a hidden folder, which the next one removes.

    Args:
      workdir: WORKDIR or WORKDIR@STAGE.
      out: the file or folder to write.
      settings: format and options.
      overwrite: replace an export that exists.

    Returns:
      lines that say what was written.

    Raises:
      UserError: no trained network there, ``out`` exists or is being written, an engine is not
        installed, there is no room, or the export does not agree with the network (then nothing is
        written).
    """
    out = user_path(out)
    if not out.name:
        raise UserError(f"--out {out}: names no file")
    _names(out)
    check_free(out, overwrite, folder=settings.format == "pytorch")
    _check_folder(out)
    if out.is_symlink():
        raise UserError(f"--out {out}: a link; name a file, or a folder, itself")
    if out.exists() and not (out.is_file() or out.is_dir()):
        raise UserError(f"--out {out}: a device or a pipe; name a file")
    with hold(out.with_name(f".{out.name}.lock"), f"--out {out}"):
        return _export(workdir, out, settings, overwrite)


def _names(out: pathlib.Path) -> None:
    """Raises UserError where the names beside ``out`` are too long."""
    for path in (out, _partial(out), _report(out)):
        try:
            os.lstat(path)
        except FileNotFoundError:
            pass
        except (OSError, ValueError) as error:
            raise UserError(
                f"--out {out}: cannot write there ({getattr(error, 'strerror', error)}); name "
                "another"
            ) from None


def _partial(out: pathlib.Path) -> pathlib.Path:
    """The folder where an export is made before it takes its place."""
    return out.with_name(f".{out.name}.partial")


def _report(out: pathlib.Path) -> pathlib.Path:
    """The report beside an export."""
    return out.with_name(f"{out.name}.report.json")


def _export(workdir: str, out: pathlib.Path, settings: Settings, overwrite: bool) -> list[str]:
    """`export_workdir`, where no other process writes to ``out``."""
    check_free(out, overwrite, folder=settings.format == "pytorch")  # since it was held
    partial = _partial(out)
    try:
        _remove(partial)  # of an export that was killed
    except OSError as error:
        raise cannot_write(out, error, "--out") from None
    source = Source(workdir, settings)
    try:
        partial.mkdir()
        made = partial / out.name
        what, engine, tolerance = _WRITERS[settings.format](source, made, settings)
        report = verify(
            what,
            source.runtime.predict,
            engine,
            source.images,
            source.policies(settings),
            tolerance,
        )
        report |= {"network": source.integer_model.weights_digest, "bytes": _size(made)}
        require(report)
        text = json.dumps(report, indent=1) + "\n"
        prepared = partial / _report(out).name
        write_whole(prepared, text)  # a full disk shows before anything is replaced
        _put(made, out)
        _put(prepared, _report(out))
    except OSError as error:
        raise cannot_write(out, error, "--out") from None
    except UserError as error:  # name the place that the user gave
        raise UserError(str(error).replace(str(partial / out.name), f"--out {out}")) from None
    finally:
        with contextlib.suppress(OSError):
            _remove(partial)
    lines = [summary(report), f"written: {out} ({report['bytes']:,} bytes), {_report(out).name}"]
    return [*_sizes(source.integer_model, out, settings), *lines] if what == "packed" else lines


def _put(made: pathlib.Path, out: pathlib.Path) -> None:
    """Moves an export to its place. A file replaces a file atomically; a folder does not."""
    _check_folder(out)  # since the export began
    if made.is_dir() or out.is_dir():
        _remove(out)
    made.replace(out)


def _check_folder(out: pathlib.Path) -> None:
    """Raises UserError where a folder holds other files than those of an export."""
    if out.is_dir() and not {file.name for file in out.iterdir()} <= _PYTORCH_FILES:
        raise UserError(f"--out {out}: holds more than an export; name another folder")


def _remove(path: pathlib.Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _size(path: pathlib.Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def _packed(source: Source, path: pathlib.Path, settings: Settings) -> tuple[str, Engine, Any]:
    save_packed(path, source.integer_model, settings.norm_dtype)
    runtime = Runtime.load(path)
    if settings.norm_dtype == "float16":
        # Rounded tables move values to other codes, and those move others: on ResNet-20, CIFAR-10,
        # 96% of images keep their class (92 to 99 by policy) at the same accuracy.
        return "packed", runtime.predict, Tolerance(share=1.0, agreement=0.9)
    # Integer sums are exact. The float multiply-adds around them are compiled twice, in two
    # programmes, and one rounding may differ: seen in 1 of 53,000 (one value, one code, 0.02).
    return "packed", runtime.predict, Tolerance(share=1e-3, agreement=0.999)


def _onnx(source: Source, path: pathlib.Path, settings: Settings) -> tuple[str, Engine, Any]:
    from bitmixer_jax.export.onnx_graph import policy_model, save_onnx, switchable_model
    from bitmixer_jax.export.onnx_int8 import int8_model, stream_ranges
    from bitmixer_jax.export.onnx_runner import OnnxRunner

    network, policy = source.integer_model, source.policy
    if policy is None:
        model = switchable_model(network)
    elif settings.fast:
        ranges = stream_ranges(network, policy, source.training_images(settings))
        model = int8_model(network, policy, ranges)
    else:
        model = policy_model(network, policy, settings.storage_dtype)
    save_onnx(path, model)
    runners = [OnnxRunner(path, optimization=level) for level in ("basic", "default")]

    def both(images: np.ndarray, policy: np.ndarray) -> np.ndarray:
        """The default level's answer, or none where the basic level gives other classes."""
        asked = policy if runners[0].switchable else None
        basic, usual = (runner(images, asked) for runner in runners)
        if (basic.argmax(-1) != usual.argmax(-1)).mean() > 0.01:
            return np.full_like(usual, np.nan)
        return usual

    what = "onnxruntime, basic and default optimisation"
    if settings.fast:
        # Residual branches in 8 bits: on ResNet-20, CIFAR-10, 88% (2 bits) to 97% (4 bits) of
        # images keep their class. This guards against mistakes, not against that.
        return what, both, Tolerance(share=1.0, agreement=0.75)
    return what, both, Tolerance()


def _pytorch(source: Source, path: pathlib.Path, settings: Settings) -> tuple[str, Engine, Any]:
    from bitmixer_jax.export.pytorch import TorchRunner, export_pytorch

    export_pytorch(source.integer_model, path)
    return "pytorch", TorchRunner(path), Tolerance()


def _safetensors(source: Source, path: pathlib.Path, settings: Settings) -> tuple[str, Engine, Any]:
    from bitmixer_jax.export.raw import export_raw, load_raw

    network = source.integer_model
    export_raw(
        source.variables,
        path,
        {
            "format": "bitmixer-variables",
            "model": json.dumps(dict(source.run.model)),
            "choices": json.dumps(network.space.choices),
            "classes": json.dumps(network.classes),
            "mean": json.dumps(network.mean.tolist()),
            "std": json.dumps(network.std.tolist()),
            "network": network.weights_digest,
        },
    )
    again = Runtime(
        from_variables(
            source.model,
            load_raw(path),
            mean=network.mean,
            std=network.std,
            classes=network.classes,
        )
    )
    return "jax, variables read back", again.predict, EXACT


def _stablehlo(source: Source, path: pathlib.Path, settings: Settings) -> tuple[str, Engine, Any]:
    from bitmixer_jax.export.stablehlo import StablehloRunner, export_stablehlo

    export_stablehlo(source.integer_model, path)
    return "stablehlo", StablehloRunner(path), Tolerance()


_WRITERS = {
    "packed": _packed,
    "onnx": _onnx,
    "pytorch": _pytorch,
    "safetensors": _safetensors,
    "stablehlo": _stablehlo,
}


def _sizes(network: IntegerModel, path: pathlib.Path, settings: Settings) -> list[str]:
    """A Markdown table of sizes: what this file takes, and weights at other widths."""
    weights = sum(layer.info.params for layer in network.layers)
    stem, head = network.stem, network.head
    first = stem.kernel if isinstance(stem, FloatStem) else stem.kernels[0].codes
    ends = first.nbytes + head.kernel.nbytes + head.bias.nbytes
    size = path.stat().st_size
    tables = sum(2 * k.multiplier.size for layer in network.layers for k in layer.kernels)
    tables *= 4 if settings.norm_dtype == "float32" else 2
    widest = network.space.widest
    bare = weights * widest / 8 + ends
    rows = ["| | bytes |", "|---|---|", f"| float32 weights | {4 * weights + ends:,.0f} |"]
    for width in sorted({8, 4, 3, 2, *network.space.choices}, reverse=True):
        rows.append(f"| {width}-bit weights and ends, bare | {weights * width / 8 + ends:,.0f} |")
    rows += [
        f"| this file: all widths up to {widest} bits | {size:,} "
        f"({100 * (size / bare - 1):+.1f}% over bare {widest}-bit) |",
        f"| of it norms of all pairs of widths, {settings.norm_dtype} | {tables:,} |",
    ]
    for planes, width in _cuts(path):
        rows.append(f"| cut to {width} bits ({planes[0]} planes) | {planes[1]:,} |")
    return rows


def _cuts(path: pathlib.Path) -> list[tuple[tuple[int, int], int]]:
    """((planes, bytes), widest width) of each narrower file that this one can be cut to."""
    from bitmixer_jax.export.packed import plane_ends

    found = []
    for planes, end in plane_ends(path):
        try:
            found.append(((planes, end), load_packed(path, planes).space.widest))
        except UserError:  # too few planes for any width
            continue
    kept = {width: entry for entry, width in reversed(found)}  # the least planes of each width
    widest = max(kept, default=0)
    return [(kept[width], width) for width in sorted(kept, reverse=True) if width != widest]
