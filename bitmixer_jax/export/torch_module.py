"""A switchable network in plain PyTorch: one set of integer weights, any layer at any width.

This file stands on its own: it needs torch and safetensors, and the weights.safetensors beside it.

    from model import load
    net = load(".")
    net.set_policy(3)                              # all layers at 3 bits
    net.set_policy([4, 3, 2, 2, 3, 4])             # a width for each of net.layer_names
    net.set_policy({"stage3.block1.conv1": 2})     # some layers; the others stay
    logits = net(images)                           # uint8 or float [N, C, H, W] in 0..255

A layer quantises its input, convolves whole numbers with whole numbers (exact in float32), and
applies the folded batch norm of its pair of widths (predecessor, own), which rounds once.

net.half(), .bfloat16(), .double() and autocast do not change the types of its numbers or its
answers: logits are always float32. It runs on any device and in any memory format (channels_last).
"""

import json
import operator
import pathlib

import torch
import torch.nn.functional as F
from torch import nn


def load(folder="."):
    """Loads the network in ``folder`` and sets all layers to the widest width."""
    from safetensors import safe_open

    path = pathlib.Path(folder) / "weights.safetensors"
    with safe_open(path, framework="pt") as file:
        description = json.loads(file.metadata()["description"])
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    net = SwitchableNetwork(description)
    net.load_state_dict(state)
    return net.eval()


def levels(bits, signed):
    """Returns the smallest and the largest code of a width."""
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


def once(multiplier, sums, offset):
    """Returns multiplier * sums + offset, rounded once."""
    return (multiplier.double() * sums.double() + offset.double()).float()


def plain(value):
    """Turns arrays and tensors of any kind into Python's numbers and lists."""
    return value.tolist() if hasattr(value, "tolist") else value


def whole(value):
    """Returns a width as an int; raises ValueError if it is not a whole number."""
    value = plain(value)
    if not isinstance(value, bool):
        try:
            return operator.index(value)
        except TypeError:
            pass
    raise ValueError(f"{value!r} is no width; give a whole number of bits")


class Kernel(nn.Module):
    """A convolution of whole numbers.

    Buffers: codes int8 [S, O, I, kh, kw], S = 1 if one set of integers serves all widths;
    multiplier and offset float32 [P, n, O]; count int32 [P, n], training steps that used each pair.
    """

    def __init__(self, info, choices, rows, kind):
        super().__init__()
        _, (kh, kw, c_in, c_out), self.strides, self.padding, self.groups = info
        self.choices, self.kind = choices, kind
        n, sets = len(choices), len(choices) if kind == "independent" else 1
        self.register_buffer("codes", torch.zeros(sets, c_out, c_in, kh, kw, dtype=torch.int8))
        for name in ("multiplier", "offset"):
            self.register_buffer(name, torch.zeros(rows, n, c_out, dtype=torch.float32))
        self.register_buffer("count", torch.zeros(rows, n, dtype=torch.int32))

    def weight(self, own):
        """Returns weights float32 [O, I, kh, kw] at a width: whole numbers or halves."""
        if self.kind == "independent":
            return self.codes[own].float()
        widest, bits = self.choices[-1], self.choices[own]
        codes, shift = self.codes[0].int(), widest - bits
        if self.kind == "floor":
            return (codes >> shift).float() + 0.5
        return ((codes + ((1 << shift) >> 1)) >> shift).clamp(max=2 ** (bits - 1) - 1).float()

    def forward(self, codes, predecessor, own):
        """Returns real values [N, O, H', W'] of codes [N, I * groups, H, W]."""
        (top, bottom), (left, right) = self.padding
        codes = F.pad(codes, (left, right, top, bottom))
        sums = F.conv2d(codes, self.weight(own), stride=self.strides, groups=self.groups)
        row = predecessor if len(self.count) > 1 else 0
        shape = (1, -1, 1, 1)
        multiplier, offset = self.multiplier[row, own], self.offset[row, own]
        return once(multiplier.view(shape), sums, offset.view(shape))


