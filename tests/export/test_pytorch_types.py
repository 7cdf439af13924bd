"""The PyTorch module under types, formats and copies, and the widths that it takes."""

import copy
import subprocess
import sys

import numpy as np
import pytest

from bitmixer_jax.export.pytorch import TorchRunner, export_pytorch
from tests.export.networks import integer_model

torch = pytest.importorskip("torch")

WEIGHT_QUANTIZERS = ("resnet8", "int8 ends")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The folder of an export by kind."""
    base = tmp_path_factory.mktemp("torch")
    for number, kind in enumerate(WEIGHT_QUANTIZERS):
        export_pytorch(integer_model(kind), base / str(number))
    return {kind: base / str(number) for number, kind in enumerate(WEIGHT_QUANTIZERS)}


@pytest.fixture
def net(folders):
    return TorchRunner(folders["resnet8"]).net


@pytest.fixture(scope="module")
def images():
    drawn = np.random.default_rng(3).integers(256, size=(5, 1, 8, 8))
    return torch.from_numpy(drawn.astype(np.uint8))


CONVERSIONS = {
    "half": lambda net: net.half(),
    "bfloat16": lambda net: net.bfloat16(),
    "double": lambda net: net.double(),
    "to": lambda net: net.to("cpu", torch.float16),
    "type": lambda net: net.type(torch.float64),
    "channels_last": lambda net: net.to(memory_format=torch.channels_last),
    "within": lambda net: torch.nn.Sequential(net).half()[0],
    "copy": copy.deepcopy,
}


@pytest.mark.parametrize("kind", WEIGHT_QUANTIZERS)
@pytest.mark.parametrize("name", CONVERSIONS)
def test_no_conversion_changes_an_answer(kind, name, folders, images):
    net = TorchRunner(folders[kind]).net
    net.set_policy([4, 3, 2, 2, 3, 4])
    wanted = net(images)
    net = CONVERSIONS[name](net)
    for given in (images, images.half(), images.bfloat16(), images.double()):
        found = net(given)
        assert found.dtype == torch.float32
        assert torch.equal(found, wanted)


def test_a_module_and_images_in_channels_last(folders, images):
    # Of three channels: with one both formats are the same.
    folder = folders["resnet8"].with_name("double")
    export_pytorch(integer_model("double"), folder)
    net, images = TorchRunner(folder).net, images.expand(-1, 3, -1, -1).contiguous()
    wanted = net(images)
    net = net.to(memory_format=torch.channels_last)
    assert net.layers[1].conv.codes[0].is_contiguous(memory_format=torch.channels_last)
    found = net(images.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)  # sums of the head


def test_autocast_changes_no_answer(net, images):
    wanted = net(images)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(net(images), wanted)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_the_type_that_torch_makes_by_default_changes_no_answer(dtype, folders, images):
    wanted = TorchRunner(folders["resnet8"]).net(images)
    torch.set_default_dtype(dtype)
    try:
        assert torch.equal(TorchRunner(folders["resnet8"]).net(images), wanted)
    finally:
        torch.set_default_dtype(torch.float32)


def test_the_state_goes_round(net, images, tmp_path):
    wanted = net(images)
    torch.save(net.half().state_dict(), tmp_path / "state.pt")
    other = copy.deepcopy(net)
    for buffer in other.buffers():
        buffer.zero_()
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    other.mean.copy_(net.mean)  # not in the state: part of the description
    other.std.copy_(net.std)
    assert torch.equal(other(images), wanted)


@pytest.mark.slow
def test_the_module_can_be_pickled(folders):
    code = (
        "import pickle, torch\n"
        "from model import load\n"
        "net = load('.'); net.set_policy(2); again = pickle.loads(pickle.dumps(net.half()))\n"
        "x = torch.zeros(2, 1, 8, 8)\n"
        "print(again.policy == net.policy, torch.equal(again(x), net(x)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folders["resnet8"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["True", "True"]


@pytest.mark.parametrize(
    "widths",
    [
        np.int64(3),
        np.array(3),
        torch.tensor(3),
        [np.uint8(3)] * 6,
        np.full(6, 3, np.int8),
        torch.full((6,), 3),
        [torch.tensor(3)] * 6,
        (3,) * 6,
        {f"stage{s}.block1.conv{c}": np.int32(3) for s in (1, 2, 3) for c in (1, 2)},
    ],
    ids=str,
)
def test_whole_numbers_of_any_kind_are_widths(widths, net):
    net.set_policy(widths)
    assert net.policy == (3,) * 6


@pytest.mark.parametrize(
    "widths",
    [
        3.0,
        "3",
        "333333",
        b"\3\3\3\3\3\3",
        True,
        None,
        np.float32(3),
        np.full(6, 3.0),
        torch.tensor(3.0),
        torch.full((1, 6), 3),
        [3.9] * 6,
        ["3"] * 6,
        [True] * 6,
        [[3]] * 6,
        [None] * 6,
        {"stage1.block1.conv1": 3.9},
        {"stage1.block1.conv1": "3"},
        (3 for _ in range(6)),
        {2, 3},
    ],
    ids=lambda widths: f"{type(widths).__name__} {widths!r}"[:30],
)
def test_what_is_no_whole_number_is_no_width(widths, net):
    with pytest.raises(ValueError, match="give a") as caught:
        net.set_policy(widths)
    assert len(str(caught.value).splitlines()) == 1
    assert net.policy == (4,) * 6
