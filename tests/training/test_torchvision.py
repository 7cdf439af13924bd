"""Float ResNets in torchvision's layout: the same logits here, and a start for training."""

import os
import zipfile

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

import bitmixer_jax as bm
from bitmixer_jax import data
from bitmixer_jax.errors import UserError
from bitmixer_jax.training.config import read
from bitmixer_jax.training.initial import initial_state
from bitmixer_jax.training.schedule import make_schedule
from bitmixer_jax.training.torchvision import load_torchvision
from tests.refusals import refused

torch = pytest.importorskip("torch")
nn = torch.nn


def conv_bn(inputs, outputs, size, stride):
    conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)
    return conv, nn.BatchNorm2d(outputs)


class Block(nn.Module):
    """A residual block with torchvision's names; three convolutions make a bottleneck."""

    def __init__(self, inputs, inner, stride, bottleneck):
        super().__init__()
        sizes = [(1, 1), (3, stride), (1, 1)] if bottleneck else [(3, stride), (3, 1)]
        outputs = inner * 4 if bottleneck else inner
        features = [inputs] + [inner] * (len(sizes) - 1) + [outputs]
        self.depth = len(sizes)
        for i, (size, step) in enumerate(sizes):
            conv, norm = conv_bn(features[i], features[i + 1], size, step)
            setattr(self, f"conv{i + 1}", conv)
            setattr(self, f"bn{i + 1}", norm)
        if stride > 1 or inputs != outputs:
            self.downsample = nn.Sequential(*conv_bn(inputs, outputs, 1, stride))

    def forward(self, x):
        y = x
        for i in range(1, self.depth + 1):
            y = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(y))
            y = y.relu() if i < self.depth else y
        return (y + (self.downsample(x) if hasattr(self, "downsample") else x)).relu()


class TorchResNet(nn.Module):
    def __init__(self, sizes, width, bottleneck, classes, channels):
        super().__init__()
        self.conv1, self.bn1 = conv_bn(channels, width, 7, 2)
        self.pool = nn.MaxPool2d(3, 2, 1)
        channels = width
        for stage, size in enumerate(sizes):
            blocks = []
            for i in range(size):
                inner = width * 2**stage
                blocks.append(Block(channels, inner, 1 + (stage > 0 and i == 0), bottleneck))
                channels = inner * 4 if bottleneck else inner
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        self.fc = nn.Linear(channels, classes)

    def forward(self, x):
        x = self.pool(self.bn1(self.conv1(x)).relu())
        for stage in range(1, 5):
            x = getattr(self, f"layer{stage}")(x)
        return self.fc(x.mean((2, 3)))


def torch_network(sizes=(2, 2, 2, 2), bottleneck=False, classes=5, channels=3):
    torch.manual_seed(0)
    network = TorchResNet(sizes, 4, bottleneck, classes, channels).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for values in (module.weight, module.bias, module.running_mean, module.running_var):
                nn.init.uniform_(values, 0.5, 1.0)
    return network


def ours(name, classes=5, image=40):
    return bm.create_model(name, num_classes=classes, width=4, image_shape=(image, image, 3))


def saved(network, path):
    save_file({k: v.detach().numpy() for k, v in network.state_dict().items()}, path)
    return path


@pytest.mark.parametrize(
    ("name", "sizes", "bottleneck"),
    [
        ("resnet18", (2, 2, 2, 2), False),
        pytest.param("resnet34", (3, 4, 6, 3), False, marks=pytest.mark.slow),
        pytest.param("resnet50", (3, 4, 6, 3), True, marks=pytest.mark.slow),
    ],
)
def test_the_baseline_gives_the_logits_of_the_torch_network(name, sizes, bottleneck, tmp_path):
    network, model = torch_network(sizes, bottleneck), ours(name)
    torch.save({"state_dict": network.state_dict()}, tmp_path / "net.pth")
    x = np.random.default_rng(0).normal(size=(2, 40, 40, 3)).astype(np.float32)
    with torch.no_grad():
        wanted = network(torch.from_numpy(x.transpose(0, 3, 1, 2))).numpy()
    baseline = model.baseline()
    for path in (tmp_path / "net.pth", saved(network, tmp_path / "net.safetensors")):
        variables = load_torchvision(path, model)
        found = jax.jit(lambda v: baseline.apply(v, x, bits=None, train=False))(variables)
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())


