"""Configuration: the defaults as a ConfigDict, and its reading into checked dataclasses."""

from __future__ import annotations

import dataclasses
import math
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np
from ml_collections import ConfigDict

from bitmixer_jax import data as datasets
from bitmixer_jax.data import Dataset, StreamingDataset, StreamSettings
from bitmixer_jax.deprecated import MODEL_SETTINGS, new_keys, tell
from bitmixer_jax.errors import UserError
from bitmixer_jax.layers import QuantConfig
from bitmixer_jax.models import MODELS, Network, create_model
from bitmixer_jax.policy import BitSpace, closest
from bitmixer_jax.training.optimizer import OptimizerSettings
from bitmixer_jax.training.stages import Stage

_MOST_POLICIES = 1_000_000

# Settings that do not change what is computed: a run may be resumed with other values.
FREE = (
    "checkpoint_seconds",
    "keep_checkpoints",
    "log_every",
    "evaluate_every",
    "data_dir",
    "report_random",
    "workers",
    "stream.skip_unreadable",  # without it a run ends at the first such image
)


class _ModelConfig(ConfigDict):
    """Settings of a network, which may also be read and written by their old names."""

    def __getitem__(self, key: str) -> Any:
        return super().__getitem__(_new_name(key))

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(_new_name(key), value)

    def __setattr__(self, key: str, value: Any) -> None:
        super().__setattr__(_new_name(key), value)

    def __contains__(self, key: str) -> bool:
        return super().__contains__(MODEL_SETTINGS.get(key, key))


def _new_name(key: str) -> str:
    """Returns the name of a setting of the network, and tells those who write the old one."""
    if key not in MODEL_SETTINGS:
        return key
    tell(f"config.model.{key}", f"config.model.{MODEL_SETTINGS[key]}")
    return MODEL_SETTINGS[key]


def default_config() -> ConfigDict:
    """Bit-Mixer's three stages (our reading of the paper) for a small image set.

    Stage lengths are epochs; ``order`` says which stages run, and in which order.
    """
    stage = dict(
        policies="draw",
        draws=1,
        distill="none",
        distill_weight=0.5,
        temperature=2.0,
        learning_rate=0.1,
        schedule="cosine",
        warmup=0.0,
    )
    return ConfigDict(
        dict(
            seed=0,
            dataset="digits",
            data_dir="",  # where `bitmixer prepare` put the local copies; "": the default place
            train_split="train",
            test_split="test",
            stream=dict(  # of images that are streamed: data.StreamSettings
                size=224,
                resize=256,
                min_area=0.08,
                decoder="pil",
                skip_unreadable=False,
                orientation="auto",
            ),
            workers=-1,  # processes that decode streamed images; -1: one for each CPU core
            pad=0,  # random crops after padding by so many pixels
            flip=False,  # random mirroring
            batch_size=128,  # over all devices
            model=_ModelConfig(
                dict(
                    name="resnet8",
                    weight_quantizer="floor",
                    norm="transitional",
                    first_last_layers="float",
                    momentum=0.9,
                    compute_dtype="float32",
                )
            ),
            choices=(2, 3, 4),
            selection="layer",  # or "block": the layers of a block share one width
            optimizer=dict(
                name="sgd", momentum=0.9, nesterov=True, weight_decay=1e-4, clip_norm=0.0, ema=0.0
            ),
            label_smoothing=0.0,
            sync_bn=True,
            init_from="",  # WORKDIR or WORKDIR@STAGE to start from, or a torchvision state_dict
            teacher="",  # WORKDIR of a float twin, for distill = "teacher"
            order=("activations", "weights", "mixed"),
            stages=dict(
                activations=dict(epochs=5.0, quantize="activations", widths="network", **stage),
                weights=dict(
                    epochs=10.0, quantize="weights+activations", widths="network", **stage
                ),
                mixed=dict(
                    epochs=15.0,
                    quantize="weights+activations",
                    widths="layer",
                    rho_start=0.0,
                    rho_end=1.0,
                    ramp=0.5,
                    **stage,
                ),
            ),
            steps_per_dispatch=1,
            evaluate_every=5.0,  # epochs
            evaluate_random=5,  # random policies in evaluations while training
            evaluate_batch=500,  # images per device
            report_random=100,  # random policies in the report
            log_every=50,  # steps
            checkpoint_seconds=60.0,
            keep_checkpoints=2,
        )
    )


