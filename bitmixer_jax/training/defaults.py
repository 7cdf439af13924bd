"""The default configuration, and the one of a full-precision baseline.

A default is stated once: that of a stage, of the optimiser, of streams and of a network is the
default of its dataclass (`Stage`, `OptimizerSettings`, `StreamSettings`, `QuantConfig` and the
model families); those of the run are stated here.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from bitmixer_jax.data import StreamSettings
from bitmixer_jax.deprecated import MODEL_SETTINGS, tell
from bitmixer_jax.layers import QuantConfig
from bitmixer_jax.models import MODELS, Network
from bitmixer_jax.training.optimizer import OptimizerSettings
from bitmixer_jax.training.stages import Stage

# A stage must say how long it is, so ``epochs`` has no default.
STAGE_DEFAULTS: dict[str, Any] = {
    field.name: field.default
    for field in dataclasses.fields(Stage)
    if field.default is not dataclasses.MISSING
}

# Settings that do not change the trained network: a run may be resumed with other values.
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


def default_config() -> ConfigDict:
    """Returns Bit-Mixer's three stages for a small image set (our reading of the paper).

    Stage lengths are in epochs. ``order`` says which of ``stages`` run, and in which order.

    Returns:
      a mutable configuration: change what differs, then give it to `train`. The comments in the
      source explain the settings of the run; `Stage`, `OptimizerSettings`, `StreamSettings` and
      `create_model` explain the others.

        >>> config = default_config()
        >>> config.stages.mixed.epochs = 30.0
        >>> config.model.width = 32  # a setting of the model that is not listed
        >>> list(config.order), config.choices
        (['activations', 'weights', 'mixed'], (2, 3, 4))

    Reference: Bulat and Tzimiropoulos, Bit-Mixer, ICCV 2021, arXiv 2103.17267.
    """
    # Every setting given here is stored in config.json and compared when a run is resumed. So a
    # network-wide stage leaves out what only a layer-wise one uses, and the model what few change.
    network_wide = {
        name: value
        for name, value in STAGE_DEFAULTS.items()
        if name not in ("rho_start", "rho_end", "ramp")
    }
    model = model_defaults("resnet8")
    listed = ("weight_quantizer", "norm", "first_last_layers", "momentum", "compute_dtype")
    return ConfigDict(
        dict(
            seed=0,
            dataset="digits",
            data_dir="",  # where `bitmixer prepare` put the local copies; "": the default place
            train_split="train",
            test_split="test",
            stream=dataclasses.asdict(StreamSettings()),  # for images that are streamed
            workers=-1,  # processes that decode streamed images; -1: one for each CPU core
            pad=0,  # random crops after padding by so many pixels
            flip=False,  # random mirroring
            batch_size=128,  # over all devices
            model=_ModelConfig(dict(name="resnet8", **{name: model[name] for name in listed})),
            choices=(2, 3, 4),  # widths in bits
            selection="layer",  # or "block": the layers of a block share one width
            optimizer=dataclasses.asdict(OptimizerSettings()),
            label_smoothing=0.0,
            sync_bn=True,  # average BN statistics over devices in the forward pass
            init_from="",  # WORKDIR or WORKDIR@STAGE to start from, or a torchvision state_dict
            teacher="",  # WORKDIR of a full-precision baseline, for distill = "teacher"
            order=("activations", "weights", "mixed"),
            stages=dict(
                activations={"epochs": 5.0, **network_wide, "quantize": "activations"},
                weights={"epochs": 10.0, **network_wide},
                mixed={"epochs": 15.0, **STAGE_DEFAULTS, "widths": "layer"},
            ),
            steps_per_dispatch=1,  # more saves time on accelerators; slow on CPU
            evaluate_every=5.0,  # epochs; 0: only at the ends of stages
            evaluate_random=5,  # random policies in evaluations while training
            evaluate_batch=500,  # images per device
            report_random=100,  # random policies in the report
            log_every=50,  # steps
            checkpoint_seconds=60.0,
            keep_checkpoints=2,  # the newest; those of stage ends are always kept
        )
    )


def baseline_config(config: ConfigDict, epochs: float, learning_rate: float = 0.1) -> ConfigDict:
    """Returns the configuration of a full-precision baseline of the same network.

    The baseline trains in one stage, named "float", and quantises nothing. It can start a
    quantised run (``init_from``), teach it (``teacher``), and be compared with it.

    Args:
      config: of the quantised run; it is not changed.
      epochs: length of the stage.
      learning_rate: peak.

    Returns:
      a copy of ``config`` with this stage alone.

        >>> baseline = baseline_config(default_config(), epochs=20.0)
        >>> list(baseline.stages), baseline.stages.float.quantize
        (['float'], 'nothing')
    """
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


def model_defaults(name: Any) -> dict[str, Any]:
    """Returns the settings of a network that are numbers, flags or text, and their defaults."""
    family = MODELS[name][0] if name in MODELS else Network
    fields = (*dataclasses.fields(QuantConfig), *dataclasses.fields(family))
    of_flax = ("parent", "name")
    return {
        field.name: field.default
        for field in fields
        if field.name not in of_flax and isinstance(field.default, bool | int | float | str)
    }


class _ModelConfig(ConfigDict):
    """Settings of a network, which configuration files may also read and write by old names."""

    def __getitem__(self, key: str) -> Any:
        return super().__getitem__(_new_name(key))

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(_new_name(key), value)

    def __setattr__(self, key: str, value: Any) -> None:
        super().__setattr__(_new_name(key), value)

    def __contains__(self, key: str) -> bool:
        return super().__contains__(MODEL_SETTINGS.get(key, key))


def _new_name(key: str) -> str:
    """Returns the present name of a setting of the network, and warns of an old one."""
    if key not in MODEL_SETTINGS:
        return key
    tell(f"config.model.{key}", f"config.model.{MODEL_SETTINGS[key]}")
    return MODEL_SETTINGS[key]
