"""The packed file: round trips, truncation, damage."""

import dataclasses
import hashlib
import json
import struct

import jax
import numpy as np
import pytest

from bitmixer_jax.errors import UserError
from bitmixer_jax.export.integer_engine import run_integer
from bitmixer_jax.export.packed import load_packed, pack, save_packed, unpack
from tests.export.networks import EACH_KIND, EVERYDAY, WEIGHT_QUANTIZERS, images, integer_model
from tests.refusals import check_line, refused

NESTED = [kind for kind in WEIGHT_QUANTIZERS if kind != "independent"]


def logits(found, kind, policy):
    return np.asarray(jax.jit(lambda x, p: run_integer(found, x, p))(images(kind), policy))


def planes_for(kind, width):
    found = integer_model(kind)
    more = found.weight_quantizer == "double" and width < found.space.widest
    return width + more


def start_of_planes(data):
    """Offset of each plane, and the end."""
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    planes = sorted(v["data_offsets"] for k, v in header.items() if k.startswith("plane."))
    return [8 + size + begin for begin, _ in planes] + [len(data)]


@EACH_KIND
def test_round_trip_keeps_every_number(kind):
    before, after = integer_model(kind), unpack(pack(integer_model(kind)), "file")
    for field in (
        "space",
        "weight_quantizer",
        "code_bits",
        "graph",
        "image_shape",
        "classes",
        "weights_digest",
    ):
        assert getattr(before, field) == getattr(after, field)
    assert before.about == after.about
    for old, new in zip(before.layers, after.layers, strict=True):
        assert old.info == new.info
        np.testing.assert_array_equal(old.step_size, new.step_size)
        for one, other in zip(old.kernels, new.kernels, strict=True):
            for leaf in ("codes", "step_size", "multiplier", "offset", "count"):
                np.testing.assert_array_equal(getattr(one, leaf), getattr(other, leaf))
    np.testing.assert_array_equal(before.head.kernel, after.head.kernel)
    assert before.head.step_sizes == after.head.step_sizes


def test_pairs_that_training_never_visited_are_refused_also_after_a_file():
    network = integer_model(EVERYDAY[0])
    layer, *others = network.layers
    counts = [np.zeros_like(kernel.count) for kernel in layer.kernels]
    kernels = tuple(
        dataclasses.replace(kernel, count=count)
        for kernel, count in zip(layer.kernels, counts, strict=True)
    )
    never = dataclasses.replace(
        network, layers=(dataclasses.replace(layer, kernels=kernels), *others)
    )
    found = unpack(pack(never), "file")
    assert not found.layers[0].kernels[0].count.any()
    policy = network.space.uniform(network.space.widest, len(network.layers))
    network.check_calibrated(policy)
    with refused("uncalibrated", layer.info.name):
        found.check_calibrated(policy)


def test_other_readers_open_it(tmp_path):
    from safetensors.numpy import load_file

    path = tmp_path / "net.packed"
    save_packed(path, integer_model("resnet8"))
    arrays = load_file(path)
    bits = np.unpackbits(arrays["plane.0"])[: integer_model("resnet8").layers[0].info.params]
    assert np.array_equal(bits, integer_model("resnet8").layers[0].kernels[0].codes.ravel() < 0)


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=[] if kind in EVERYDAY else pytest.mark.slow) for kind in NESTED],
)
def test_cut_after_some_planes_it_is_the_narrower_network(kind):
    whole, data = integer_model(kind), pack(integer_model(kind))
    edges = start_of_planes(data)
    for width in whole.space.choices[:-1]:
        planes = planes_for(kind, width)
        if planes == whole.space.widest:  # rounded twice: 3 bits of 4 need all planes
            continue
        cut = unpack(data[: edges[planes]], "file")
        stopped = unpack(data, "file", planes=planes)
        policy = np.full(len(whole.layers), width, np.int32)
        wanted = logits(whole, kind, policy)
        assert cut.space.widest == stopped.space.widest == width
        np.testing.assert_array_equal(logits(cut, kind, policy), wanted)
        np.testing.assert_array_equal(logits(stopped, kind, policy), wanted)