class Layer(nn.Module):
    """A quantised layer: its input is quantised once, and each kernel reads the codes.

    Buffer: step float32 [n], the step size of the input at each width.
    """

    def __init__(self, info, choices, transitional, kind):
        super().__init__()
        self.name, self.predecessor, self.signed = info["name"], info["previous"], info["signed"]
        self.choices = choices
        rows = len(choices) if transitional and self.predecessor >= 0 else 1
        self.register_buffer("step", torch.ones(len(choices), dtype=torch.float32))
        self.kernels = [kernel[0] for kernel in info["kernels"]]
        for kernel in info["kernels"]:
            self.add_module(kernel[0], Kernel(kernel, choices, rows, kind))

    def forward(self, x, predecessor, own):
        """Returns a tuple of one output for each kernel."""
        low, high = levels(self.choices[own], self.signed)
        codes = torch.round(x * (1 / self.step[own])).clamp(low, high)
        return tuple(getattr(self, name)(codes, predecessor, own) for name in self.kernels)


class FloatStem(nn.Module):
    """The real-valued first convolution. Buffers: kernel [O, I, kh, kw], multiplier, offset [O]."""

    def __init__(self, info):
        super().__init__()
        _, (kh, kw, c_in, c_out), self.strides, self.padding, self.groups = info
        self.register_buffer("kernel", torch.zeros(c_out, c_in, kh, kw, dtype=torch.float32))
        for name in ("multiplier", "offset"):
            self.register_buffer(name, torch.zeros(c_out, dtype=torch.float32))

    def forward(self, x):
        """Returns [N, O, H', W'] of normalised images."""
        (top, bottom), (left, right) = self.padding
        x = F.pad(x, (left, right, top, bottom)).double()
        sums = F.conv2d(x, self.kernel.double(), stride=self.strides, groups=self.groups).float()
        return once(self.multiplier.view(1, -1, 1, 1), sums, self.offset.view(1, -1, 1, 1))


