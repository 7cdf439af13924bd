"""Full-precision ResNets from PyTorch: state_dicts with the names of torchvision.

The names are conv1, bn1; layer1.0.conv1, layer1.0.bn1, ...; layer2.0.downsample.0, .1; fc.
"""

from __future__ import annotations

import pathlib
import warnings
from collections.abc import Mapping
from typing import Any, BinaryIO

import numpy as np

from bitmixer_jax.errors import UserError, reason
from bitmixer_jax.files import open_file, user_path
from bitmixer_jax.models import Network
from bitmixer_jax.models.resnet import ResNet
from bitmixer_jax.zip_files import refuse_bombs

_NORM = {
    "params": {"scale": "weight", "bias": "bias"},
    "batch_stats": {"mean": "running_mean", "var": "running_var"},
}
_REAL = ("float16", "bfloat16", "float32", "float64")
_SAFETENSORS = {
    **{"F16": "<f2", "F32": "<f4", "F64": "<f8", "BOOL": "?", "U8": "u1", "I8": "i1"},
    **{"U16": "<u2", "I16": "<i2", "U32": "<u4", "I32": "<i4", "U64": "<u8", "I64": "<i8"},
}


def load_torchvision(path: str | pathlib.Path, model: Network) -> dict[str, Any]:
    """Reads a state_dict as variables of the full-precision baseline of ``model``.

        model = bm.create_model("resnet18", num_classes=1000)
        variables = load_torchvision("resnet18.safetensors", model)
        logits = model.baseline().apply(variables, images, train=False)

    Kernels ``[out, in, H, W]`` become ``[H, W, in, out]``; BN vectors ``[C]`` become ``[1, 1, C]``.

    Args:
      path: a ``.safetensors`` file, or one that ``torch.save`` wrote (which needs PyTorch; read
        with ``weights_only``, so it runs no code). Tensors may be of 16, 32 or 64 bits. Their names
        may begin with ``module.``, ``_orig_mod.``, ``model.`` or ``state_dict.``. A trainer's
        dictionary may hold them under "state_dict" or "model".
      model: a ResNet with projection shortcuts, such as "resnet18", "resnet34" or "resnet50".

    Returns:
      ``{"params": ..., "batch_stats": ...}``, float32 numpy arrays.

    Raises:
      UserError: no such file, not a state_dict, PyTorch is not installed, or the tensors are not
        those of this network, or not real and finite.
    """
    if not isinstance(model, ResNet):
        raise UserError(f"{path}: only a ResNet starts from a torchvision state_dict", "conflict")
    path = user_path(path)
    tensors = _read(path)
    variables: dict[str, Any] = {"params": {}, "batch_stats": {}}

    def pop(name: str, shape: tuple[int, ...]) -> np.ndarray:
        """Removes a tensor from those that are not used yet, and checks it."""
        if name not in tensors:
            raise UserError(
                f"{path}: holds no {name}; expected the layout of torchvision's ResNets, of this "
                "depth",
                "other-network",
            )
        value = tensors.pop(name)
        if tuple(value.shape) != shape:  # before it is converted: a stride of 0 costs nothing
            raise UserError(
                f"{path}: {name} is {list(value.shape)}, this network has {list(shape)}; use the "
                "same model, width and number of classes",
                "other-network",
            )
        return _float32(path, name, value)

    def convert(
        layer: str, ours: str, conv: str, norm: str, shape: tuple[int, int, int, int]
    ) -> None:
        """Converts a convolution and its batch norm to the kernel ``ours`` of a layer."""
        height, width, inputs, outputs = shape
        weights = pop(f"{conv}.weight", (outputs, inputs, height, width))
        found = variables["params"].setdefault(layer, {})
        found[ours] = {"kernel": weights.transpose(2, 3, 1, 0)}
        for collection, names in _NORM.items():
            table = variables[collection].setdefault(layer, {}).setdefault(f"{ours}_norm", {})
            for name, torch_name in names.items():
                table[name] = pop(f"{norm}.{torch_name}", (outputs,))[None, None]
        # Its statistics are known, so the one pair counts as visited.
        variables["batch_stats"][layer][f"{ours}_norm"]["count"] = np.ones((1, 1), np.int32)
        tensors.pop(f"{norm}.num_batches_tracked", None)

    convert("stem", "conv", "conv1", "bn1", model.stem_conv.shape)
    for info in model.layers:
        stage, block, conv = info.name.split(".")  # stage2.block1.conv1
        # A projection shortcut shares its input, and so its layer, with the first convolution.
        prefix = f"layer{stage.removeprefix('stage')}.{int(block.removeprefix('block')) - 1}"
        norm = conv.replace("conv", "bn")
        convert(info.name, "conv", f"{prefix}.{conv}", f"{prefix}.{norm}", info.kernels[0].shape)
        for shortcut in info.kernels[1:]:
            down = f"{prefix}.downsample"
            convert(info.name, "shortcut", f"{down}.0", f"{down}.1", shortcut.shape)
    features = model.layers[-1].kernels[0].shape[-1]
    variables["params"]["head"] = {
        "kernel": pop("fc.weight", (model.num_classes, features)).T,
        "bias": pop("fc.bias", (model.num_classes,)),
    }
    # What is left belongs to another network, such as a deeper one whose first layers fit.
    if tensors:
        some = ", ".join(sorted(tensors)[:3])
        raise UserError(
            f"{path}: {len(tensors)} tensors have no place in this network: {some}", "other-network"
        )
    return variables


