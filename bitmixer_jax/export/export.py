"""Exports a trained network to a file or folder, and verifies what was written.

An export is written beside its place, loaded again in its own engine, compared with the network on
real images, and only then moved to its place. The report lies beside it, as OUT.report.json.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import numpy as np

from bitmixer_jax.errors import UserError, reason
from bitmixer_jax.evaluation import random_policies
from bitmixer_jax.export.integer_engine import from_integer_model
from bitmixer_jax.export.integer_model import IntegerModel, to_integer_model
from bitmixer_jax.export.packed import load_packed, save_packed
from bitmixer_jax.export.verify import EXACT, Engine, Tolerance, require, verify
from bitmixer_jax.files import cannot_write, check_free, hold, user_path, write_whole
from bitmixer_jax.loaded_model import Predictor, from_trained, from_variables
from bitmixer_jax.policy import as_policy, closest
from bitmixer_jax.trained import Trained, load

_PYTORCH_FILES = {"model.py", "weights.safetensors", "__pycache__"}
FORMATS = ("packed", "onnx", "pytorch", "safetensors", "stablehlo")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """What to export, and how to verify it.

    Attributes:
      format: one of FORMATS.
      policy: for onnx: this policy alone, as `policy.as_policy` reads it. None: all policies.
      changes: widths of some layers of that policy, by name: see `policy.with_widths`.
      storage_dtype: of the weights of one policy in ONNX: "int8", "int4" or "int2".
      fast: one policy in ONNX in 8 bits throughout, which answers differently (`onnx_int8`).
      norm_dtype: of the norms in a packed file: "float32" or "float16".
      images: test images to compare on (no labels are used).
      random: random policies to compare, beside the uniform ones.
      seed: of these.
      data_dir: where the data are, if not where training found them.

    Raises:
      UserError: a value is not allowed, or two do not go together.
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
        for name, given, only in (
            ("policy", self.policy is not None, "onnx"),
            ("storage_dtype", self.storage_dtype != "int8", "onnx"),
            ("norm_dtype", self.norm_dtype != "float32", "packed"),
        ):
            if given and self.format != only:
                value = getattr(self, name)
                raise UserError(f"{name} {value}: of format {only} alone", "conflict")
        for name, given in (("storage_dtype", self.storage_dtype != "int8"), ("fast", self.fast)):
            if given and self.policy is None:
                raise UserError(
                    f"{name}: of one policy alone in ONNX; give a policy", "missing-value"
                )
        if self.fast and self.storage_dtype != "int8":
            raise UserError(
                f"fast with storage_dtype {self.storage_dtype}: only int8 is fast; "
                "give one of them",
                "conflict",
            )
        if self.changes and self.policy is None:
            raise UserError("changes of widths: of a policy; give one, such as 4", "missing-value")
        for name, number in (("images", self.images), ("random", self.random)):
            if number < 1:
                raise UserError(f"{name} {number}: give 1 or more")