class SwitchableNetwork(nn.Module):
    """The network that ``description`` describes; see the top of the file.

    Attributes:
      choices: widths that a layer may take.
      layer_names: in the order of a policy.
      classes: names of the classes.
    """

    def __init__(self, description):
        super().__init__()
        self.choices = tuple(description["choices"])
        self.classes = tuple(description["classes"])
        self.graph = description["graph"]
        self.image_shape = tuple(description["image_shape"])  # H, W, C
        transitional = description["norm"] == "transitional"
        self.layers = nn.ModuleList(
            Layer(info, self.choices, transitional, description["weight_kind"])
            for info in description["layers"]
        )
        self.layer_names = tuple(layer.name for layer in self.layers)
        features, classes = description["features"], len(self.classes)
        self.real_first_last = description["ends"] == "float"
        if self.real_first_last:
            self.stem = FloatStem(description["stem"])
        else:
            stem = {"name": "stem", "previous": -1, "signed": True}
            stem["kernels"] = [description["stem"]]
            self.stem = Layer(stem, (8,), False, "independent")
            self.register_buffer("head_steps", torch.ones(2, dtype=torch.float32))
        dtype = torch.float32 if self.real_first_last else torch.int8
        self.register_buffer("head_kernel", torch.zeros(features, classes, dtype=dtype))
        self.register_buffer("head_bias", torch.zeros(classes, dtype=torch.float32))
        for name in ("mean", "std"):
            values = torch.tensor(description[name], dtype=torch.float32)
            self.register_buffer(name, values, persistent=False)
        self._indices = (len(self.choices) - 1,) * len(self.layers)

    def _apply(self, fn, recurse=True):
        """Moves buffers to a device or memory format, as PyTorch asks, but keeps their types.

        With multipliers of 16 bits it would be another network.
        """

        def move(tensor):
            # Memory formats have four dimensions: codes [S, O, I, kh, kw] become S * O kernels.
            moved = fn(tensor.flatten(0, 1)) if tensor.dim() == 5 else fn(tensor)
            if moved.dtype != tensor.dtype:
                return tensor.to(moved.device)
            return moved.unflatten(0, tensor.shape[:2]) if tensor.dim() == 5 else moved

        return super()._apply(move, recurse)

    @property
    def policy(self):
        """The current width of each layer."""
        return tuple(self.choices[i] for i in self._indices)

    def set_policy(self, widths):
        """Sets the widths: one for all layers, one for each, or a dict of those that change.

        Widths are whole numbers of Python, numpy or PyTorch; a sequence of them may be a tensor.

        Raises:
          ValueError: an unknown layer or width, the wrong number of widths, a width that is not a
            whole number, or a pair of widths that training never used: its batch norm is unknown.
        """
        widths = plain(widths)
        if isinstance(widths, int):
            widths = [widths] * len(self.layers)
        if isinstance(widths, dict):
            for name in widths:
                if name not in self.layer_names:
                    raise ValueError(f"no layer {name!r}; they are {', '.join(self.layer_names)}")
            now = dict(zip(self.layer_names, self.policy, strict=True))
            widths = list({**now, **widths}.values())
        if not isinstance(widths, list | tuple):
            raise ValueError(f"{type(widths).__name__}: give a whole number, a list or a dict")
        widths = [whole(width) for width in widths]
        if len(widths) != len(self.layers):
            raise ValueError(f"{len(widths)} widths for {len(self.layers)} layers")
        for name, width in zip(self.layer_names, widths, strict=True):
            if width not in self.choices:
                raise ValueError(f"{name}: {width} bits; choose from {self.choices}")
        indices = tuple(self.choices.index(width) for width in widths)
        for layer, own in zip(self.layers, indices, strict=True):
            for name in layer.kernels:
                count = getattr(layer, name).count
                row = indices[layer.predecessor] if len(count) > 1 else 0
                if count[row, own] == 0:
                    raise ValueError(
                        f"{layer.name}: {self.choices[own]} bits after {self.choices[row]} was "
                        "never visited in training"
                    )
        self._indices = indices

    def forward(self, images):
        """Returns logits float32 [N, K] of images uint8 or float [N, C, H, W] in 0..255."""
        return self.tensors(images)[self.graph[-1][2][0]]

    def tensors(self, images):
        """Returns every tensor of the network by name; the last node gives the logits."""
        # Autocast would sum whole numbers in 16 bits.
        with torch.autocast(images.device.type, enabled=False):
            return self._tensors(images)

    def _tensors(self, images):
        height, width, channels = self.image_shape
        if images.shape[1:] != (channels, height, width):
            raise ValueError(f"images: {tuple(images.shape)}; [N, {channels}, {height}, {width}]")
        shape = (1, -1, 1, 1)
        x = (images.float() - self.mean.view(shape)) * (1 / self.std).view(shape)
        values = {"images": x}
        place = {name: i for i, name in enumerate(self.layer_names)}
        for op, inputs, outputs, *extra in self.graph:
            x, *more = (values[name] for name in inputs)
            if op == "stem":
                made = self.stem(x) if self.real_first_last else self.stem(x, 0, 0)
            elif op == "layer":
                i = place[extra[0]]
                layer = self.layers[i]
                predecessor = self._indices[layer.predecessor] if layer.predecessor >= 0 else 0
                made = layer(x, predecessor, self._indices[i])
            elif op == "relu":
                made = F.relu(x)
            elif op == "relu6":
                made = F.relu6(x)
            elif op == "max_pool":
                made = F.max_pool2d(x, 3, 2, 1)
            elif op == "shortcut":
                stride, channels = extra[0]
                x = x[:, :, ::stride, ::stride]
                made = F.pad(x, (0, 0, 0, 0, 0, channels - x.shape[1]))
            elif op == "add":
                made = x + more[0]
            else:
                made = self.head(x)
            values.update(zip(outputs, made if isinstance(made, tuple) else (made,), strict=True))
        return values

    def head(self, x):
        """Returns the logits of the last tensor."""
        pooled = x.mean((2, 3))
        if self.real_first_last:
            return pooled @ self.head_kernel + self.head_bias
        low, high = levels(8, False)
        codes = torch.round(pooled * (1 / self.head_steps[0])).clamp(low, high)
        return (self.head_steps[0] * self.head_steps[1]) * (
            codes @ self.head_kernel.float()
        ) + self.head_bias