def baseline_config(config: ConfigDict, epochs: float, learning_rate: float = 0.1) -> ConfigDict:
    """The same configuration for the float twin: one stage, nothing quantised."""
    config = config.copy_and_resolve_references()
    stage = dict(config.stages[config.order[0]])
    stage |= dict(
        epochs=epochs,
        quantize="nothing",
        distill="none",
        policies="draw",
        draws=1,
        learning_rate=learning_rate,
    )
    config.stages = ConfigDict({"float": stage})
    config.order = ("float",)
    config.init_from = config.teacher = ""
    return config


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A checked configuration.

    Attributes are those of `default_config`, with ``stages`` in the order in which they run; and

      dataset_info: of a trained network, the data it was trained on ("classes", "image_shape",
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
        """Whether this trains a float twin."""
        return self.stages[0].quantize == "nothing"

    def load(self, split: str, data_dir: str | None = None) -> Dataset | StreamingDataset:
        """Opens a split of the data set, from ``data_dir`` if it is not where training found it.

        The data of a trained network are normalised with the statistics of its training.

        Raises:
          UserError: no such data; their classes or image shape are not those of the training; or
            ``data_dir`` is given for data that are not read from such a folder.
        """
        if data_dir and data_dir != self.data_dir and not datasets.reads_data_dir(self.dataset):
            raise UserError(f"--data_dir {data_dir}: {self.dataset} is not read from there")
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
                f"{where}: images are {data.image_shape}; the network was trained on {shape}"
            )
        mean, std = (np.asarray(self.dataset_info[key], np.float32) for key in ("mean", "std"))
        return dataclasses.replace(data, mean=mean, std=std)

    def network(self, data: Dataset | StreamingDataset) -> Network:
        """The network for a data set."""
        return self.build(data.num_classes, data.image_shape)

    def build(self, num_classes: int, image_shape: tuple[int, int, int]) -> Network:
        """The network for ``num_classes`` and images of ``image_shape`` (H, W, C)."""
        settings = dict(self.model)
        return create_model(
            settings.pop("name"),
            num_classes=num_classes,
            image_shape=tuple(image_shape),
            space=None if self.is_baseline else BitSpace(self.choices),
            **settings,
        )


def read(config: ConfigDict | Mapping[str, Any]) -> Run:
    """Checks a configuration and returns it as dataclasses.

    Raises:
      UserError: unknown or missing setting, wrong type, or values that do not go together.
    """
    values = to_json(config)
    if isinstance(values.get("model"), Mapping):
        values["model"] = new_keys(values["model"], MODEL_SETTINGS)
    defaults = to_json(default_config())
    _check_names(values, defaults, "config", skip=("stages", "model"))
    values = {**defaults, **values}
    _check_types("config", values, defaults)
    _check_types("config.optimizer", values["optimizer"], defaults["optimizer"])
    _check_types("config.stream", values["stream"], defaults["stream"])
    _check_model(values["model"])
    order = values.pop("order")
    if not order:
        raise UserError("config.order: no stages; name at least one of config.stages")
    stages = []
    fields = {f.name: f.default for f in dataclasses.fields(Stage)} | {"epochs": 1.0}
    del fields["name"]
    for name in order:
        _check_type("config.order: a stage", name, "mixed")
        where = f"config.stages.{name}"
        if name not in values["stages"]:
            raise UserError(
                f"config.order: no stage {name!r} in config.stages"
                f"{closest(name, list(values['stages']))}"
            )
        stage = values["stages"][name]
        if not isinstance(stage, Mapping):
            raise UserError(f"{where} = {stage!r}; give the settings of a stage")
        for field in stage:
            if field not in fields:
                raise UserError(
                    f"{where}: unknown setting {field!r}{closest(field, sorted(fields))}"
                )
        if "epochs" not in stage:
            raise UserError(f"{where}: epochs is missing; say how long the stage is")
        _check_types(where, stage, fields)
        stages.append(Stage(name=name, **stage))
    if len(set(order)) != len(order):
        raise UserError(f"config.order: {tuple(order)}; give each stage once")
    values["stages"] = tuple(stages)
    values["choices"] = tuple(values["choices"])
    values["optimizer"] = OptimizerSettings(**values["optimizer"])
    values["stream"] = StreamSettings(**values["stream"])
    values["model"] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in values["model"].items()
    }
    run = Run(**values)
    _check_run(run)
    return run


