"""StableHLO by jax.export: a file that runs any policy wherever jax runs, without this library.

    import json, zipfile
    import jax, numpy as np

    with zipfile.ZipFile("net.stablehlo") as file:
        about = json.loads(file.read("about.json"))
        network = jax.export.deserialize(bytearray(file.read("network.bin")))
    images = np.zeros((8, *about["image_shape"]), np.uint8)  # any number of images
    policy = np.full(len(about["layers"]), 3, np.int32)  # a width for each layer
    logits = network.call(images, policy)  # NaN for widths that are not in about["choices"]

The file is a zip archive, not compressed. Its program is the integer engine: weights are int8
constants, so it has about a quarter of the size of the simulated network.
"""

from __future__ import annotations

import contextlib
import io
import json
import pathlib
import zipfile
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bitmixer_jax.data import normalize
from bitmixer_jax.errors import UserError, reason
from bitmixer_jax.export.description import Reader, describe
from bitmixer_jax.export.integer_engine import run_integer
from bitmixer_jax.export.integer_model import IntegerModel
from bitmixer_jax.files import open_file, parse_json, user_path, write_new
from bitmixer_jax.loaded_model import check_images
from bitmixer_jax.policy import check_policy
from bitmixer_jax.zip_files import read_parts

PLATFORMS = ("cpu", "cuda", "tpu")


def export_stablehlo(
    network: IntegerModel, path: str | pathlib.Path, *, overwrite: bool = False
) -> None:
    """Writes logits(images uint8 ``[b, H, W, C]``, policy int32 ``[L]``) for cpu, cuda and tpu.

    Args:
      network: the integers.
      path: of the file.
      overwrite: replace a file that exists.

    Raises:
      UserError: flatbuffers is not installed, or the file cannot be written.
    """
    _need_flatbuffers()

    def logits(images: jax.Array, policy: jax.Array) -> jax.Array:
        x = normalize(images, network.mean, network.std)
        return run_integer(network, x, policy)

    (batch,) = jax.export.symbolic_shape("b")
    shapes = (
        jax.ShapeDtypeStruct((batch, *network.image_shape), jnp.uint8),
        jax.ShapeDtypeStruct((len(network.layers),), jnp.int32),
    )
    with _no_locations():
        exported = jax.export.export(jax.jit(logits), platforms=PLATFORMS)(*shapes)
    about = {key: value for key, value in describe(network).items() if key != "graph"}
    about["layers"] = list(network.names)
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        for name, data in (
            ("about.json", json.dumps(about, indent=1).encode()),
            ("network.bin", bytes(exported.serialize())),
        ):
            file.writestr(
                zipfile.ZipInfo(name), data
            )  # without the time, so that the bytes are always the same
    write_new(path, content.getvalue(), overwrite=overwrite)


class StablehloRunner:
    """Runs an export: ``runner(images, policy)`` returns logits."""

    def __init__(self, path: str | pathlib.Path):
        """Loads the file.

        Raises:
          UserError: no such file, not an export of this library, or flatbuffers is not installed.
        """
        _need_flatbuffers()
        path = user_path(path)
        try:
            with open_file(path) as file:
                about, program = read_parts(file, ("about.json", "network.bin"))
            self.about: dict[str, Any] = parse_json(about)
        except FileNotFoundError:
            raise UserError(f"{path}: no such file", "no-such-file") from None
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({reason(error)})", "not-readable") from None
        except ValueError as error:
            raise UserError(
                f"{path}: not a StableHLO export, or damaged ({error})", "damaged"
            ) from None
        read = Reader(str(path))
        self.space = read.space(read.field(self.about, "choices", list))
        self.names = read.texts(self.about.get("layers"), "layers")
        self.classes = read.texts(self.about.get("classes"), "classes")
        self.image_shape = read.image_shape(self.about.get("image_shape"))
        try:
            self._exported = jax.export.deserialize(bytearray(program))
            shapes = [tuple(value.shape) for value in self._exported.in_avals]
            shapes += [tuple(value.shape) for value in self._exported.out_avals]
        except Exception as error:  # jax and flatbuffers raise many kinds
            raise UserError(
                f"{path}: not a StableHLO export, or damaged ({reason(error)})", "damaged"
            ) from None
        wanted = [self.image_shape, (len(self.names),), (len(self.classes),)]
        if len(shapes) != 3 or [shapes[0][1:], shapes[1], shapes[2][1:]] != wanted:
            read.fail("its program is not what about.json says")
        self._call = jax.jit(self._exported.call)

    def __call__(self, images: np.ndarray, policy: Any) -> np.ndarray:
        """Computes logits float32 ``[N, K]`` of images uint8 ``[N, H, W, C]``.

        Args:
          policy: ``[L]`` widths, or one for all layers.

        Raises:
          UserError: images or policy do not fit.
        """
        images = check_images(images, self.image_shape)
        return np.asarray(self._call(images, check_policy(policy, self.space, len(self.names))))


@contextlib.contextmanager
def _no_locations() -> Iterator[None]:
    """Keeps source locations out of the lowered program: they hold paths of this machine."""
    limit = jax.config.values["jax_traceback_in_locations_limit"]
    jax.config.update("jax_traceback_in_locations_limit", 0)
    try:
        yield
    finally:
        jax.config.update("jax_traceback_in_locations_limit", limit)


def _need_flatbuffers() -> None:
    try:
        import flatbuffers  # noqa: F401
    except ImportError:
        raise UserError(
            "StableHLO needs flatbuffers: pip install 'bitmixer_jax[stablehlo]'", "not-installed"
        ) from None
