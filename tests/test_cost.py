"""Costs of policies: arithmetic against explicit loops, and files of measured times."""

import itertools
import json

import numpy as np
import pytest

import bitmixer_jax as bm
from bitmixer_jax.cost import activation_peak, costs, describe, load_latency
from bitmixer_jax.errors import shown
from tests.refusals import refused

CHOICES = (2, 3, 4)
# Kernels whose size 8 does not divide, images that are not square, projection shortcuts.
ODD = dict(num_classes=5, image_shape=(9, 7, 1), width=3, projection=True)


def tiny(**settings):
    return bm.create_model("resnet8", **{**ODD, **settings})


def every_policy(layers=6, choices=CHOICES):
    return np.asarray(list(itertools.product(choices, repeat=layers)), np.int32)


def some_policies(model, count=20, seed=0):
    rng = np.random.default_rng(seed)
    return rng.choice(model.space.choices, (count, model.num_layers)).astype(np.int32)


# --- BitOPs ---

NETWORKS = {
    # name: classes, MACs of the layers, of the stem, of the head
    "resnet18": (1000, 1_695_547_392, 118_013_952, 512_000),
    "resnet50": (1000, 3_969_122_304, 118_013_952, 2_048_000),
    "mobilenetv2": (1000, 288_656_256, 10_838_016, 1_280_000),
    "resnet20": (10, 40_108_032, 442_368, 640),
}


@pytest.mark.parametrize(
    ("name", "total"),
    [
        ("resnet18", 1_814_073_344),
        ("resnet50", 4_089_184_256),
        ("mobilenetv2", 300_774_272),
        ("resnet20", 40_551_040),
    ],
)
def test_multiply_accumulates_of_known_networks(name, total):
    classes, layers, stem, head = NETWORKS[name]
    model = bm.create_model(name, num_classes=classes)
    assert sum(layer.macs for layer in model.layers) == layers
    assert model.stem_conv.macs == stem
    assert model.features * classes == head
    assert layers + stem + head == total


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(("first_last", "end_bits"), [("float", 32), ("int8", 8)])
def test_uniform_bitops_are_macs_times_bits_squared(name, first_last, end_bits):
    classes, layers, stem, head = NETWORKS[name]
    model = bm.create_model(name, num_classes=classes, first_last_layers=first_last)
    bitops = costs(model)["bitops"]
    for bits in CHOICES:
        assert bitops(model.space.uniform(bits, model.num_layers)) == layers * bits**2
    assert bitops.first_last_layers == (stem + head) * end_bits**2
    assert bitops.range == (layers * 4, layers * 16)
    assert bitops.widest == layers * 16


def test_bitops_of_a_mixed_policy_are_a_sum_over_kernels():
    model = tiny()
    for policy in some_policies(model):
        wanted = 0
        for layer, bits in zip(model.layers, policy.tolist(), strict=True):
            for kernel in layer.kernels:
                rows, columns, features = kernel.output
                kh, kw, inputs, _ = kernel.shape
                wanted += rows * columns * features * kh * kw * inputs * bits * bits
        assert costs(model)["bitops"](policy) == wanted


# --- bytes ---


def packed_bytes(model, policy):
    """Packs the bit-planes that each layer reads, one plane at a time."""
    kind, total = model.quant.weight_quantizer, 0
    for layer, bits in zip(model.layers, policy.tolist(), strict=True):
        planes = bits + 1 if kind == "double" and bits < model.space.widest else bits
        for kernel in layer.kernels:
            for _ in range(planes):
                total += np.packbits(np.zeros(kernel.shape, bool).ravel()).nbytes
    return total


@pytest.mark.parametrize("kind", ["floor", "double", "independent"])
@pytest.mark.parametrize("choices", [(2, 3, 4), (2, 8)])
def test_weight_bytes_are_those_of_packed_planes(kind, choices):
    model = tiny(weight_quantizer=kind, space=bm.BitSpace(choices))
    sizes = [kernel.params for layer in model.layers for kernel in layer.kernels]
    assert any(size % 8 for size in sizes)
    assert len(sizes) > model.num_layers  # with shortcuts
    count = costs(model)["bytes"]
    for policy in some_policies(model):
        assert count(policy) == packed_bytes(model, policy)


def test_double_rounding_reads_one_plane_more_below_the_widest_width():
    floor, double = (costs(tiny(weight_quantizer=kind))["bytes"] for kind in ("floor", "double"))
    for bits, reads in ((2, 3), (3, 4), (4, 4)):
        assert double([bits] * 6) == floor([reads] * 6)


@pytest.mark.parametrize(("first_last", "each"), [("float", 4), ("int8", 1)])
def test_bytes_of_stem_and_head(first_last, each):
    model = tiny(first_last_layers=first_last)
    stem, head = 3 * 3 * 1 * 3, 12 * 5
    assert costs(model)["bytes"].first_last_layers == (stem + head) * each + 5 * 4