def _check_run(run: Run) -> None:
    float_stages = [stage.quantize == "nothing" for stage in run.stages]
    if any(float_stages) and not all(float_stages):
        raise UserError(
            'config.stages: quantize = "nothing" makes a float twin, which has other variables; '
            "train it in a workdir of its own, and start from that by config.init_from"
        )
    if not run.is_baseline:
        BitSpace(run.choices)
    teaches = any(stage.distill == "teacher" for stage in run.stages)
    if teaches and not run.teacher:
        raise UserError('config.teacher: distill = "teacher" needs the workdir of a float twin')
    for name, least in (
        ("batch_size", 1),
        ("steps_per_dispatch", 1),
        ("evaluate_batch", 1),
        ("log_every", 1),
        ("keep_checkpoints", 1),
        ("pad", 0),
        ("evaluate_random", 0),
        ("report_random", 0),
        ("label_smoothing", 0),
        ("evaluate_every", 0),
        ("checkpoint_seconds", 0),
        ("seed", 0),
        ("workers", -1),
    ):
        value = getattr(run, name)
        if value < least:
            raise UserError(f"config.{name} = {value}; give {least} or more")
        most = _MOST_POLICIES if name in ("evaluate_random", "report_random") else 2**31 - 1
        if value > most and name != "seed":
            raise UserError(f"config.{name} = {value}; give at most {most}")
    if run.seed >= 2**32:
        raise UserError(f"config.seed = {run.seed}; give less than 2^32")
    if run.label_smoothing >= 1:
        raise UserError(f"config.label_smoothing = {run.label_smoothing}; give 0 <= s < 1")
    # Unknown models and settings should not wait for the data.
    run.build(2, (32, 32, 3)).groups(run.selection)  # type: ignore[arg-type]


def to_json(config: ConfigDict | Mapping[str, Any]) -> dict[str, Any]:
    """A configuration as a tree of dicts, lists and plain values."""
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
    for name, value in values.items():
        if name not in known:
            raise UserError(
                f"{where}: unknown setting {name!r}{closest(name, list(known))}"
                f" (one of {', '.join(known)})"
            )
        if isinstance(value, Mapping) and isinstance(known[name], Mapping) and name not in skip:
            _check_names(value, known[name], f"{where}.{name}")


