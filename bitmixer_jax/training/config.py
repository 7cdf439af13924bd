"""Checked configurations: a `Run` holds the settings of a run, of the right types and ranges."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from bitmixer_jax import data as datasets
from bitmixer_jax.data import Dataset, StreamingDataset, StreamSettings
from bitmixer_jax.deprecated import MODEL_SETTINGS, new_keys
from bitmixer_jax.errors import UserError
from bitmixer_jax.models import MODELS, Network, create_model
from bitmixer_jax.policy import BitSpace, closest
from bitmixer_jax.training.defaults import STAGE_DEFAULTS, default_config, model_defaults
from bitmixer_jax.training.optimizer import OptimizerSettings
from bitmixer_jax.training.stages import Stage

_MOST = 2**31 - 1
_MOST_POLICIES = 1_000_000
# Lowest and highest value of a setting. Counts must fit into int32, as steps on devices do.
_RANGES = {
    **dict.fromkeys(("batch_size", "steps_per_dispatch", "evaluate_batch"), (1, _MOST)),
    **dict.fromkeys(("log_every", "keep_checkpoints"), (1, _MOST)),
    **dict.fromkeys(("pad", "label_smoothing", "evaluate_every"), (0, _MOST)),
    **dict.fromkeys(("evaluate_random", "report_random"), (0, _MOST_POLICIES)),
    "checkpoint_seconds": (0, _MOST),
    "seed": (0, None),
    "workers": (-1, _MOST),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A checked configuration: `read` makes it.

    The attributes are the settings of `default_config`, and these:

    Attributes:
      stages: in the order in which they run.
      dataset_info: the data that a trained network was trained on ("classes", "image_shape",
        "mean", "std"); None before training.
    """

    seed: int
    dataset: str
    data_dir: str
    train_split: str
    test_split: str
    stream: StreamSettings
    workers: int
    pad: int
    flip: bool
    batch_size: int
    model: Mapping[str, Any]
    choices: tuple[int, ...]
    selection: str
    optimizer: OptimizerSettings
    label_smoothing: float
    sync_bn: bool
    init_from: str
    teacher: str
    stages: tuple[Stage, ...]
    steps_per_dispatch: int
    evaluate_every: float
    evaluate_random: int
    evaluate_batch: int
    report_random: int
    log_every: int
    checkpoint_seconds: float
    keep_checkpoints: int
    dataset_info: Mapping[str, Any] | None = None

    @property
    def is_baseline(self) -> bool:
        """True if this trains a full-precision baseline, whose layers have no widths."""
        return self.stages[0].quantize == "nothing"

    @property
    def has_teacher(self) -> bool:
        """True if a stage distils from the network in ``teacher``."""
        return any(stage.distill == "teacher" for stage in self.stages)

    def load(self, split: str, data_dir: str | None = None) -> Dataset | StreamingDataset:
        """Opens a split of the data set.

        The data of a trained network are normalised with the statistics of its training set.

        Args:
          split: such as "train", "test", "train[:1000]".
          data_dir: where the data lie, if not where training found them.

        Raises:
          UserError: no such data; their classes or image shape are not those of the training; or
            ``data_dir`` is given for data that are not read from such a folder.
        """
        if data_dir and data_dir != self.data_dir and not datasets.reads_data_dir(self.dataset):
            raise UserError(
                f"--data_dir {data_dir}: {self.dataset} is not read from there", "conflict"
            )
        data = datasets.open_split(
            self.dataset,
            split,
            data_dir or self.data_dir or None,
            stream=self.stream,
            workers=self.workers,
        )
        if self.dataset_info is None:
            return data
        where = f"data set {self.dataset}"
        datasets.require_classes(data.classes, self.dataset_info["classes"], where)
        shape = tuple(self.dataset_info["image_shape"])
        if data.image_shape != shape:
            raise UserError(
                f"{where}: images are {data.image_shape}; the network was trained on {shape}",
                "other-data",
            )
        mean, std = (np.asarray(self.dataset_info[key], np.float32) for key in ("mean", "std"))
        return dataclasses.replace(data, mean=mean, std=std)

    def network(self, data: Dataset | StreamingDataset) -> Network:
        """Returns the network for a data set, without variables."""
        return self.build(data.num_classes, data.image_shape)

    def build(self, num_classes: int, image_shape: tuple[int, int, int]) -> Network:
        """Returns the network for ``num_classes`` and images of ``image_shape`` (H, W, C)."""
        settings = dict(self.model)
        return create_model(
            settings.pop("name"),
            num_classes=num_classes,
            image_shape=tuple(image_shape),
            space=None if self.is_baseline else BitSpace(self.choices),
            **settings,
        )