def test_a_cut_file_still_mixes_the_widths_that_are_left():
    whole, data = integer_model("resnet8"), pack(integer_model("resnet8"))
    cut = unpack(data[: start_of_planes(data)[3]], "file")
    policy = np.asarray([2, 3, 3, 2, 2, 3], np.int32)
    assert cut.space.choices == (2, 3)
    np.testing.assert_array_equal(logits(cut, "resnet8", policy), logits(whole, "resnet8", policy))


def test_too_few_planes_is_an_error():
    data = pack(integer_model("resnet8"))
    with refused("bad-value", "file", 1, (2, 3, 4)):
        unpack(data[: start_of_planes(data)[1]], "file")
    with refused("bad-value", "file", "planes=9", 4):
        unpack(data, "file", planes=9)
    with refused("bad-value", "file", "planes=2"):
        unpack(pack(integer_model("independent")), "file", planes=2)


def test_cut_elsewhere_is_an_error():
    data = pack(integer_model("resnet8"))
    edges = set(start_of_planes(data)[1:])
    rng = np.random.default_rng(0)
    for length in {0, 7, 8, 9, 100, *rng.integers(len(data), size=200).tolist()} - edges:
        with refused("damaged", "file"):
            unpack(data[:length], "file")


def test_no_float_copy_of_quantised_weights():
    found = integer_model("resnet8")
    data = pack(found)
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    floats = sum(
        np.prod(v["shape"]) for k, v in header.items() if k[0] != "_" and v["dtype"] == "F32"
    )
    tables = sum(2 * k.multiplier.size for layer in found.layers for k in layer.kernels)
    ends = found.stem.kernel.size + 2 * found.stem.offset.size + found.head.kernel.size + 3
    assert floats == tables + ends + 6 * 3 + 6


def test_float16_tables_are_near_and_smaller():
    found = integer_model("resnet8")
    small = pack(found, "float16")
    assert len(small) < len(pack(found))
    for old, new in zip(found.layers, unpack(small, "file").layers, strict=True):
        for leaf in ("multiplier", "offset"):
            wanted = getattr(old.kernels[0], leaf)
            error = np.abs(getattr(new.kernels[0], leaf) - wanted)
            assert (error <= 2**-11 * np.abs(wanted).max(-1, keepdims=True)).all()
    with refused("bad-value", "'float8'", "float32, float16"):
        pack(found, "float8")


def test_a_network_from_a_cut_file_is_packed_as_the_narrower_one():
    cut = unpack(pack(integer_model("resnet8")), "file", planes=3)
    again = unpack(pack(cut), "file")
    assert again.space.choices == (2, 3)
    policy = np.asarray([2, 3, 3, 2, 2, 3], np.int32)
    np.testing.assert_array_equal(logits(again, "resnet8", policy), logits(cut, "resnet8", policy))
    np.testing.assert_array_equal(
        cut.layers[0].kernels[0].step_size * 0.5,
        [integer_model("resnet8").layers[0].kernels[0].step_size[0]],
    )
    with refused("bad-value"):
        pack(unpack(pack(integer_model("double")), "file", planes=3))


def test_the_same_network_gives_the_same_bytes():
    assert pack(integer_model("resnet8")) == pack(integer_model("resnet8"))


def test_files_are_not_overwritten_in_silence(tmp_path):
    path = tmp_path / "net.packed"
    save_packed(path, integer_model("resnet8"))
    save_packed(path, integer_model("resnet8"))  # the same content
    with refused("exists", path):
        save_packed(path, integer_model("double"))
    save_packed(path, integer_model("double"), overwrite=True)
    assert load_packed(path).weight_quantizer == "double"


