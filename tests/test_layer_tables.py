"""Every model: its layer table, shapes, parameters, multiply-accumulates; nothing is compiled."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bitmixer_jax as bm
from bitmixer_jax.layers import QuantActivation, QuantLayer
from bitmixer_jax.models import MODELS
from tests.refusals import refused

SPACE = bm.BitSpace((2, 3, 4))
EVERY = pytest.mark.parametrize("name", MODELS)


@functools.cache
def shapes(name):
    """Model, its variables, and what each of its layers takes and gives; for one image."""
    model = bm.create_model(name, num_classes=1000, space=SPACE)

    def run(key, x):
        return model.init(
            key,
            x,
            bits=(4,) * model.num_layers,
            capture_intermediates=lambda m, _: isinstance(m, QuantActivation | QuantLayer),
            mutable=True,
        )

    return model, jax.eval_shape(run, jax.random.key(0), jnp.zeros((1, *model.image_shape)))


@EVERY
def test_the_layer_table_describes_the_variables(name):
    model, variables = shapes(name)
    params, stats = variables["params"], variables["batch_stats"]
    assert set(params) == {"stem", "head", *model.names}
    for layer in model.layers:
        held = params[layer.name]
        expected = {"input", *(n for k in layer.kernels for n in (k.name, f"{k.name}_norm"))}
        assert set(held) == expected
        assert held["input"]["step"].shape == (3,)
        for kernel in layer.kernels:
            assert held[kernel.name]["kernel"].shape == kernel.shape
            assert held[kernel.name]["step"].shape == (1,)
            table = (1 if layer.predecessor < 0 else 3, 3)
            for leaf in ("scale", "bias"):
                assert held[f"{kernel.name}_norm"][leaf].shape == (*table, kernel.shape[-1])
            tables = stats[layer.name][f"{kernel.name}_norm"]
            assert tables["mean"].shape == tables["var"].shape == (*table, kernel.shape[-1])
            assert tables["count"].shape == table
        assert layer.params == sum(held[k.name]["kernel"].size for k in layer.kernels)


@EVERY
def test_the_layer_table_describes_what_each_layer_takes_and_gives(name):
    model, variables = shapes(name)
    for layer in model.layers:
        seen = variables["intermediates"][layer.name]
        codes, _ = seen["input"]["__call__"][0]
        assert codes.shape == (1, *layer.input)
        outputs = [y.shape for y in seen["__call__"][0]]
        assert outputs == [(1, *kernel.output) for kernel in layer.kernels]


@EVERY
def test_layers_have_names_of_their_own_and_stand_in_the_order_of_the_data(name):
    model, _ = shapes(name)
    assert len(set(model.names)) == model.num_layers == len(model.layers)
    assert [layer.predecessor for layer in model.layers] == list(range(-1, model.num_layers - 1))
    blocks = [layer.block for layer in model.layers]
    assert blocks[0] == 0
    assert set(np.diff(blocks)) <= {0, 1}


# Trainable parameters of the published networks, with BN, stem and head; million, and exactly.
PARAMETERS = {
    ("resnet20", 10): 269_722,
    ("resnet32", 10): 464_154,
    ("resnet56", 10): 853_018,
    ("resnet18", 1000): 11_689_512,
    ("resnet34", 1000): 21_797_672,
    ("resnet50", 1000): 25_557_032,
    ("mobilenetv2", 1000): 3_504_872,
}


@pytest.mark.parametrize(("name", "classes"), PARAMETERS)
def test_the_baseline_has_the_parameters_of_the_published_network(name, classes):
    model, variables = shapes(name)
    total = sum(np.prod(k.shape) for layer in model.layers for k in layer.kernels)
    channels = sum(k.shape[-1] for layer in model.layers for k in layer.kernels)
    stem = variables["params"]["stem"]
    features = variables["params"]["head"]["kernel"].shape[0]
    total += stem["conv"]["kernel"].size + 2 * (channels + stem["conv"]["kernel"].shape[-1])
    assert total + (features + 1) * classes == PARAMETERS[name, classes]


@pytest.mark.parametrize(
    ("name", "giga", "stem", "features"),
    [
        ("resnet18", 1.814, 7 * 7 * 3 * 64 * 112**2, 512),
        ("resnet50", 4.089, 7 * 7 * 3 * 64 * 112**2, 2048),
        ("mobilenetv2", 0.3008, 3 * 3 * 3 * 32 * 112**2, 1280),
    ],
)
def test_multiply_accumulates_are_those_of_the_published_network(name, giga, stem, features):
    model, _ = shapes(name)
    total = sum(layer.macs for layer in model.layers) + stem + features * 1000
    assert abs(total / 1e9 - giga) < 0.0005


def test_layer_counts_are_those_of_the_published_networks():
    expected = dict(resnet8=6, resnet20=18, resnet32=30, resnet56=54)
    expected |= dict(resnet18=16, resnet34=32, resnet50=48, mobilenetv2=51)
    assert {name: shapes(name)[0].num_layers for name in MODELS} == expected
    assert abs(sum(x.macs for x in shapes("resnet18")[0].layers) / 1e9 - 1.695) < 0.001


def test_resnet18_has_the_4800_norm_channels_of_the_method():
    model, _ = shapes("resnet18")
    assert 64 + sum(k.shape[-1] for layer in model.layers for k in layer.kernels) == 4800


def test_projection_shortcuts_are_second_kernels_of_the_first_layer_of_their_block():
    for name, where in (("resnet18", (2, 3, 4)), ("resnet50", (1, 2, 3, 4)), ("resnet20", ())):
        model, _ = shapes(name)
        double = [layer.name for layer in model.layers if len(layer.kernels) == 2]
        assert double == [f"stage{stage}.block1.conv1" for stage in where]


def test_mobilenet_quantises_the_outputs_of_linear_bottlenecks_with_a_signed_grid():
    for layer in shapes("mobilenetv2")[0].layers:
        takes_a_bottleneck = layer.name.endswith("expand") or layer.name == "last"
        assert layer.signed == takes_a_bottleneck, layer.name
        assert (layer.kind == "depthwise") == layer.name.endswith("depthwise")


@EVERY
def test_resnets_quantise_rectified_inputs_only(name):
    if name != "mobilenetv2":
        assert not any(layer.signed for layer in shapes(name)[0].layers)


def test_groups_join_the_layers_of_a_block():
    model = bm.create_model("resnet8", num_classes=5, space=SPACE, image_shape=(8, 8, 3), width=4)
    assert model.groups() == (0, 1, 2, 3, 4, 5)
    assert model.groups("block") == (0, 0, 1, 1, 2, 2)
    assert shapes("mobilenetv2")[0].groups("block")[:6] == (0, 0, 1, 1, 1, 2)
    with refused("bad-value", "'stage'", "layer", "block"):
        model.groups("stage")
