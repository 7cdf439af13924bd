"""Weights of a float ResNet from elsewhere: state_dicts in the layout of torchvision.

conv1, bn1; layer1.0.conv1, layer1.0.bn1, ...; layer2.0.downsample.0, .1; fc
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from bitmixer_jax.errors import UserError
from bitmixer_jax.models import Network
from bitmixer_jax.models.resnet import ResNet

_NORM = {
    "params": {"scale": "weight", "bias": "bias"},
    "batch_stats": {"mean": "running_mean", "var": "running_var"},
}


def load_torchvision(path: str | pathlib.Path, model: Network) -> dict[str, Any]:
    """Variables of the float twin of ``model`` from a state_dict.

    Args:
      path: a ``.safetensors`` file, or one that ``torch.save`` wrote (which needs PyTorch; read
        with ``weights_only``, so it runs no code).
      model: a ResNet with projection shortcuts, such as "resnet18", "resnet34" or "resnet50".

    Returns:
      ``{"params": ..., "batch_stats": ...}``, float32 numpy arrays.

    Raises:
      UserError: no such file, not a state_dict, PyTorch is not installed, or the tensors are not
        those of this network.
    """
    if not isinstance(model, ResNet):
        raise UserError(f"{path}: only a ResNet starts from a torchvision state_dict")
    tensors = _read(pathlib.Path(path))
    variables: dict[str, Any] = {"params": {}, "batch_stats": {}}

    def take(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name not in tensors:
            raise UserError(
                f"{path}: holds no {name}; expected the layout of torchvision's ResNets, of this "
                "depth"
            )
        value = tensors.pop(name)
        if value.shape != shape:
            raise UserError(
                f"{path}: {name} is {list(value.shape)}, this network has {list(shape)}; use the "
                "same model, width and number of classes"
            )
        return np.asarray(value, np.float32)

    def kernel(
        layer: str, ours: str, conv: str, norm: str, shape: tuple[int, int, int, int]
    ) -> None:
        height, width, inputs, outputs = shape
        weights = take(f"{conv}.weight", (outputs, inputs, height, width))
        found = variables["params"].setdefault(layer, {})
        found[ours] = {"kernel": weights.transpose(2, 3, 1, 0)}
        for collection, names in _NORM.items():
            table = variables[collection].setdefault(layer, {}).setdefault(f"{ours}_norm", {})
            for own, theirs in names.items():
                table[own] = take(f"{norm}.{theirs}", (outputs,))[None, None]
        variables["batch_stats"][layer][f"{ours}_norm"]["count"] = np.ones((1, 1), np.int32)
        tensors.pop(f"{norm}.num_batches_tracked", None)

    kernel("stem", "conv", "conv1", "bn1", model.stem_conv.shape)
    for info in model.layers:
        stage, block, conv = info.name.split(".")  # stage2.block1.conv1
        prefix = f"layer{stage.removeprefix('stage')}.{int(block.removeprefix('block')) - 1}"
        norm = conv.replace("conv", "bn")
        kernel(info.name, "conv", f"{prefix}.{conv}", f"{prefix}.{norm}", info.kernels[0].shape)
        for shortcut in info.kernels[1:]:
            down = f"{prefix}.downsample"
            kernel(info.name, "shortcut", f"{down}.0", f"{down}.1", shortcut.shape)
    features = model.layers[-1].kernels[0].shape[-1]
    variables["params"]["head"] = {
        "kernel": take("fc.weight", (model.num_classes, features)).T,
        "bias": take("fc.bias", (model.num_classes,)),
    }
    if tensors:
        some = ", ".join(sorted(tensors)[:3])
        raise UserError(f"{path}: {len(tensors)} tensors have no place in this network: {some}")
    return variables


def _read(path: pathlib.Path) -> dict[str, np.ndarray]:
    """All tensors of a file by name."""
    try:
        if path.suffix == ".safetensors":
            return _safetensors(path)
        return _torch(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def _safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        return load(path.read_bytes())
    except SafetensorError as error:
        raise UserError(f"{path}: not a whole safetensors file ({error})") from None


def _torch(path: pathlib.Path) -> dict[str, np.ndarray]:
    try:
        import torch
    except ImportError:
        raise UserError(
            f"{path}: needs PyTorch: pip install 'bitmixer_jax[torch]'; or save it as .safetensors"
        ) from None
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch raises many kinds for a file that is not its own
        line = str(error).partition("\n")[0]
        raise UserError(f"{path}: not a state_dict that torch.load reads ({line})") from None
    for key in ("state_dict", "model"):  # what trainers wrap it in
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if not isinstance(found, Mapping) or not all(hasattr(v, "numpy") for v in found.values()):
        raise UserError(f"{path}: holds no state_dict")
    return {
        name.removeprefix("module."): tensor.detach().float().numpy()
        for name, tensor in found.items()
    }