def test_missing_and_foreign_files_are_one_line(tmp_path):
    with refused("no-such-file", tmp_path / "absent"):
        load_packed(tmp_path / "absent")
    with refused("not-readable", tmp_path):
        load_packed(tmp_path)
    from safetensors.numpy import save

    for content in (b"", b"hello", save({"a": np.zeros(3)}), b"\x80\x04K\x01." * 50):
        with refused("damaged", "file"):
            unpack(content, "file")


def rewritten(data, change):
    """The file with its header changed and all checksums made right again: a hostile author."""
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    metadata = header["__metadata__"]
    description = json.loads(metadata["description"])
    change(header, description)
    metadata["description"] = json.dumps(description)
    metadata["header_sha256"] = "0" * 64
    text = json.dumps(header).encode()
    raw = struct.pack("<Q", len(text)) + text
    digest = hashlib.sha256(raw).hexdigest()
    return raw.replace(b"0" * 64, digest.encode()) + data[8 + size :]


def set_in(path, value):
    def change(header, description):
        tree = description
        for key in path[:-1]:
            tree = tree[key]
        tree[path[-1]] = value

    return change


HOSTILE = [
    (["choices"], [2, 3, 200]),
    (["choices"], []),
    (["weight_kind"], "triple"),
    (["norm"], "per_width"),
    (["tables"], "float16"),
    (["ends"], "int8"),
    (["image_shape"], [2**19, 2**19, 1]),
    (["image_shape"], [8, 8]),
    (["mean"], [float("nan")]),
    (["std"], [0]),
    (["classes"], ["a"]),
    (["features"], 10**9),
    (["layers"], []),
    (["layers", 0, "input"], [8, 8, 10**9]),
    (["layers", 0, "previous"], 3),
    (["layers", 2, "kernels", 0, 1], [3, 3, 8, 2**19]),
    (["layers", 2, "kernels", 0, 2], [0, 0]),
    (["layers", 2, "kernels", 0, 4], 8),
    (["layers", 0, "name"], "stage2.block1.conv1"),
    (["graph"], [["head", ["images"], ["x"]]]),
    (["graph", 3, 0], "exec"),
    (["graph", 3, 1], ["nowhere"]),
    (["graph", 2, 3], "stage3.block1.conv1"),
    (["graph", 0], None),
]


@pytest.mark.parametrize(("path", "value"), HOSTILE)
def test_a_hostile_description_is_one_line(path, value):
    data = rewritten(pack(integer_model("resnet8")), set_in(path, value))
    with refused("damaged", "file"):
        unpack(data, "file")


def test_the_untouched_description_passes_the_same_way():
    unpack(rewritten(pack(integer_model("resnet8")), lambda header, description: None), "file")


def test_a_header_that_claims_more_than_the_file_holds_needs_no_memory():
    for size in (2**63, 2**40, 2**25):
        with refused("damaged", "file"):
            unpack(struct.pack("<Q", size) + b"{}", "file")


def mutated(data, rng):
    """One to four bytes changed, removed or put in, or a stretch copied over another."""
    found = bytearray(data)
    for _ in range(rng.integers(1, 5)):
        place, other = rng.integers(len(found), size=2)
        match rng.integers(4):
            case 0:
                found[place] ^= 1 << rng.integers(8)
            case 1:
                found[place] = rng.integers(256)
            case 2:
                del found[place : place + rng.integers(1, 9)]
            case 3:
                found[place : place + 8] = found[other : other + 8]
    return bytes(found)


def test_mutated_files_fail_or_are_unchanged():
    data = pack(integer_model("resnet8"))
    rng = np.random.default_rng(0)
    for _ in range(500):
        changed = mutated(data, rng)
        if changed == data:
            continue
        with pytest.raises(UserError) as caught:
            unpack(changed, "file")
        assert caught.value.code in ("damaged", "wrong-format")
        check_line(str(caught.value), start="file: ")
