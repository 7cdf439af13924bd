"""Makes a small set of JPEG files that replaces ImageNet in tests, trials and timing.

    python experiments/make_jpegs.py --out data/imagenet --classes 4 --train 64 --validation 16

Writes ``OUT/train/CLASS/*.JPEG`` and ``OUT/val/CLASS/*.JPEG``. A picture is noise with the spectrum
of photographs under a few ellipses. The class sets the hue and the shape of the largest ellipse, so
a network has something to learn. The pictures are no photographs and say nothing about accuracy.
"""

from __future__ import annotations

import argparse
import io
import pathlib

import numpy as np
import PIL.Image
import PIL.ImageDraw

TYPICAL = (500, 375)  # width and height of most ImageNet pictures
QUALITY = 93  # files of 108 kB at that size, ImageNet's average


def picture(
    rng: np.random.Generator, width: int, height: int, label: int = 0, classes: int = 1
) -> np.ndarray:
    """A picture of a class: uint8 ``[height, width, 3]``."""
    scene = PIL.Image.new("HSV", (width, height), (int(rng.integers(256)), 60, 120))
    draw = PIL.ImageDraw.Draw(scene)
    for _ in range(6):
        x, y = rng.uniform(0, width), rng.uniform(0, height)
        a, b = rng.uniform(0.03, 0.2, 2) * min(width, height)
        draw.ellipse((x - a, y - b, x + a, y + b), (*map(int, rng.integers(40, 256, 3)),))
    hue = int(256 * label / classes + rng.uniform(-8, 8)) % 256
    size = 0.35 * min(width, height)
    x, y = rng.uniform(0.35, 0.65) * width, rng.uniform(0.35, 0.65) * height
    box = (x - size, y - size, x + size, y + size)
    (draw.ellipse if label % 2 else draw.rectangle)(box, (hue, 230, 220))
    pixels = np.asarray(scene.convert("RGB"), np.float64)
    return np.clip(pixels + 28 * _noise(rng, height, width), 0, 255).astype(np.uint8)


def _noise(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Noise whose amplitude falls as 1 / frequency: ``[height, width, 3]``, deviation 1."""
    rows, columns = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    falloff = 1 / np.maximum(np.hypot(rows, columns), 1 / max(height, width))
    luma, *chroma = (
        np.fft.irfft2(np.fft.rfft2(rng.standard_normal((height, width))) * falloff, (height, width))
        for _ in range(3)
    )
    planes = [luma / luma.std() + 0.3 * c / c.std() for c in (chroma[0], -chroma[0], chroma[1])]
    return np.stack(planes, axis=-1)


def jpeg(pixels: np.ndarray, quality: int = QUALITY) -> bytes:
    """A picture as a JPEG file, with the colour at half resolution as cameras store it."""
    stream = io.BytesIO()
    PIL.Image.fromarray(pixels).save(stream, "jpeg", quality=quality, subsampling="4:2:0")
    return stream.getvalue()


def make_folder(
    out: pathlib.Path,
    *,
    classes: int = 4,
    train: int = 64,
    validation: int = 16,
    longest: int = 160,
    seed: int = 0,
) -> pathlib.Path:
    """Writes a set of classes ``n0000``, ``n0001``, ...; returns ``out``.

    Args:
      train, validation: pictures of each class.
      longest: pixels of the longer side; the shorter has 60% to 100% of it.
    """
    for number, (split, count) in enumerate((("train", train), ("val", validation))):
        for label in range(classes):
            folder = out / split / f"n{label:04d}"
            folder.mkdir(parents=True)
            for i in range(count):
                rng = np.random.default_rng((seed, number, label, i))
                sides = [longest, int(longest * rng.uniform(0.6, 1))]
                width, height = sides if rng.random() < 0.7 else sides[::-1]
                pixels = picture(rng, width, height, label, classes)
                (folder / f"{folder.name}_{i}.JPEG").write_bytes(jpeg(pixels))
    return out


def main() -> None:
    """Runs from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder to make")
    parser.add_argument("--classes", type=int, default=4)
    parser.add_argument("--train", type=int, default=64, help="pictures of each class")
    parser.add_argument("--validation", type=int, default=16, help="pictures of each class")
    parser.add_argument("--longest", type=int, default=160, help="pixels of the longer side")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if (given.out / "train").exists() or (given.out / "val").exists():
        raise SystemExit(f"--out {given.out}: there is a set already; name another folder")
    make_folder(**vars(given))


if __name__ == "__main__":
    main()