def read(config: ConfigDict | Mapping[str, Any]) -> Run:
    """Checks a configuration and returns it as a `Run`.

    Args:
      config: as `default_config` makes it, or the JSON tree of a ``config.json``. Settings of the
        run that it lacks get their defaults.

    Raises:
      UserError: unknown or missing setting, wrong type, or values that do not go together.

        >>> run = read(default_config())
        >>> run.batch_size, [stage.name for stage in run.stages]
        (128, ['activations', 'weights', 'mixed'])
    """
    values = to_json(config)
    if isinstance(values.get("model"), Mapping):
        values["model"] = new_keys(values["model"], MODEL_SETTINGS)
    defaults = to_json(default_config())
    # The names of stages are free, and the model may have settings that are not listed.
    _check_names(values, defaults, "config", skip=("stages", "model"))
    # A config.json of an earlier version lacks settings that came later: they have their defaults.
    values = {**defaults, **values}
    _check_types("config", values, defaults)
    _check_types("config.optimizer", values["optimizer"], defaults["optimizer"])
    _check_types("config.stream", values["stream"], defaults["stream"])
    _check_model(values["model"])
    values["stages"] = _read_stages(values.pop("order"), values["stages"])
    values["choices"] = tuple(values["choices"])
    values["optimizer"] = OptimizerSettings(**values["optimizer"])
    values["stream"] = StreamSettings(**values["stream"])
    # JSON has no tuples, and a Flax module must be hashable.
    values["model"] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in values["model"].items()
    }
    run = Run(**values)
    _check_run(run)
    return run


def _read_stages(order: Sequence[Any], settings: Mapping[str, Any]) -> tuple[Stage, ...]:
    """Returns the stages that ``order`` names, from the settings of each. Raises UserError."""
    if not order:
        raise UserError(
            "config.order: no stages; name at least one of config.stages", "missing-value"
        )
    defaults = STAGE_DEFAULTS | {"epochs": 1.0}  # for its type; every stage must give its own
    stages = []
    for name in order:
        _check_type("config.order: a stage", name, "mixed")  # "mixed" stands for any text
        where = f"config.stages.{name}"
        if name not in settings:
            raise UserError(
                f"config.order: no stage {name!r} in config.stages{closest(name, list(settings))}",
                "unknown-name",
            )
        stage = settings[name]
        if not isinstance(stage, Mapping):
            raise UserError(f"{where} = {stage!r}; give the settings of a stage")
        for field in stage:
            if field not in defaults:
                hint = closest(field, sorted(defaults))
                raise UserError(f"{where}: unknown setting {field!r}{hint}", "unknown-name")
        if "epochs" not in stage:
            raise UserError(
                f"{where}: epochs is missing; say how long the stage is", "missing-value"
            )
        _check_types(where, stage, defaults)
        stages.append(Stage(name=name, **stage))
    if len(set(order)) != len(order):
        raise UserError(f"config.order: {tuple(order)}; give each stage once")
    return tuple(stages)