def test_the_variables_are_those_of_the_baseline_and_no_more(tmp_path):
    model = ours("resnet18")
    found = load_torchvision(saved(torch_network(), tmp_path / "net.safetensors"), model)
    wanted = jax.eval_shape(
        lambda: model.baseline().init(
            jax.random.key(0), np.zeros((1, 40, 40, 3), np.float32), bits=None, train=False
        )
    )
    assert jax.tree.map(lambda x: (x.shape, x.dtype), found) == jax.tree.map(
        lambda x: (x.shape, x.dtype), dict(wanted)
    )


@pytest.mark.parametrize("variant", ["", "float"])
def test_a_run_starts_from_a_file(variant, tiny, tmp_path):
    path = saved(torch_network(classes=10, channels=1), tmp_path / "net.safetensors")
    settings = ["model.name=resnet18", "model.width=4", f"init_from={path}"]
    run = read(tiny(*settings, variant=variant))
    digits = data.load("digits", run.train_split)
    model = run.build(10, (8, 8, 1))
    state = initial_state(make_schedule(run, model, len(digits)), digits)
    source = load_torchvision(path, model)
    for name in ("stem", "stage1.block1.conv1", "stage4.block2.conv2"):
        kernel = state.params[name]["conv"]["kernel"]
        np.testing.assert_array_equal(kernel, source["params"][name]["conv"]["kernel"])
        norm = state.batch_stats[name]["conv_norm"]["mean"]
        wanted = source["batch_stats"][name]["conv_norm"]["mean"]
        np.testing.assert_array_equal(norm, np.broadcast_to(wanted, norm.shape))
    assert run.is_baseline or (state.params["stage1.block1.conv1"]["conv"]["step"] > 0).all()


@pytest.mark.parametrize(
    ("change", "mentions"),
    [
        (lambda t: t.pop("layer2.0.bn1.weight"), ("layer2.0.bn1.weight",)),
        (
            lambda t: t.update({"layer1.2.conv1.weight": np.ones(3)}),
            ("1 tensors", "layer1.2.conv1.weight"),
        ),
        (lambda t: t.update({"fc.bias": np.ones(7, np.float32)}), ("fc.bias", [7], [5])),
    ],
)
def test_other_networks_are_refused(change, mentions, tmp_path):
    tensors = {k: v.detach().numpy() for k, v in torch_network().state_dict().items()}
    change(tensors)
    save_file(tensors, tmp_path / "net.safetensors")
    with refused("other-network", tmp_path / "net.safetensors", *mentions):
        load_torchvision(tmp_path / "net.safetensors", ours("resnet18"))


def test_other_families_and_files_are_refused(tmp_path):
    path = tmp_path / "net.pth"
    with refused("not-readable", path):
        load_torchvision(path, ours("resnet18"))
    path.write_bytes(b"nothing of the kind")
    with refused("wrong-format", path):
        load_torchvision(path, ours("resnet18"))
    with refused("conflict", path):
        load_torchvision(path, bm.create_model("mobilenetv2", num_classes=5))
    torch.save([1, 2], path)
    with refused("wrong-format", path):
        load_torchvision(path, ours("resnet18"))
    path.rename(tmp_path / "net.safetensors")
    with refused("wrong-format", tmp_path / "net.safetensors"):
        load_torchvision(tmp_path / "net.safetensors", ours("resnet18"))


# --- types, prefixes, damage ---


@pytest.fixture(scope="module")
def state():
    """State of a network, and the variables made of it."""
    return torch_network().state_dict()


def flat(variables):
    return {jax.tree_util.keystr(k): v for k, v in jax.tree_util.tree_leaves_with_path(variables)}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    "prefix", ["", "module.", "_orig_mod.", "_orig_mod.module.", "module._orig_mod."]
)
def test_types_and_prefixes_are_read_from_either_file(dtype, prefix, state, tmp_path):
    from safetensors.torch import save_file as save_torch

    model = ours("resnet18")
    given = {
        prefix + name: value.to(dtype) if value.is_floating_point() else value
        for name, value in state.items()
    }
    save_torch(given, tmp_path / "net.safetensors")
    torch.save({"model": given, "epoch": 3}, tmp_path / "net.pth")
    wanted = state["layer1.0.conv1.weight"].to(dtype).float().numpy().transpose(2, 3, 1, 0)
    first, second = (
        flat(load_torchvision(tmp_path / name, model)) for name in ("net.safetensors", "net.pth")
    )
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[key], second[key]) for key in first)
    assert {value.dtype.name for value in first.values()} == {"float32", "int32"}
    assert any(np.array_equal(value, wanted) for value in first.values())