def _check_types(where: str, values: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    for name, value in values.items():
        if name in defaults:
            _check_type(f"{where}.{name}", value, defaults[name])


def _check_model(settings: Mapping[str, Any]) -> None:
    """Types of the network's settings; `create_model` checks their names."""
    name = settings.get("name")
    if not isinstance(name, str):
        raise UserError(f"config.model.name = {name!r}; choose from {', '.join(MODELS)}")
    for of_data in ("num_classes", "image_shape", "space"):
        if of_data in settings:
            raise UserError(f"config.model: unknown setting {of_data!r}; the data and choices say")
    plain = _model_defaults(name)
    _check_types("config.model", settings, plain)
    for setting, default in plain.items():
        value = settings.get(setting, default)
        if type(default) is int and value < 1:
            raise UserError(f"config.model.{setting} = {value}; give 1 or more")
        if type(default) is int and value > 2**20:
            raise UserError(f"config.model.{setting} = {value}; give at most {2**20}")
    if not 0 <= settings.get("momentum", 0) < 1:
        raise UserError(f"config.model.momentum = {settings['momentum']}; give 0 <= momentum < 1")
    if settings.get("first_last_layers", "float") not in ("float", "int8"):
        raise UserError(
            f"config.model.first_last_layers = {settings['first_last_layers']!r}; "
            "choose from float, int8"
        )


def _fields(family: Any) -> tuple[Any, ...]:
    return tuple(f for f in dataclasses.fields(family) if f.name not in ("parent", "name"))


def _check_type(where: str, value: Any, default: Any) -> None:
    number = (
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


def load_config(path: str | pathlib.Path, overrides: list[str]) -> ConfigDict:
    """Reads a configuration file and applies ``--config.a.b=value`` overrides.

    Args:
      path: a Python file with ``get_config()``; "file.py:variant" calls ``get_config("variant")``.

    Raises:
      UserError: no such file, it fails, or an override names no setting or has the wrong type.
    """
    from absl import flags
    from ml_collections import config_flags

    file = pathlib.Path(str(path).partition(":")[0])
    if not file.is_file():
        raise UserError(f"--config {path}: no such file")
    values = flags.FlagValues()
    completed = _with_unnamed(path, overrides) if overrides else None
    given_file = [f"--config={path}"] if completed is None else []
    words = ["bitmixer", *given_file, *overrides]
    given, sys.argv = sys.argv, words  # config_flags looks for the overrides there, and only there
    try:
        if completed is None:
            holder = config_flags.DEFINE_config_file("config", flag_values=values)
        else:
            holder = config_flags.DEFINE_config_dict("config", completed, flag_values=values)
        values(words)
        config = holder.value
    except flags.Error as error:
        raise UserError(f"--config {path}: {_first_line(error)}") from None
    except Exception as error:  # whatever the file does when it runs
        if overrides:
            _check_settings(path, overrides)
        kind = type(error).__name__
        raise UserError(f"--config {path}: {kind}: {_first_line(error)}") from None
    finally:
        sys.argv = given
    if not isinstance(config, ml_collections.ConfigDict):
        raise UserError(f"--config {path}: get_config() must return an ml_collections ConfigDict")
    return config


def _with_unnamed(path: str | pathlib.Path, overrides: Sequence[str]) -> ConfigDict | None:
    """Adds the defaults of overridden settings that the file leaves out.

    A file need not name every setting of a model or of a stage.

    Returns:
      the configuration; None if nothing was added.
    """
    config = load_config(path, [])
    changed = False
    for word in overrides:
        keys = word.removeprefix("--").partition("=")[0].split(".")[1:]
        node: Any = config
        for key in keys[:-1]:
            node = node[key] if isinstance(node, ConfigDict) and key in node else None
        if not isinstance(node, ConfigDict) or keys[-1] in node:
            continue
        if keys[:-1] == ["model"]:
            known = _model_defaults(config.model.get("name"))
        elif len(keys) == 3 and keys[0] == "stages":
            known = {f.name: f.default for f in dataclasses.fields(Stage) if f.name != "name"}
        else:
            continue
        if isinstance(known.get(keys[-1]), bool | int | float | str):
            with node.unlocked():
                node[keys[-1]] = known[keys[-1]]
            changed = True
    return config if changed else None


def _model_defaults(name: Any) -> dict[str, Any]:
    """The settings of a network that are plain values, and their defaults."""
    family = MODELS[name][0] if name in MODELS else Network
    known = {f.name: f.default for f in (*dataclasses.fields(QuantConfig), *_fields(family))}
    return {k: v for k, v in known.items() if isinstance(v, bool | int | float | str)}


def _check_settings(path: str | pathlib.Path, overrides: list[str]) -> None:
    """Raises UserError for the first of ``--config.a.b=value`` that names no setting."""
    config = load_config(path, [])
    for word in overrides:
        name = word.removeprefix("--").partition("=")[0]
        node: Any = config
        for key in name.split(".")[1:]:
            known = list(node) if isinstance(node, ConfigDict) else []
            if key not in known:
                listed = f"; there are {', '.join(known)}" if known else "; it has no parts"
                hint = closest(key, known) or listed
                raise UserError(f"--config {path}: {name}: no such setting{hint}")
            node = node[key]


def _first_line(error: BaseException) -> str:
    lines = str(error).strip('"').splitlines()
    return lines[0] if lines else "no details"
