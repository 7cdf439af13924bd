"""Small networks of all kinds with random variables, for tests of exports."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bitmixer_jax as bm
from bitmixer_jax.export.integer_model import to_integer_model
from bitmixer_jax.training.checkpoints import digest

WEIGHT_QUANTIZERS = {
    "resnet8": dict(name="resnet8", image_shape=(8, 8, 1), width=8),
    "resnet18": dict(
        name="resnet18", image_shape=(32, 32, 3), width=8, stage_sizes=(1, 1), stem_kernel=7
    ),
    "mobilenet": dict(name="mobilenetv2", image_shape=(32, 32, 3), multiplier=0.1),
    "int8 ends": dict(name="resnet8", image_shape=(8, 8, 1), width=8, first_last_layers="int8"),
    "double": dict(name="resnet8", image_shape=(8, 8, 3), width=8, weight_quantizer="double"),
    "independent": dict(
        name="resnet8", image_shape=(8, 8, 1), width=8, weight_quantizer="independent"
    ),
    "per width": dict(name="resnet8", image_shape=(8, 8, 1), width=8, norm="per_width"),
    "wide": dict(name="resnet8", image_shape=(8, 8, 1), width=8, choices=(2, 4, 8)),
    "double, wide": dict(
        name="resnet8", image_shape=(8, 8, 1), width=6, weight_quantizer="double", choices=(2, 5, 8)
    ),
}

# One of each weight quantiser, shortcuts with kernels, quantised ends: the others take longer.
EVERYDAY = ("resnet18", "int8 ends", "double", "independent")
EACH_KIND = pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=[] if kind in EVERYDAY else pytest.mark.slow)
        for kind in WEIGHT_QUANTIZERS
    ],
)


@functools.cache
def network(kind):
    """(model, variables) with random norms, negative scales among them, all pairs visited."""
    settings = dict(WEIGHT_QUANTIZERS[kind])
    space = bm.BitSpace(settings.pop("choices", (2, 3, 4)))
    model = bm.create_model(settings.pop("name"), num_classes=3, space=space, **settings)
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.normal(size=(8, *model.image_shape)), jnp.float32)
    bits = (space.widest,) * model.num_layers
    init = jax.jit(lambda key: model.init(key, images, bits=bits, train=False))
    variables = jax.tree.map(np.asarray, init(jax.random.key(0)))

    def drawn(path, leaf):
        name = path[-1].key
        if name in ("scale", "bias", "mean"):
            low = 0.3 if name == "scale" else 0.0
            sign = rng.choice([-1, 1], p=[0.2, 0.8], size=leaf.shape)
            return (sign * (low + rng.random(leaf.shape))).astype(np.float32)
        if name == "var":
            return (0.5 + rng.random(leaf.shape)).astype(np.float32)
        return np.full_like(leaf, 7) if name == "count" else leaf

    return model, jax.tree_util.tree_map_with_path(drawn, dict(variables))


@functools.cache
def integer_model(kind):
    """The network as integers."""
    model, variables = network(kind)
    channels = model.image_shape[-1]
    return to_integer_model(
        model,
        variables,
        mean=np.linspace(100, 120, channels),
        std=np.linspace(50, 60, channels),
        classes=("a", "b", "c"),
        weights_digest=digest(variables),
        about={"model": kind},
    )


def images(kind, number=6, seed=1):
    """Normalised images float32 ``[N, H, W, C]``."""
    shape = network(kind)[0].image_shape
    return np.random.default_rng(seed).normal(size=(number, *shape)).astype(np.float32)


def policies(kind, number=4):
    """The uniform widths, and some random policies."""
    model = network(kind)[0]
    rng = np.random.default_rng(0)
    drawn = rng.choice(model.space.choices, size=(number, model.num_layers)).astype(np.int32)
    uniform = [model.space.uniform(b, model.num_layers) for b in model.space.choices]
    return [*uniform, *drawn]