def integer_model_of(trained: Trained) -> IntegerModel:
    """A trained network as integers, with what files say of its data: see `to_integer_model`."""
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
    """The network to export, and its answers.

    Attributes:
      trained, settings: as given.
      policy: int32 ``[L]`` the one to export, or None.
      images: uint8 ``[N, H, W, C]`` of the test split, for comparison.
      reference: gives the logits of the network.
      integer_model: the network as exports take it.
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
        """Some hundred training images, to see which values occur between layers."""
        data = self.trained.load_split(self.trained.run.train_split, self.settings.data_dir)
        order = np.random.default_rng(self.settings.seed).permutation(len(data))
        return data.subset(np.sort(order[:500])).images

    def policies(self) -> list[np.ndarray]:
        """Those to compare: uniform and random ones whose pairs training visited."""
        if self.policy is not None:
            return [self.policy]
        model, settings = self.trained.model, self.settings
        policies = [model.space.uniform(w, model.num_layers) for w in model.space.choices]
        policies += list(random_policies(model, settings.random, settings.seed))
        known = [p for p in policies if not self.reference.loaded.uncalibrated(p)]
        if not known:
            raise UserError(
                "export: training visited all pairs of no policy; train for longer", "uncalibrated"
            )
        return known


def export_network(
    source: Trained | str | pathlib.Path,
    out: str | pathlib.Path,
    *,
    overwrite: bool = False,
    **settings: Any,
) -> dict[str, Any]:
    """Exports a trained network to a file (a folder for pytorch), and verifies it.

        report = bm.export_network("runs/digits", "net.onnx", format="onnx")
        report["top1_agreement"], report["bytes"]

    A hidden lock file beside ``out`` keeps a second process from the same place. A killed export
    leaves a hidden folder, which the next one removes.

    Args:
      source: WORKDIR, WORKDIR@STAGE, or what `trained.load` returned.
      out: the file or folder to write.
      overwrite: replace an export that exists.
      settings: the attributes of `ExportSettings`, ``format`` first of all.

    Returns:
      the report of `verify.verify`, with "weights_digest", "format" and "bytes".

    Raises:
      UserError: no trained network there, ``out`` exists or is being written, an engine is not
        installed, there is no room, or the export does not agree with the network (then nothing is
        written).
    """
    chosen = ExportSettings(**settings)
    out = user_path(out)
    if not out.name:
        raise UserError(f"{out}: names no file", "bad-path")
    _check_names(out)
    check_free(out, overwrite, folder=chosen.format == "pytorch")
    _check_folder(out)
    if out.is_symlink():
        raise UserError(f"{out}: a link; name a file, or a folder, itself", "bad-path")
    if out.exists() and not (out.is_file() or out.is_dir()):
        raise UserError(f"{out}: a device or a pipe; name a file", "bad-path")
    with hold(out.with_name(f".{out.name}.lock"), str(out)):
        return _export(source, out, chosen, overwrite)


def _check_names(out: pathlib.Path) -> None:
    """Raises UserError where the names beside ``out`` are too long."""
    for path in (out, _partial(out), _report(out)):
        try:
            os.lstat(path)
        except FileNotFoundError:
            pass
        except (OSError, ValueError) as error:
            raise UserError(
                f"{out}: cannot write there ({reason(error)}); name another", "not-writable"
            ) from None


def _partial(out: pathlib.Path) -> pathlib.Path:
    """The folder where an export is made before it takes its place."""
    return out.with_name(f".{out.name}.partial")


def _report(out: pathlib.Path) -> pathlib.Path:
    """The report beside an export."""
    return out.with_name(f"{out.name}.report.json")


def _export(
    source: Trained | str | pathlib.Path,
    out: pathlib.Path,
    settings: ExportSettings,
    overwrite: bool,
) -> dict[str, Any]:
    """`export_network`, where no other process writes to ``out``."""
    check_free(out, overwrite, folder=settings.format == "pytorch")  # it may have come since
    partial = _partial(out)
    try:
        _remove(partial)  # of an export that was killed
    except OSError as error:
        raise cannot_write(out, error) from None
    network = _Source(load(source), settings)
    try:
        partial.mkdir()
        made = partial / out.name
        engine_name, engine, tolerance = _WRITERS[settings.format](network, made)
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
            "bytes": _size(made),
        }
        require(report)
        prepared = partial / _report(out).name
        # A full disk shows before anything is replaced.
        write_whole(prepared, json.dumps(report, indent=1) + "\n")
        _put(made, out)
        _put(prepared, _report(out))
    except OSError as error:
        raise cannot_write(out, error) from None
    except UserError as error:  # name the place that the user gave
        raise UserError(str(error).replace(str(partial / out.name), str(out))) from None
    finally:
        with contextlib.suppress(OSError):
            _remove(partial)
    return report


def _put(made: pathlib.Path, out: pathlib.Path) -> None:
    """Moves an export to its place. A file replaces a file atomically; a folder does not."""
    _check_folder(out)  # since the export began
    if made.is_dir() or out.is_dir():
        _remove(out)
    made.replace(out)


def _check_folder(out: pathlib.Path) -> None:
    """Raises UserError where a folder holds other files than those of an export."""
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
        # Rounded norms move values to other codes, and those move others: on ResNet-20, CIFAR-10,
        # 96% of images keep their class (92 to 99 by policy) at the same accuracy.
        return "packed", engine, Tolerance(share=1.0, agreement=0.9)
    # Integer sums are exact. The float multiply-adds around them are compiled twice, in two
    # programs, and one rounding may differ: seen in 1 of 53,000 (one value, one code, 0.02).
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
        """The default level's answer, or none where the basic level gives other classes."""
        given = policy if runners[0].switchable else None
        basic, default = (runner(images, given) for runner in runners)
        if (basic.argmax(-1) != default.argmax(-1)).mean() > 0.01:
            return np.full_like(default, np.nan)
        return default

    engine_name = "onnxruntime, basic and default optimisation"
    if settings.fast:
        # Residual branches in 8 bits: on ResNet-20, CIFAR-10, 88% (2 bits) to 97% (4 bits) of
        # images keep their class. This guards against mistakes, not against that.
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
    again = from_variables(
        source.trained.model,
        load_raw(path),
        mean=network.mean,
        std=network.std,
        classes=network.classes,
    )
    return "jax, variables read back", Predictor(again), EXACT


def _stablehlo(source: _Source, path: pathlib.Path) -> tuple[str, Engine, Tolerance]:
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
