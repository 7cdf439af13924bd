"""Float ResNets in torchvision's layout: the same logits here, and a start for training."""

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

import bitmixer_jax as bm
from bitmixer_jax import data
from bitmixer_jax.errors import UserError
from bitmixer_jax.training.config import read
from bitmixer_jax.training.plan import initial_state, make_plan
from bitmixer_jax.training.torchvision import load_torchvision

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
        ("resnet50", (3, 4, 6, 3), True),
    ],
)
def test_the_float_twin_gives_the_logits_of_the_torch_network(name, sizes, bottleneck, tmp_path):
    network, model = torch_network(sizes, bottleneck), ours(name)
    torch.save({"state_dict": network.state_dict()}, tmp_path / "net.pth")
    x = np.random.default_rng(0).normal(size=(2, 40, 40, 3)).astype(np.float32)
    with torch.no_grad():
        wanted = network(torch.from_numpy(x.transpose(0, 3, 1, 2))).numpy()
    twin = model.float_twin()
    for path in (tmp_path / "net.pth", saved(network, tmp_path / "net.safetensors")):
        variables = load_torchvision(path, model)
        found = jax.jit(lambda v: twin.apply(v, x, bits=None, train=False))(variables)
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())


def test_the_variables_are_those_of_the_twin_and_no_more(tmp_path):
    model = ours("resnet18")
    found = load_torchvision(saved(torch_network(), tmp_path / "net.safetensors"), model)
    wanted = jax.eval_shape(
        lambda: model.float_twin().init(
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
    state = initial_state(make_plan(run, model, len(digits)), digits)
    source = load_torchvision(path, model)
    for name in ("stem", "stage1.block1.conv1", "stage4.block2.conv2"):
        kernel = state.params[name]["conv"]["kernel"]
        np.testing.assert_array_equal(kernel, source["params"][name]["conv"]["kernel"])
        norm = state.batch_stats[name]["conv_norm"]["mean"]
        wanted = source["batch_stats"][name]["conv_norm"]["mean"]
        np.testing.assert_array_equal(norm, np.broadcast_to(wanted, norm.shape))
    assert run.is_float or (state.params["stage1.block1.conv1"]["conv"]["step"] > 0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("layer2.0.bn1.weight"), "holds no layer2.0.bn1.weight"),
        (lambda t: t.update({"layer1.2.conv1.weight": np.ones(3)}), "1 tensors have no place"),
        (lambda t: t.update({"fc.bias": np.ones(7, np.float32)}), r"fc.bias is \[7\].*\[5\]"),
    ],
)
def test_other_networks_are_refused(change, message, tmp_path):
    tensors = {k: v.detach().numpy() for k, v in torch_network().state_dict().items()}
    change(tensors)
    save_file(tensors, tmp_path / "net.safetensors")
    with pytest.raises(UserError, match=message):
        load_torchvision(tmp_path / "net.safetensors", ours("resnet18"))


def test_other_families_and_files_are_refused(tmp_path):
    path = tmp_path / "net.pth"
    with pytest.raises(UserError, match="cannot be read"):
        load_torchvision(path, ours("resnet18"))
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match="not a state_dict"):
        load_torchvision(path, ours("resnet18"))
    with pytest.raises(UserError, match="only a ResNet"):
        load_torchvision(path, bm.create_model("mobilenetv2", num_classes=5))
    torch.save([1, 2], path)
    with pytest.raises(UserError, match="no state_dict"):
        load_torchvision(path, ours("resnet18"))
    path.rename(tmp_path / "net.safetensors")
    with pytest.raises(UserError, match="safetensors"):
        load_torchvision(tmp_path / "net.safetensors", ours("resnet18"))