def _check_run(run: Run) -> None:
    """Checks ranges, and settings that must go together. Raises UserError."""
    baseline_stages = [stage.quantize == "nothing" for stage in run.stages]
    if any(baseline_stages) and not all(baseline_stages):
        raise UserError(
            'config.stages: quantize = "nothing" makes a full-precision baseline, which has other '
            "variables; train it in a workdir of its own, and start from that by config.init_from",
            "conflict",
        )
    if not run.is_baseline:
        BitSpace(run.choices)
    if run.has_teacher and not run.teacher:
        raise UserError(
            'config.teacher: distill = "teacher" needs the workdir of a full-precision baseline',
            "missing-value",
        )
    for name, (least, most) in _RANGES.items():
        value = getattr(run, name)
        if value < least:
            raise UserError(f"config.{name} = {value}; give {least} or more")
        if most is not None and value > most:
            raise UserError(f"config.{name} = {value}; give at most {most}")
    if run.seed >= 2**32:  # JAX keeps 32 bits of a seed
        raise UserError(f"config.seed = {run.seed}; give less than 2^32")
    if run.label_smoothing >= 1:
        raise UserError(f"config.label_smoothing = {run.label_smoothing}; give 0 <= s < 1")
    # An unknown model or setting should fail now, before the data are read.
    run.build(2, (32, 32, 3)).groups(run.selection)  # type: ignore[arg-type]


def to_json(config: ConfigDict | Mapping[str, Any]) -> dict[str, Any]:
    """Returns a configuration as a JSON tree: dicts, lists and plain values."""
    if isinstance(config, ConfigDict):
        config = config.to_dict()

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(k): plain(v) for k, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, tuple | list) else value

    return plain(config)


def _check_names(
    values: Mapping[str, Any], known: Mapping[str, Any], where: str, skip: tuple[str, ...] = ()
) -> None:
    """Raises UserError for the first setting that is not known, also within those not skipped."""
    for name, value in values.items():
        if name not in known:
            raise UserError(
                f"{where}: unknown setting {name!r}{closest(name, list(known))}"
                f" (one of {', '.join(known)})",
                "unknown-name",
            )
        if isinstance(value, Mapping) and isinstance(known[name], Mapping) and name not in skip:
            _check_names(value, known[name], f"{where}.{name}")


def _check_types(where: str, values: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Raises UserError for the first value that is not of the type of its default."""
    for name, value in values.items():
        if name in defaults:
            _check_type(f"{where}.{name}", value, defaults[name])


def _check_model(settings: Mapping[str, Any]) -> None:
    """Checks types and numbers of the network's settings; `create_model` checks the others."""
    name = settings.get("name")
    if not isinstance(name, str):
        raise UserError(f"config.model.name = {name!r}; choose from {', '.join(MODELS)}")
    # These settings of `create_model` follow from others, so nobody may give them here.
    for of_data in ("num_classes", "image_shape", "space"):
        if of_data in settings:
            raise UserError(
                f"config.model: unknown setting {of_data!r}; the data and choices say",
                "unknown-name",
            )
    plain = model_defaults(name)
    _check_types("config.model", settings, plain)
    for setting, default in plain.items():
        value = settings.get(setting, default)
        if type(default) is int and value < 1:
            raise UserError(f"config.model.{setting} = {value}; give 1 or more")
        if type(default) is int and value > 2**20:
            raise UserError(f"config.model.{setting} = {value}; give at most {2**20}")
    if not 0 <= settings.get("momentum", 0) < 1:
        raise UserError(f"config.model.momentum = {settings['momentum']}; give 0 <= momentum < 1")


def _check_type(where: str, value: Any, default: Any) -> None:
    number = (  # a whole number may stand where the default is a float
        isinstance(default, float)
        and isinstance(value, int | float)
        and not isinstance(value, bool)
    )
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{where} = {value}; give a finite number")
    if not number and type(value) is not type(default):
        raise UserError(
            f"{where} = {value!r}; give a {type(default).__name__}, such as {default!r}"
        )
