"""Export to PyTorch: weights.safetensors, a state_dict, and model.py, a module that loads it."""

from __future__ import annotations

import importlib.util
import json
import pathlib
from typing import Any

import numpy as np

from bitmixer_jax.errors import UserError
from bitmixer_jax.export.description import describe
from bitmixer_jax.export.integer_model import FloatStem, IntegerModel, Layer
from bitmixer_jax.files import cannot_write, user_path, write_whole

MODULE = pathlib.Path(__file__).with_name("torch_module.py")
PYTORCH_FORMAT = "bitmixer-pytorch"


def state_dict(network: IntegerModel) -> dict[str, np.ndarray]:
    """Returns the state of the PyTorch module, by name.

    ``layers.I.step`` ``[n]``, the step sizes of the input; ``layers.I.KERNEL.codes`` int8
    ``[S, O, I, kh, kw]``, ``.multiplier`` and ``.offset`` ``[P, n, O]``, ``.count`` int32
    ``[P, n]``, KERNEL "conv" or "shortcut"; ``stem.*`` likewise, or ``stem.kernel``,
    ``stem.multiplier``, ``stem.offset`` if it is real-valued; ``head_kernel`` ``[F, K]``,
    ``head_bias``, and ``head_steps`` ``[2]`` if int8. Files have these names; they must not change.
    """
    arrays: dict[str, np.ndarray] = {}

    def add(prefix: str, layer: Layer) -> None:
        arrays[f"{prefix}.step"] = layer.step_size
        for kernel in layer.kernels:
            name = f"{prefix}.{kernel.info.name}"
            arrays[f"{name}.codes"] = kernel.codes.transpose(0, 4, 3, 1, 2)
            arrays[f"{name}.multiplier"] = kernel.multiplier
            arrays[f"{name}.offset"] = kernel.offset
            arrays[f"{name}.count"] = kernel.count

    for i, layer in enumerate(network.layers):
        add(f"layers.{i}", layer)
    stem, head = network.stem, network.head
    if isinstance(stem, FloatStem):
        arrays["stem.kernel"] = stem.kernel.transpose(3, 2, 0, 1)
        arrays["stem.multiplier"], arrays["stem.offset"] = stem.multiplier, stem.offset
    else:
        add("stem", stem)
        arrays["head_steps"] = np.asarray(head.step_sizes, np.float32)
    arrays["head_kernel"], arrays["head_bias"] = head.kernel, head.bias
    return {name: np.ascontiguousarray(array) for name, array in arrays.items()}


def export_pytorch(network: IntegerModel, folder: str | pathlib.Path) -> None:
    """Writes weights.safetensors and model.py into a new folder.

    Args:
      network: the integers.
      folder: which is made.

    Raises:
      UserError: safetensors is not installed, the network was read from a cut file, or the folder
        exists already.
    """
    try:
        from safetensors.numpy import save
    except ImportError:
        raise UserError(
            "export to PyTorch needs safetensors: pip install 'bitmixer_jax[torch]'",
            "not-installed",
        ) from None
    if network.code_bits != network.space.widest:
        raise UserError("export: this network was read from a cut packed file; use the whole")
    folder = user_path(folder)
    try:
        folder.mkdir()
        metadata = {"format": PYTORCH_FORMAT, "description": json.dumps(describe(network))}
        write_whole(folder / "weights.safetensors", save(state_dict(network), metadata))
        write_whole(folder / "model.py", MODULE.read_bytes())
    except OSError as error:
        raise cannot_write(folder, error) from None


class TorchRunner:
    """Runs an export in PyTorch: ``runner(images, policy)`` returns logits."""

    def __init__(self, folder: str | pathlib.Path):
        """Loads the export with its own model.py.

        Raises:
          UserError: PyTorch is not installed.
        """
        try:
            import torch
        except ImportError:
            raise UserError(
                "running the export needs PyTorch: pip install 'bitmixer_jax[torch]'",
                "not-installed",
            ) from None
        self._torch = torch
        path = pathlib.Path(folder) / "model.py"
        spec = importlib.util.spec_from_file_location("bitmixer_exported_model", path)
        assert spec is not None
        assert spec.loader is not None
        module: Any = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        self.net: Any = module.load(folder)

    def __call__(self, images: np.ndarray, policy: np.ndarray) -> np.ndarray:
        """Computes logits float32 ``[N, K]``: images uint8 ``[N, H, W, C]``, policy ``[L]``."""
        self.net.set_policy(policy)
        parts = []
        with self._torch.no_grad():
            for start in range(0, len(images), 64):
                x = self._torch.from_numpy(images[start : start + 64].transpose(0, 3, 1, 2).copy())
                parts.append(self.net(x).numpy())
        return np.concatenate(parts)