NAME = "layer1.0.conv1.weight"
CHANGES = {
    "whole numbers": ("wrong-format", lambda t: t.long()),
    "complex": ("wrong-format", lambda t: t.to(torch.complex64)),
    "sparse": ("wrong-format", lambda t: t.to_sparse()),
    "quantised": ("wrong-format", lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8)),
    "not finite": ("not-finite", lambda t: t * float("nan")),
    "too large": ("not-finite", lambda t: t.double() * 1e300),
    "huge": ("other-network", lambda t: torch.zeros(1).expand(2**40)),
    "flat": ("other-network", lambda t: t.flatten()),
    "no tensor": ("wrong-format", lambda t: 3),
    "8 bits": ("wrong-format", lambda t: t.to(torch.float8_e4m3fn)),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("code", "change"), CHANGES.values(), ids=CHANGES)
def test_tensors_that_are_no_weights_are_one_line(code, change, state, tmp_path):
    torch.save({**state, NAME: change(state[NAME])}, tmp_path / "net.pth")
    check_refused(tmp_path / "net.pth", code)


def check_refused(path, code):
    with refused(code, path):
        load_torchvision(path, ours("resnet18"))


def test_other_safetensors_types_are_one_line(state, tmp_path):
    from safetensors.torch import save_file as save_torch

    for kind in (torch.int64, torch.float8_e4m3fn, torch.bool):
        save_torch({**state, NAME: state[NAME].to(kind)}, tmp_path / "net.safetensors")
        check_refused(tmp_path / "net.safetensors", "wrong-format")
    (tmp_path / "net.safetensors").write_bytes(b"\xff" * 8 + b"{}")
    check_refused(tmp_path / "net.safetensors", "wrong-format")


def test_one_tensor_under_two_names_is_refused(state, tmp_path):
    torch.save({**state, f"module.{NAME}": state[NAME]}, tmp_path / "net.pth")
    with refused("other-network", NAME):
        load_torchvision(tmp_path / "net.pth", ours("resnet18"))
    torch.save({3: state[NAME]}, tmp_path / "net.pth")
    check_refused(tmp_path / "net.pth", "wrong-format")


def test_an_archive_is_not_unpacked_to_more_than_it_is(state, tmp_path):
    torch.save(state, tmp_path / "net.pth")
    with zipfile.ZipFile(tmp_path / "net.pth") as file:
        parts = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in parts.items():
            file.writestr(name, bytes(10**6) if "/data/" in name else content)
    with refused("damaged", tmp_path / "bomb.pth"):
        load_torchvision(tmp_path / "bomb.pth", ours("resnet18"))


def test_damage_is_one_line_or_other_numbers(state, tmp_path):
    rng, model, said = np.random.default_rng(0), ours("resnet18"), []
    torch.save(state, tmp_path / "whole.pth")
    saved(torch_network(), tmp_path / "whole.safetensors")
    for name in ("whole.pth", "whole.safetensors"):
        whole, bad = (tmp_path / name).read_bytes(), tmp_path / name.replace("whole", "bad")
        for number in range(60):
            # Among the names and sizes, which are at the start and at the end.
            place = int(rng.integers(min(len(whole), 9000))) * (-1 if number % 2 else 1)
            changed = bytearray(whole)
            changed[place] = int(rng.integers(256))
            bad.write_bytes(changed)
            try:
                load_torchvision(bad, model)
            except UserError as error:
                said.append(str(error).splitlines())
    assert said
    assert {len(lines) for lines in said} == {1}


def test_places_that_hold_no_file_are_one_line(tmp_path):
    for name in ("pipe.pth", "pipe.safetensors"):
        os.mkfifo(tmp_path / name)
        check_refused(tmp_path / name, "not-readable")
    for place in (tmp_path, "/dev/zero", tmp_path / ("x" * 300)):
        check_refused(place, "not-readable")
    with refused("bad-path", ".pth"):
        load_torchvision("net\0.pth", ours("resnet18"))
