"""The method in plain numpy, written from its formulas: what the library is held against.

Notation as in docs: w weights, v anything quantised, s step size, b bits, h the widest choice,
d = h - b, u = v / (step in use). Nothing here imports the library.
"""

import numpy as np

SPACES = ((2, 3, 4), (2, 4, 8), (3, 5), (4,), (2, 3, 4, 5, 6, 7, 8))
WEIGHT_QUANTIZERS = ("floor", "double", "independent")


def limits(bits, signed):
    """Qn and Qp."""
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


def whole_codes(kind, v, s, bits, widest, signed=True):
    """Integer codes of v; s is the shared step of the nested kinds, else that of the width."""
    d = widest - bits
    qn, qp = limits(bits, signed)
    if kind == "floor":
        return np.clip(np.floor(v / (s * np.float32(2**d))), qn, qp).astype(np.int64)
    if kind == "double":
        of_widest = np.clip(np.rint(v / s), *limits(widest, signed)).astype(np.int64)
        rounded = (of_widest + 2 ** (d - 1)) >> d if d else of_widest
        return np.clip(rounded, qn, qp)
    return np.clip(np.rint(v / s), qn, qp).astype(np.int64)


def pitch(kind, s, bits, widest):
    """The step that multiplies the codes."""
    return s if kind == "independent" else s * np.float32(2 ** (widest - bits))


def codes(kind, v, s, bits, widest, signed=True):
    """Codes as a product uses them: floor codes sit in the middle of their interval."""
    whole = whole_codes(kind, v, s, bits, widest, signed)
    return whole + 0.5 if kind == "floor" else whole.astype(np.float64)


def gradients(kind, v, s, bits, widest, upstream, elements, signed=True):
    """LSQ's gradients of sum(upstream * code * step) with respect to v and the stored step.

    Inside the clip the code follows u; at and beyond its ends (strict inequalities) it does not.
    The step's is scaled by 1 / sqrt(N Qp), and for a shared step s by 2^-d on top, so that s
    moves as much in proportion as the step in use would: g 2^-d dL / d(s 2^d).
    """
    v, upstream = v.astype(np.float64), upstream.astype(np.float64)
    step = float(pitch(kind, s, bits, widest))
    qn, qp = limits(bits, signed)
    u = v / step
    inside = (qn < u) & (u < (qp + 1 if kind == "floor" else qp))
    code = codes(kind, v.astype(np.float32), s, bits, widest, signed)
    of_step = np.sum(upstream * np.where(inside, code - u, code))
    balance = 1 if kind == "independent" else 2.0 ** (bits - widest)
    return upstream * inside, balance * of_step / np.sqrt(elements * qp)


def convolve(x, kernel, stride=1):
    """Convolution [N, H, W, C] with [kh, kw, C, F], padded by (kh - 1) / 2, in float64."""
    pad = (kernel.shape[0] - 1) // 2
    padded = np.pad(np.asarray(x, np.float64), ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, kernel.shape[:2], (1, 2))
    windows = windows[:, ::stride, ::stride]
    return np.einsum("nhwcij,ijcf->nhwf", windows, np.asarray(kernel, np.float64))


def relu(x):
    return np.maximum(x, 0)


def normalise(x, params, stats, pair, epsilon=1e-5):
    """Batch norm in evaluation, with the slice ``pair`` of the tables."""
    centred = (x - stats["mean"][pair]) / np.sqrt(stats["var"][pair] + epsilon)
    return params["scale"][pair] * centred + params["bias"][pair]


def resnet8(variables, images, policy, choices, kind):
    """Logits of a resnet8 with float ends in evaluation, each layer at its width of ``policy``."""
    params, stats = variables["params"], variables["batch_stats"]
    widest = choices[-1]

    def branch(layer, kernel, x, stride, pair, bits):
        held, c = params[layer], pair[1]
        x_step = held["input"]["step"][c]
        w_step = held[kernel]["step"][c if kind == "independent" else 0]
        x_codes = codes("independent", x, x_step, bits, widest, signed=False)
        w_codes = codes(kind, held[kernel]["kernel"], w_step, bits, widest)
        y = convolve(x_codes, w_codes, stride) * float(x_step)
        y = y * float(pitch(kind, w_step, bits, widest))
        norm = f"{kernel}_norm"
        return normalise(y, held[norm], stats[layer][norm], pair)

    stem = convolve(images, params["stem"]["conv"]["kernel"])
    x = relu(normalise(stem, params["stem"]["conv_norm"], stats["stem"]["conv_norm"], (0, 0)))
    before = 0
    widths = iter(policy)
    for stage in (1, 2, 3):
        stride = 1 if stage == 1 else 2
        first, second = f"stage{stage}.block1.conv1", f"stage{stage}.block1.conv2"
        bits = next(widths)
        pair = (before, choices.index(bits))
        y = relu(branch(first, "conv", x, stride, pair, bits))
        if "shortcut" in params[first]:
            short = branch(first, "shortcut", x, stride, pair, bits)
        else:
            short = x[:, ::stride, ::stride]
            missing = y.shape[-1] - short.shape[-1]
            short = np.pad(short, ((0, 0), (0, 0), (0, 0), (0, missing)))
        bits = next(widths)
        pair = (pair[1], choices.index(bits))
        x = relu(branch(second, "conv", y, 1, pair, bits) + short)
        before = pair[1]
    return x.mean((1, 2)) @ params["head"]["kernel"] + params["head"]["bias"]