def _read(path: pathlib.Path) -> dict[str, Any]:
    """Returns all tensors of a file by name: numpy arrays, or torch tensors for `_float32`."""
    try:
        with open_file(path) as file:
            read = _safetensors if path.suffix == ".safetensors" else _torch
            found = read(path, file)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({reason(error)})", "not-readable") from None
    # One weight under two names would be read from whichever comes last.
    tensors: dict[str, Any] = {}
    for name, tensor in found.items():
        bare = _without_prefix(name)
        if bare in tensors:
            raise UserError(
                f"{path}: holds {bare} twice, under a prefix and without it", "other-network"
            )
        tensors[bare] = tensor
    return tensors


def _without_prefix(name: str) -> str:
    """Removes what wrappers of a module put before the name of a tensor, in any order."""
    prefixes = ("module.", "_orig_mod.", "model.", "state_dict.")
    while name.startswith(prefixes):
        name = name.partition(".")[2]
    return name


def _float32(path: pathlib.Path, name: str, value: Any) -> np.ndarray:
    """Converts a tensor of real numbers to float32. Raises UserError for other tensors."""
    if not isinstance(value, np.ndarray):
        kind = str(value.dtype).removeprefix("torch.")
        if kind not in _REAL or str(value.layout) != "torch.strided" or value.is_meta:
            raise UserError(
                f"{path}: {name} is of type {kind}, {value.layout}; give a dense tensor of "
                f"{', '.join(_REAL)}",
                "wrong-format",
            )
        value = value.detach().float().numpy()
    if value.dtype.kind != "f":
        raise UserError(
            f"{path}: {name} is of type {value.dtype}; give {', '.join(_REAL)}", "wrong-format"
        )
    with np.errstate(over="ignore"):
        found = np.asarray(value, np.float32)
    if not np.isfinite(found).all():
        raise UserError(f"{path}: {name} holds values that are not finite in float32", "not-finite")
    return found


def _safetensors(path: pathlib.Path, file: BinaryIO) -> dict[str, Any]:
    from safetensors import SafetensorError, deserialize

    try:
        entries = deserialize(file.read())
        return {name: _array(entry) for name, entry in entries}
    except (SafetensorError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{path}: not a whole safetensors file ({reason(error)})", "wrong-format"
        ) from None


def _array(entry: Mapping[str, Any]) -> np.ndarray:
    """Returns a tensor of a safetensors file. Raises ValueError for types that are not read."""
    data, shape = entry["data"], entry["shape"]
    if entry["dtype"] == "BF16":  # the upper half of a float32
        wide = np.frombuffer(data, "<u2").astype(np.uint32) << 16
        return wide.view(np.float32).reshape(shape)
    kind = _SAFETENSORS.get(entry["dtype"])
    if kind is None:
        raise ValueError(f"tensors of type {entry['dtype']} are not read")
    return np.frombuffer(data, kind).reshape(shape)


def _torch(path: pathlib.Path, file: BinaryIO) -> dict[str, Any]:
    try:
        import torch
    except ImportError:
        raise UserError(
            f"{path}: needs PyTorch: pip install 'bitmixer_jax[torch]'; or save it as .safetensors",
            "not-installed",
        ) from None
    refuse_bombs(path, file)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of what it finds in a damaged file
            found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a file that is not its own
        why = reason(error)
        if "Weights only" in why:  # torch goes on with advice to let the file run code
            why = "not of torch.save, or it holds more than tensors"
        raise UserError(
            f"{path}: not a state_dict that torch.load reads ({why})", "wrong-format"
        ) from None
    for key in ("state_dict", "model"):  # names under which trainers save it
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if not isinstance(found, Mapping) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in found.items()
    ):
        raise UserError(f"{path}: holds no state_dict", "wrong-format")
    return dict(found)