# --- activations ---


def ceil_bytes(shape, bits):
    return -(-int(np.prod(shape)) * bits // 8)


@pytest.mark.parametrize(
    "make",
    [
        lambda: tiny(),
        lambda: tiny(first_last_layers="int8", space=bm.BitSpace((2, 8))),
        lambda: bm.create_model("mobilenetv2", num_classes=10, image_shape=(36, 36, 3)),
    ],
)
def test_activation_bytes_and_their_peak_against_a_slow_loop(make):
    model = make()
    of_all = costs(model)["activation_bytes"]
    end = 8 if model.first_last_layers == "int8" else 32
    for policy in some_policies(model).tolist():
        total = peak = 0
        for i, layer in enumerate(model.layers):
            read = ceil_bytes(layer.input, policy[i])
            after = policy[i + 1] if i + 1 < len(policy) else end
            total += read
            peak = max(peak, read + ceil_bytes(layer.kernels[0].output, after))
        assert of_all(policy) == total
        assert activation_peak(model, policy) == peak
    images = int(np.prod(model.image_shape))
    assert of_all.first_last_layers == ceil_bytes([images + model.features], end)


# --- many policies ---


@pytest.mark.parametrize("weight_quantizer", ["floor", "double"])
def test_many_policies_cost_what_each_costs_alone(weight_quantizer):
    model = tiny(weight_quantizer=weight_quantizer)
    policies = some_policies(model, 50)
    for cost in costs(model).values():
        together = cost(policies)
        assert together.shape == (50,)
        assert together.dtype == np.float64
        assert together.tolist() == [float(cost(policy)) for policy in policies]
        assert cost(tuple(policies[0].tolist())).shape == ()
    together = activation_peak(model, policies)
    assert together.tolist() == [float(activation_peak(model, policy)) for policy in policies]


def test_range_is_that_of_all_policies():
    model = tiny()
    for cost in costs(model).values():
        values = cost(every_policy())
        assert cost.range == (values.min(), values.max())
        assert cost.widest == cost([4] * 6)


@pytest.mark.parametrize("name", ["resnet8", "resnet18", "resnet50", "mobilenetv2"])
def test_average_bits_are_exact(name):
    model = bm.create_model(name, num_classes=10)
    average = costs(model)["avg_bits"]
    length = model.num_layers
    rng = np.random.default_rng(0)
    half = np.asarray([2] * (length // 2) + [4] * (length // 2) + [3] * (length % 2))
    for _ in range(20):
        assert average(rng.permutation(half)) == 3.0
    for policy in some_policies(model):
        assert average(policy) == int(policy.sum()) / length


def test_average_weight_bits_count_layers_by_their_weights():
    model = tiny()
    params = [layer.params for layer in model.layers]
    average = costs(model)["avg_weight_bits"]
    for policy in some_policies(model).tolist():
        weighted = sum(p * bits for p, bits in zip(params, policy, strict=True))
        assert average(policy) == weighted / sum(params)
    assert average([3] * 6) == 3.0


def test_a_float_twin_has_no_costs():
    with refused("no-widths"):
        costs(tiny(space=None))


# --- files of measured times ---


@pytest.fixture
def latency(tmp_path):
    """``latency(key=value, ...)`` writes a latency file with keys changed and returns its path."""

    def write(text=None, **changes):
        content = {
            "format": "bitmixer-latency",
            "version": 1,
            "layers": {
                name: {"2": 1e-3 * i, "3": 2e-3, "4": 1e-3} for i, name in enumerate(tiny().names)
            },
            "first_last_layers": 0.25,
            "device": "a laptop",
        }
        path = tmp_path / "latency.json"
        path.write_text(json.dumps({**content, **changes}) if text is None else text)
        return path

    return write


def test_latency_is_the_sum_of_the_layers_in_milliseconds(latency):
    found = costs(tiny(), latency())["latency_ms"]
    assert found([2] * 6) == pytest.approx(0 + 1 + 2 + 3 + 4 + 5)
    assert found([3] * 6) == pytest.approx(12)
    assert found([2, 3, 4, 4, 3, 2]) == pytest.approx(0 + 2 + 1 + 1 + 2 + 5)
    assert found.range == (pytest.approx(0 + 5 * 1), pytest.approx(2 * 3 + 3 + 4 + 5))
    assert found.widest == pytest.approx(6)
    assert (found.unit, found.first_last_layers) == ("ms", 250)


def test_latency_of_the_ends_is_optional_and_whole_numbers_are_numbers(latency):
    path = latency()
    content = json.loads(path.read_text())
    del content["first_last_layers"]
    content["layers"]["stage1.block1.conv1"] = {"2": 1, "3": 0, "4": 2, "8": "not read"}
    path.write_text(json.dumps(content))
    found = load_latency(str(path), tiny())
    assert found.first_last_layers == 0
    assert found.table[0].tolist() == [1000, 0, 2000]


def test_without_a_latency_file_there_is_no_latency():
    assert "latency_ms" not in costs(tiny())


FIRST = "stage1.block1.conv1"
FULL = {name: {"2": 0.1, "3": 0.1, "4": 0.1} for name in tiny().names}


@pytest.mark.parametrize(
    ("changes", "code", "mentions"),
    [
        ({"format": "other"}, "wrong-format", ('"bitmixer-latency"',)),
        ({"version": 2}, "wrong-format", (2, 1)),
        ({"layers": None}, "damaged", ('"layers"',)),
        ({"layers": [1]}, "damaged", ('"layers"',)),
        (
            {"layers": {"stage1.blok1.conv1": {}}},
            "unknown-name",
            ("'stage1.blok1.conv1'", f"did you mean {FIRST}"),
        ),
        ({"layers": {}}, "other-network", (repr(FIRST),)),
        ({"layers": {**FULL, FIRST: 0.1}}, "other-network", (repr(FIRST),)),
        ({"layers": {**FULL, FIRST: {"2": 0.1, "4": 0.1}}}, "other-network", (repr(FIRST), 3)),
        ({"first_last_layers": -1}, "damaged", ("first_last_layers", -1)),
        ({"first_last_layers": None}, "damaged", ("first_last_layers", None)),
        ({"first_last_layers": float("nan")}, "wrong-format", ("NaN",)),
    ],
)
def test_a_latency_file_that_does_not_fit_is_one_line_with_its_name(
    latency, changes, code, mentions
):
    path = latency(**changes)
    with refused(code, *mentions) as caught:
        load_latency(path, tiny())
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize("seconds", [-0.1, 1e300, "0.1", None, True, [0.1]])
def test_seconds_are_finite_numbers_from_zero(latency, seconds):
    path = latency(layers={**FULL, FIRST: {"2": 0.1, "3": seconds, "4": 0.1}})
    with refused("damaged", path, FIRST, shown(seconds)):
        load_latency(path, tiny())


@pytest.mark.parametrize(
    ("seconds", "written"), [(float("inf"), "Infinity"), (float("nan"), "NaN")]
)
def test_numbers_that_are_not_finite_are_no_json(latency, seconds, written):
    path = latency(layers={**FULL, FIRST: {"2": 0.1, "3": seconds, "4": 0.1}})
    with refused("wrong-format", path, written):
        load_latency(path, tiny())


@pytest.mark.parametrize("text", ["", "{", "[]", '"text"', "[" * 100_000, "null"])
def test_a_file_that_holds_no_latencies_is_refused(latency, text):
    path = latency(text=text)
    with refused("wrong-format", path):
        load_latency(path, tiny())


def test_a_latency_file_that_is_missing_a_folder_or_not_text_is_refused(tmp_path):
    with refused("no-such-file", tmp_path / "none.json"):
        load_latency(tmp_path / "none.json", tiny())
    with refused("not-readable", tmp_path):
        load_latency(tmp_path, tiny())
    (tmp_path / "latency.json").write_bytes(b"\xff\xfe")
    with refused("wrong-format", tmp_path / "latency.json"):
        load_latency(tmp_path / "latency.json", tiny())


# --- the table of one policy ---


def test_the_table_names_every_cost_of_a_policy(latency):
    model = tiny()
    of = costs(model, latency())
    lines = describe(model, [2] * 6, of)
    assert len({line.count("|") for line in lines}) == 1
    cells = {line.split("|")[1].strip(): line for line in lines[2:]}
    assert set(cells) == {*of, "activation peak"}
    assert "| 50.0% |" in cells["avg_bits"]
    assert "| 25.0% |" in cells["bitops"]
    both = of["bitops"]([2] * 6) + of["bitops"].first_last_layers
    assert f"{both:,.6g} BitOPs" in cells["bitops"]


def test_the_table_of_the_widest_policy_says_100_per_cent():
    model = tiny()
    lines = describe(model, [4] * 6, costs(model))
    assert len(lines) > 5
    assert all("| 100.0% |" in line for line in lines[2:])


def test_the_table_refuses_a_policy_that_does_not_fit():
    model = tiny()
    with refused("policy-length", 5, 6):
        describe(model, [4] * 5, costs(model))


@pytest.mark.parametrize(
    ("number", "code"),
    [("1" + "0" * 400, "damaged"), ("9" * 5000, "wrong-format")],
    ids=["1e400", "5000 digits"],
)
def test_seconds_too_large_are_refused(latency, number, code):
    path = latency(first_last_layers=7.5)
    assert "7.5" in path.read_text()
    path.write_text(path.read_text().replace("7.5", number))
    with refused(code, path):
        load_latency(path, tiny())
