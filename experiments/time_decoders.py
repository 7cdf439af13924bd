"""Times JPEG decoders on one core: from the bytes of a file to a crop of 224 x 224.

    python experiments/time_decoders.py --out experiments/results/decoders --jpegs 200 --rounds 5

The script makes the pictures (make_jpegs.py: 500 x 375, 108 kB, ImageNet's average). They are no
photographs, but cost a decoder what files of that size cost. Decoders take turns within each round,
so that ratios hold on a busy machine. The best round of each decoder counts. Decoders that are not
installed are left out:

    pip install simplejpeg PyTurboJPEG opencv-python-headless pyvips pyvips-binary
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import io
import json
import os
import pathlib
import platform
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import PIL.Image
from make_jpegs import TYPICAL, jpeg, picture

SIZE = 224
Box = tuple[float, float, float, float]  # left, upper, right, lower
Decoder = Callable[[bytes, Box], np.ndarray]


def _resize(image: PIL.Image.Image, box: Box) -> np.ndarray:
    return np.asarray(image.resize((SIZE, SIZE), PIL.Image.Resampling.BILINEAR, box=box))


def _factor(box: Box) -> float:
    """By how much the crop is larger than what it becomes: a decoder may shrink so far."""
    return max(1.0, min(box[2] - box[0], box[3] - box[1]) / SIZE)


def pil() -> Decoder:
    def decode(data: bytes, box: Box) -> np.ndarray:
        return _resize(PIL.Image.open(io.BytesIO(data)).convert("RGB"), box)

    return decode


def pil_draft() -> Decoder:
    def decode(data: bytes, box: Box) -> np.ndarray:
        image = PIL.Image.open(io.BytesIO(data))
        width, height = image.size
        image.draft("RGB", (int(width / _factor(box)), int(height / _factor(box))))
        x, y = image.width / width, image.height / height
        return _resize(image.convert("RGB"), (box[0] * x, box[1] * y, box[2] * x, box[3] * y))

    return decode


def simplejpeg(**how: Any) -> Decoder:
    from simplejpeg import decode_jpeg

    def decode(data: bytes, box: Box) -> np.ndarray:
        return _resize(PIL.Image.fromarray(decode_jpeg(data, **how)), box)

    return decode


def simplejpeg_scaled() -> Decoder:
    from simplejpeg import decode_jpeg, decode_jpeg_header

    def decode(data: bytes, box: Box) -> np.ndarray:
        height, width, *_ = decode_jpeg_header(data)
        pixels = decode_jpeg(
            data, min_height=int(height / _factor(box)), min_width=int(width / _factor(box))
        )
        x, y = pixels.shape[1] / width, pixels.shape[0] / height
        scaled = (box[0] * x, box[1] * y, box[2] * x, box[3] * y)
        return _resize(PIL.Image.fromarray(pixels), scaled)

    return decode


def _cv2_resize(pixels: np.ndarray, box: Box) -> np.ndarray:
    import cv2

    left, upper, right, lower = (round(edge) for edge in box)
    part = pixels[upper:lower, left:right]
    shrinks = min(part.shape[:2]) > SIZE
    return cv2.resize(
        part, (SIZE, SIZE), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    )


def pil_cv2() -> Decoder:
    import cv2

    cv2.setNumThreads(1)
    return lambda data, box: _cv2_resize(
        np.asarray(PIL.Image.open(io.BytesIO(data)).convert("RGB")), box
    )


def simplejpeg_cv2() -> Decoder:
    import cv2
    from simplejpeg import decode_jpeg

    cv2.setNumThreads(1)
    return lambda data, box: _cv2_resize(decode_jpeg(data), box)


def opencv() -> Decoder:
    import cv2

    cv2.setNumThreads(1)

    def decode(data: bytes, box: Box) -> np.ndarray:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
        return _cv2_resize(pixels, box)

    return decode


def turbojpeg() -> Decoder:
    from turbojpeg import TJPF_RGB, TurboJPEG

    library = TurboJPEG(os.environ.get("TURBOJPEG"))  # path of libturbojpeg, if not the system's

    def decode(data: bytes, box: Box) -> np.ndarray:
        return _resize(PIL.Image.fromarray(library.decode(data, pixel_format=TJPF_RGB)), box)

    return decode


def vips() -> Decoder:
    os.environ.setdefault("VIPS_CONCURRENCY", "1")
    import pyvips

    def decode(data: bytes, box: Box) -> np.ndarray:
        left, upper, right, lower = (round(edge) for edge in box)
        image = pyvips.Image.new_from_buffer(data, "")
        part = image.crop(left, upper, right - left, lower - upper)
        return part.thumbnail_image(SIZE, height=SIZE, size="force").numpy()

    return decode


DECODERS: dict[str, tuple[Callable[[], Decoder], tuple[str, ...]]] = {
    "PIL": (pil, ("pillow",)),
    "PIL, draft mode": (pil_draft, ("pillow",)),
    "PIL + OpenCV resize": (pil_cv2, ("pillow", "opencv-python-headless")),
    "simplejpeg": (simplejpeg, ("simplejpeg", "pillow")),
    "simplejpeg, fast": (
        lambda: simplejpeg(fastdct=True, fastupsample=True),
        ("simplejpeg", "pillow"),
    ),
    "simplejpeg, scaled": (simplejpeg_scaled, ("simplejpeg", "pillow")),
    "simplejpeg + OpenCV resize": (
        simplejpeg_cv2,
        ("simplejpeg", "opencv-python-headless"),
    ),
    "OpenCV": (opencv, ("opencv-python-headless",)),
    "PyTurboJPEG": (turbojpeg, ("PyTurboJPEG", "pillow")),
    "pyvips": (vips, ("pyvips", "pyvips-binary")),
}


def boxes(rng: np.random.Generator, width: int, height: int, evaluation: bool) -> Box:
    """The crop of evaluation, or a random one: 8% to 100% of the area, 3:4 to 4:3."""
    if evaluation:
        side = SIZE / 256 * min(width, height)
        left, upper = (width - side) / 2, (height - side) / 2
        return left, upper, left + side, upper + side
    while True:
        area = rng.uniform(0.08, 1) * width * height
        aspect = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = np.sqrt(area * aspect), np.sqrt(area / aspect)
        if w <= width and h <= height:
            left, upper = rng.uniform(0, width - w), rng.uniform(0, height - h)
            return left, upper, left + w, upper + h


def measure(files: list[bytes], rounds: int) -> dict[str, dict[str, float]]:
    """Images per second by decoder and kind of crop, and the deviation of pixels from PIL's."""
    decoders: dict[str, Decoder] = {}
    for name, (make, _) in DECODERS.items():
        try:
            decoders[name] = make()
        except (ImportError, OSError, RuntimeError) as error:
            print(f"{name}: left out ({error})")
    found: dict[str, dict[str, float]] = {name: {} for name in decoders}
    for kind in ("training", "evaluation"):
        rng = np.random.default_rng(1)
        crops = [boxes(rng, *TYPICAL, kind == "evaluation") for _ in files]
        work = list(zip(files, crops, strict=True))
        wanted = [decoders["PIL"](*one).astype(int) for one in work[:20]]
        best = dict.fromkeys(decoders, float("inf"))
        for name, decode in decoders.items():  # warms up, too
            off = [
                np.abs(decode(*one) - want).mean() for one, want in zip(work, wanted, strict=False)
            ]
            found[name][f"{kind}: mean difference from PIL, of 255"] = round(float(np.mean(off)), 2)
        for _ in range(rounds):
            for name, decode in decoders.items():
                start = time.process_time()  # of this process alone: others share the cores
                for one in work:
                    decode(*one)
                best[name] = min(best[name], time.process_time() - start)
        for name, seconds in best.items():
            found[name][f"{kind}: images/s per core"] = round(len(files) / seconds, 1)
    return found


def main() -> None:
    """Runs from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder for results.json")
    parser.add_argument("--jpegs", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    files = [
        jpeg(picture(np.random.default_rng(i), *TYPICAL, i % 10, 10)) for i in range(given.jpegs)
    ]
    packages = {"numpy"}.union(*(needs for _, needs in DECODERS.values()))
    versions = {}
    for package in sorted(packages):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    result = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{os.cpu_count()} CPU cores, one used",
        "python": platform.python_version(),
        "versions": versions,
        "jpegs": given.jpegs,
        "bytes_each": round(float(np.mean([len(data) for data in files]))),
        "size": list(TYPICAL),
        "rounds": given.rounds,
        "decoders": measure(files, given.rounds),
    }
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "results.json").write_text(json.dumps(result, indent=1) + "\n")
    columns = list(next(iter(result["decoders"].values())))
    print("| |", " | ".join(columns), "|")
    print("|---|" + "---|" * len(columns))
    for name, row in result["decoders"].items():
        print(f"| {name} |", " | ".join(str(row[column]) for column in columns), "|")


if __name__ == "__main__":
    main()
