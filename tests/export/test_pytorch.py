"""The PyTorch export against the integer engine, tensor by tensor."""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from bitmixer_jax.data import normalize
from bitmixer_jax.export.integer_engine import tensors
from bitmixer_jax.export.pytorch import TorchRunner, export_pytorch, state_dict
from tests.export.networks import EACH_KIND, integer_model, network, policies
from tests.refusals import refused

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """``exported(kind)``: a folder with the export of that network."""
    base, made = tmp_path_factory.mktemp("torch"), {}

    def get(kind):
        if kind not in made:
            made[kind] = base / kind.replace(" ", "-").replace(",", "")
            export_pytorch(integer_model(kind), made[kind])
        return made[kind]

    return get


def pixels(kind, number=6):
    shape = network(kind)[0].image_shape
    return np.random.default_rng(3).integers(256, size=(number, *shape)).astype(np.uint8)


@EACH_KIND
def test_every_tensor_is_that_of_the_integer_engine(kind, exported):
    net, found = TorchRunner(exported(kind)).net, integer_model(kind)
    images = pixels(kind)
    run = jax.jit(lambda x, p: tensors(found, normalize(x, found.mean, found.std), p))
    planes = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
    for policy in policies(kind, 2):
        wanted = run(images, policy)
        net.set_policy(policy.tolist())
        with torch.no_grad():
            made = net.tensors(planes)
        for node in found.graph:
            for name in node.outputs:
                ours = made[name].numpy()
                ours = ours.transpose(0, 2, 3, 1) if ours.ndim == 4 else ours
                np.testing.assert_allclose(ours, wanted[name], rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.skipif(
    os.environ.get("JAX_DISABLE_MOST_OPTIMIZATIONS") == "1",
    reason="rounds as PyTorch does where the compiler optimises: make test-all",
)
def test_int8_ends_leave_nothing_to_round_differently(exported):
    net, found = TorchRunner(exported("int8 ends")).net, integer_model("int8 ends")
    images, policy = pixels("int8 ends", 50), policies("int8 ends")[-1]
    run = jax.jit(lambda x, p: tensors(found, normalize(x, found.mean, found.std), p))
    wanted = run(images, policy)
    net.set_policy(policy.tolist())
    with torch.no_grad():
        made = net.tensors(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
    for node in found.graph[:-1]:
        ours = made[node.outputs[0]].numpy().transpose(0, 2, 3, 1)
        np.testing.assert_array_equal(ours, wanted[node.outputs[0]])


def test_policies_are_set_in_three_ways(exported):
    net = TorchRunner(exported("resnet8")).net
    assert net.policy == (4,) * 6
    net.set_policy(3)
    assert net.policy == (3,) * 6
    net.set_policy({"stage2.block1.conv1": 2})
    assert net.policy == (3, 3, 2, 3, 3, 3)
    net.set_policy([2, 3, 4, 2, 3, 4])
    assert net.policy == (2, 3, 4, 2, 3, 4)


@pytest.mark.parametrize(
    ("policy", "says"),
    [
        (5, "stage1.block1.conv1: 5 bits; choose from"),
        ([2, 3], "2 widths for 6 layers"),
        ({"stage9": 2}, "no layer 'stage9'"),
    ],
)
def test_bad_policies_say_what_is_wrong_and_change_nothing(exported, policy, says):
    net = TorchRunner(exported("resnet8")).net
    with pytest.raises(ValueError, match=says):
        net.set_policy(policy)
    assert net.policy == (4,) * 6


def test_pairs_never_visited_are_refused(exported):
    net = TorchRunner(exported("resnet8")).net
    net.layers[1].conv.count[0, 2] = 0
    with pytest.raises(ValueError, match="conv2: 4 bits after 2 was never visited"):
        net.set_policy([2, 4, 4, 4, 4, 4])


def test_images_of_another_shape_are_refused(exported):
    net = TorchRunner(exported("resnet8")).net
    with pytest.raises(ValueError, match=r"\[N, 1, 8, 8\]"):
        net(torch.zeros(1, 8, 8, 1))


def test_quantised_weights_are_int8_alone():
    state = state_dict(integer_model("resnet18"))
    floats = [name for name, array in state.items() if array.dtype == np.float32]
    assert floats
    assert all(
        name.endswith((".multiplier", ".offset", ".step", "stem.kernel", "head_kernel", "_bias"))
        for name in floats
    )
    assert sum(name.endswith(".codes") for name in state) == 5


def test_the_module_stands_on_its_own(exported):
    code = (
        "import sys, torch; sys.modules['bitmixer_jax'] = None; sys.modules['jax'] = None\n"
        "from model import load\n"
        "net = load('.'); net.set_policy(2); print(tuple(net(torch.zeros(2, 1, 8, 8)).shape))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=exported("resnet8"),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "(2, 3)"


def test_a_folder_that_is_there_is_left_alone(exported):
    folder = exported("resnet8")
    with refused("not-writable", folder):
        export_pytorch(integer_model("resnet8"), folder)
