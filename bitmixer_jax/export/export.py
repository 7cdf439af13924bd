"""Exports a trained network to a file or a folder, and verifies what was written.

An export is first written to a hidden folder. There it is loaded again in its own engine, such as
onnxruntime, and compared with the network on real images. Only an export that agrees is moved to
OUT, with a report beside it, OUT.report.json.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import numpy as np

from bitmixer_jax.errors import UserError
from bitmixer_jax.evaluation import random_policies
from bitmixer_jax.export.integer_engine import from_integer_model
from bitmixer_jax.export.integer_model import IntegerModel, to_integer_model
from bitmixer_jax.export.packed import load_packed, save_packed
from bitmixer_jax.export.verify import EXACT, Engine, Tolerance, require, verify
from bitmixer_jax.files import cannot_write, check_new, hold, user_path, write_whole
from bitmixer_jax.loaded_model import Predictor, from_trained, from_variables
from bitmixer_jax.policy import as_policy, closest
from bitmixer_jax.trained import Trained, load

_PYTORCH_FILES = {"model.py", "weights.safetensors", "__pycache__"}
FORMATS = ("packed", "onnx", "pytorch", "safetensors", "stablehlo")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """Settings of an export and of its verification.

    Attributes:
      format: one of FORMATS: "packed", "onnx", "pytorch", "safetensors" or "stablehlo".
      policy: onnx: export this policy alone. It is ``[L]`` widths, one width for all layers, text
        such as "4,3,2,2,3,4", or a policy file. None: export all policies; the policy is an input.
      changes: widths of some layers of that policy, by layer name. See `policy.with_widths`.
      storage_dtype: onnx with one policy: type of the weights: "int8", "int4" or "int2".
      fast: onnx with one policy: compute everything in 8 bits. This is faster, but the answers
        differ; see `onnx_int8`.
      norm_dtype: packed: type of the norms: "float32" or "float16".
      images: number of test images to compare the answers on. Labels are not used.
      random: number of random policies to compare, beside the uniform ones.
      seed: of the random policies.
      data_dir: folder of the data, if they are no longer where training found them.

    Raises:
      UserError: a value is not allowed, or two values do not go together.

    Examples:
      >>> ExportSettings(format="onnx", policy=4, storage_dtype="int4").images
      500
      >>> ExportSettings(format="packed", fast=True)
      Traceback (most recent call last):
      bitmixer_jax.errors.UserError: fast is for one policy in ONNX; give a policy
    """

    format: str
    policy: Any = None
    changes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    storage_dtype: str = "int8"
    fast: bool = False
    norm_dtype: str = "float32"
    images: int = 500
    random: int = 10
    seed: int = 0
    data_dir: str | None = None

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            hint = closest(self.format, FORMATS)
            raise UserError(
                f"format {self.format!r}: unknown{hint}; one of {', '.join(FORMATS)}",
                "unknown-name",
            )
        stored = self.storage_dtype != "int8"
        for name, is_set, only in (
            ("policy", self.policy is not None, "onnx"),
            ("storage_dtype", stored, "onnx"),
            ("norm_dtype", self.norm_dtype != "float32", "packed"),
        ):
            if is_set and self.format != only:
                value = getattr(self, name)
                raise UserError(f"{name} {value}: only for format {only}", "conflict")
        for name, is_set in (("storage_dtype", stored), ("fast", self.fast)):
            if is_set and self.policy is None:
                raise UserError(f"{name} is for one policy in ONNX; give a policy", "missing-value")
        if self.fast and stored:
            raise UserError(
                f"fast with storage_dtype {self.storage_dtype}: only int8 is fast; "
                "give one of the two",
                "conflict",
            )
        if self.changes and self.policy is None:
            raise UserError("changes of widths need a policy; give one, such as 4", "missing-value")
        for name, number in (("images", self.images), ("random", self.random)):
            if number < 1:
                raise UserError(f"{name} {number}: give 1 or more")


def integer_model_of(trained: Trained) -> IntegerModel:
    """Returns a trained network in integers, as exports write it; see `to_integer_model`."""
    info = trained.dataset_info
    return to_integer_model(
        trained.model,
        trained.variables,
        mean=info["mean"],
        std=info["std"],
        classes=tuple(info["classes"]),
        weights_digest=trained.weights_digest,
        about={
            "model": dict(trained.run.model),
            "dataset": trained.run.dataset,
            "images": trained.reader.to_json(),
        },
    )


class _Source:
    """The network to export, and what it is compared on.

    Attributes:
      trained: the network.
      settings: of the export.
      policy: int32 ``[L]``, the one policy to export; None: all policies.
      images: uint8 ``[N, H, W, C]`` of the test split, to compare on.
      reference: computes the logits of the network.
      integer_model: the network in integers.
    """

    def __init__(self, trained: Trained, settings: ExportSettings):
        trained.require_widths("export")
        self.trained, self.settings = trained, settings
        self.reference = Predictor(from_trained(trained))
        model = trained.model
        self.policy = None
        if settings.policy is not None:
            policy = as_policy(settings.policy, model.names, model.space, settings.changes)
            self.policy = self.reference.check(policy)
        test = trained.load_split(trained.run.test_split, settings.data_dir)
        self.images = test.subset(np.arange(min(settings.images, len(test)))).images
        self.integer_model = integer_model_of(trained)

    def training_images(self) -> np.ndarray:
        """Returns 500 training images, uint8, to measure the ranges of values between layers."""
        data = self.trained.load_split(self.trained.run.train_split, self.settings.data_dir)
        order = np.random.default_rng(self.settings.seed).permutation(len(data))
        return data.subset(np.sort(order[:500])).images

    def policies(self) -> list[np.ndarray]:
        """Returns the policies to compare: the one to export, or uniform and random ones.

        Uniform and random policies with pairs of widths that training never visited are left out.
        """
        if self.policy is not None:
            return [self.policy]
        model, settings = self.trained.model, self.settings
        policies = [model.space.uniform(w, model.num_layers) for w in model.space.choices]
        policies += list(random_policies(model, settings.random, settings.seed))
        calibrated = [p for p in policies if not self.reference.loaded.uncalibrated(p)]
        if not calibrated:
            raise UserError(
                "export: each policy to compare uses a pair of widths that training never visited; "
                "train for longer",
                "uncalibrated",
            )
        return calibrated


def export_network(
    source: Trained | str | pathlib.Path,
    out: str | pathlib.Path,
    *,
    overwrite: bool = False,
    **settings: Any,
) -> dict[str, Any]:
    """Exports a trained network to a file (pytorch: to a folder), and verifies it.

    The export is loaded again in its own engine and compared with the network on test images. If it
    does not agree, nothing is written. While it runs, a hidden lock file beside ``out`` keeps other
    processes away. An export that was killed leaves a hidden folder, which the next one removes.

    Args:
      source: WORKDIR, WORKDIR@STAGE, or what `trained.load` returned.
      out: the file or folder to write. A report is written beside it, as OUT.report.json.
      overwrite: replace an export that exists.
      settings: attributes of `ExportSettings`. ``format`` is required.

    Returns:
      the report of `verify.verify`, with the entries "weights_digest", "format" and "bytes" (size
      of the export).

    Raises:
      UserError: there is no trained network, ``out`` exists or cannot be written, another process
        writes it, the engine is not installed, or the export does not agree with the network.

    Examples:
      >>> import bitmixer_jax as bm
      >>> report = bm.export_network("runs/digits", "net.onnx", format="onnx")  # doctest: +SKIP
      >>> report["top1_agreement"], report["bytes"]  # doctest: +SKIP
      (1.0, 41213)
    """
    checked = ExportSettings(**settings)
    out = user_path(out)
    if not out.name:
        raise UserError(f"{out}: names no file", "bad-path")
    check_new(out, overwrite=overwrite, folder=checked.format == "pytorch")
    for path in (_partial(out), _report(out)):  # their names are longer, perhaps too long
        check_new(path, folder=True)
    _check_folder(out)
    if out.is_symlink():
        raise UserError(f"{out}: is a link; name the file or the folder itself", "bad-path")
    if out.exists() and not (out.is_file() or out.is_dir()):
        raise UserError(f"{out}: is a device or a pipe; name a file", "bad-path")
    with hold(out.with_name(f".{out.name}.lock"), str(out)):
        return _export(source, out, checked, overwrite)


def _partial(out: pathlib.Path) -> pathlib.Path:
    """Returns the hidden folder in which an export is made and verified."""
    return out.with_name(f".{out.name}.partial")


def _report(out: pathlib.Path) -> pathlib.Path:
    """Returns the path of the report beside an export."""
    return out.with_name(f"{out.name}.report.json")


def _export(
    source: Trained | str | pathlib.Path,
    out: pathlib.Path,
    settings: ExportSettings,
    overwrite: bool,
) -> dict[str, Any]:
    """Exports while no other process writes to ``out``. Arguments as `export_network`."""
    # Again: another process may have written it before this one held the lock.
    check_new(out, overwrite=overwrite, folder=settings.format == "pytorch")
    partial = _partial(out)
    try:
        _remove(partial)  # an export that was killed has left it
    except OSError as error:
        raise cannot_write(out, error) from None
    network = _Source(load(source), settings)
    try:
        partial.mkdir()
        export = partial / out.name
        # The comparison runs in the engine that users will run, on the file that they will load.
        # So it also finds mistakes of the format, of the reader and of the engine.
        engine_name, engine, tolerance = _WRITERS[settings.format](network, export)
        report = verify(
            engine_name,
            network.reference,
            engine,
            network.images,
            network.policies(),
            tolerance,
        )
        report |= {
            "format": settings.format,
            "weights_digest": network.integer_model.weights_digest,
            "bytes": _size(export),
        }
        require(report)
        # Both files exist before the first is moved: a full disk must not leave half an export.
        report_file = partial / _report(out).name
        write_whole(report_file, json.dumps(report, indent=1) + "\n")
        _move(export, out)
        _move(report_file, _report(out))
    except OSError as error:
        raise cannot_write(out, error) from None
    except UserError as error:  # name the path that the user gave, and not the hidden one
        message = str(error).replace(str(partial / out.name), str(out))
        raise UserError(message, error.code) from None
    finally:
        with contextlib.suppress(OSError):
            _remove(partial)
    return report


def _move(source: pathlib.Path, out: pathlib.Path) -> None:
    """Moves a file or folder to ``out``. A file replaces a file atomically; a folder does not."""
    _check_folder(out)  # again: somebody may have added files while the export was made
    if source.is_dir() or out.is_dir():
        _remove(out)
    source.replace(out)


def _check_folder(out: pathlib.Path) -> None:
    """Checks that a folder holds no other files than those of an export. Raises UserError."""
    if out.is_dir() and not {file.name for file in out.iterdir()} <= _PYTORCH_FILES:
        raise UserError(f"{out}: holds more than an export; name another folder", "exists")


def _remove(path: pathlib.Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _size(path: pathlib.Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def _packed(source: _Source, path: pathlib.Path) -> tuple[str, Engine, Tolerance]:
    save_packed(path, source.integer_model, source.settings.norm_dtype)
    engine = Predictor(from_integer_model(load_packed(path)))
    if source.settings.norm_dtype == "float16":
        # With rounded norms some values get another code, and that changes later values too. On
        # ResNet-20 and CIFAR-10, 96% of images keep their class (92% to 99% by policy), and the
        # accuracy is the same.
        return "packed", engine, Tolerance(share=1.0, agreement=0.9)
    # Integer sums are exact. The float multiply-adds around them are compiled in two programs that
    # may round differently. That was seen once in 53,000 images: one value got another code, and a
    # logit changed by 0.02.
    return "packed", engine, Tolerance(share=1e-3, agreement=0.999)


def _onnx(source: _Source, path: pathlib.Path) -> tuple[str, Engine, Tolerance]:
    from bitmixer_jax.export.onnx_graph import policy_model, save_onnx, switchable_model
    from bitmixer_jax.export.onnx_int8 import int8_model, stream_ranges
    from bitmixer_jax.export.onnx_runner import OnnxRunner

    network, policy, settings = source.integer_model, source.policy, source.settings
    if policy is None:
        model = switchable_model(network)
    elif settings.fast:
        ranges = stream_ranges(network, policy, source.training_images())
        model = int8_model(network, policy, ranges)
    else:
        model = policy_model(network, policy, settings.storage_dtype)
    save_onnx(path, model)
    runners = [OnnxRunner(path, optimization=level) for level in ("basic", "default")]

    def both(images: np.ndarray, policy: np.ndarray) -> np.ndarray:
        """Returns the logits of the default level, or NaN if the basic level disagrees."""
        bits = policy if runners[0].switchable else None
        basic, default = (runner(images, bits) for runner in runners)
        if (basic.argmax(-1) != default.argmax(-1)).mean() > 0.01:
            return np.full_like(default, np.nan)
        return default

    engine_name = "onnxruntime, basic and default optimisation"
    if settings.fast:
        # The residual branches have 8 bits. On ResNet-20 and CIFAR-10, 88% (2 bits) to 97% (4 bits)
        # of images keep their class. The tolerance allows that, and finds mistakes only.
        return engine_name, both, Tolerance(share=1.0, agreement=0.75)
    return engine_name, both, Tolerance()


def _pytorch(source: _Source, path: pathlib.Path) -> tuple[str, Engine, Tolerance]:
    from bitmixer_jax.export.pytorch import TorchRunner, export_pytorch

    export_pytorch(source.integer_model, path)
    return "pytorch", TorchRunner(path), Tolerance()


def _safetensors(source: _Source, path: pathlib.Path) -> tuple[str, Engine, Tolerance]:
    from bitmixer_jax.export.raw import export_raw, load_raw

    network = source.integer_model
    export_raw(
        source.trained.variables,
        path,
        {
            "format": "bitmixer-variables",
            "model": json.dumps(dict(source.trained.run.model)),
            "choices": json.dumps(network.space.choices),
            "classes": json.dumps(network.classes),
            "mean": json.dumps(network.mean.tolist()),
            "std": json.dumps(network.std.tolist()),
            "network": network.weights_digest,
        },
    )
    read_back = from_variables(
        source.trained.model,
        load_raw(path),
        mean=network.mean,
        std=network.std,
        classes=network.classes,
    )
    return "jax, variables read back", Predictor(read_back), EXACT


def _stablehlo(source: _Source, path: pathlib.Path) -> tuple[str, Engine, Tolerance]:
    from bitmixer_jax.export.stablehlo import StablehloRunner, export_stablehlo

    export_stablehlo(source.integer_model, path)
    return "stablehlo", StablehloRunner(path), Tolerance()


# Each writes the export and returns the name of its engine, the engine, and a tolerance.
_WRITERS = {
    "packed": _packed,
    "onnx": _onnx,
    "pytorch": _pytorch,
    "safetensors": _safetensors,
    "stablehlo": _stablehlo,
}
