"""The model families, and `create_model`, which builds one by its name."""

from __future__ import annotations

import dataclasses
from typing import Any

from bitmixer_jax.deprecated import MODEL_SETTINGS, new_keys
from bitmixer_jax.errors import UserError
from bitmixer_jax.layer_table import KernelInfo, LayerInfo
from bitmixer_jax.layers import QuantConfig
from bitmixer_jax.models.mobilenet import MobileNetV2
from bitmixer_jax.models.network import Network
from bitmixer_jax.models.resnet import ResNet
from bitmixer_jax.policy import BitSpace, closest

__all__ = ["MODELS", "KernelInfo", "LayerInfo", "Network", "create_model"]

_DEFAULT = BitSpace()
_IMAGENET_RESNET = dict(
    image_shape=(224, 224, 3),
    width=64,
    stem_kernel=7,
    stem_strides=2,
    stem_pool=True,
    projection=True,
)
MODELS: dict[str, tuple[type[Network], dict[str, Any]]] = {
    "resnet8": (ResNet, dict(stage_sizes=(1, 1, 1))),
    "resnet20": (ResNet, dict(stage_sizes=(3, 3, 3))),
    "resnet32": (ResNet, dict(stage_sizes=(5, 5, 5))),
    "resnet56": (ResNet, dict(stage_sizes=(9, 9, 9))),
    "resnet18": (ResNet, dict(stage_sizes=(2, 2, 2, 2), **_IMAGENET_RESNET)),
    "resnet34": (ResNet, dict(stage_sizes=(3, 4, 6, 3), **_IMAGENET_RESNET)),
    "resnet50": (ResNet, dict(stage_sizes=(3, 4, 6, 3), bottleneck=True, **_IMAGENET_RESNET)),
    "mobilenetv2": (MobileNetV2, dict(image_shape=(224, 224, 3))),
}


def create_model(
    name: str, *, num_classes: int, space: BitSpace | None = _DEFAULT, **settings: Any
) -> Network:
    """Builds a switchable network.

    Args:
      name: one of ``MODELS``: "resnet8" (small, for CPUs), "resnet20", "resnet32", "resnet56"
        (CIFAR); "resnet18", "resnet34", "resnet50", "mobilenetv2" (ImageNet).
      num_classes: number of logits.
      space: widths that each layer may take; None builds the full-precision baseline.
      settings: attributes of the family (``image_shape``, ``width``, ``stem_strides``,
        ``first_last_layers``, ...) and of `QuantConfig` (``weight_quantizer``, ``norm``,
        ``compute_dtype``, ...).

    Returns:
      a Linen module; `Network` says how it is called.

    Raises:
      UserError: unknown name or setting.

    Examples:
      >>> import bitmixer_jax as bm
      >>> model = bm.create_model("resnet20", num_classes=10, weight_quantizer="double")
      >>> model.num_layers, model.names[0], model.space.choices
      (18, 'stage1.block1.conv1', (2, 3, 4))
    """
    if name not in MODELS:
        raise UserError(
            f"model {name!r}: unknown{closest(name, list(MODELS))} (one of {', '.join(MODELS)})",
            "unknown-name",
        )
    family, defaults = MODELS[name]
    settings = new_keys(settings, MODEL_SETTINGS)
    of_quant = {f.name for f in dataclasses.fields(QuantConfig)} - {"space"}
    of_family = {f.name for f in dataclasses.fields(family)} - {"parent", "name", "quant"}
    for setting in settings:
        if setting not in of_quant | of_family:
            known = sorted(of_quant | of_family)
            raise UserError(
                f"model {name!r}: unknown setting {setting!r}{closest(setting, known)}"
                f" (one of {', '.join(known)})",
                "unknown-name",
            )
    quant = QuantConfig(space=space, **{k: v for k, v in settings.items() if k in of_quant})
    if settings.get("first_last_layers", "float") not in ("float", "int8"):
        raise UserError(
            f"model {name!r}: first_last_layers = {settings['first_last_layers']!r}; "
            'choose "float" or "int8"'
        )
    own = {k: v for k, v in settings.items() if k in of_family}
    return family(**{**defaults, "num_classes": num_classes, "quant": quant, **own})
