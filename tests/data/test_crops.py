"""Crops: the right part of an image, whatever the kind of its file."""

import io

import numpy as np
import PIL.Image
import pytest

from bitmixer_jax.data.crops import DECODERS, centre_box, random_box, read_crop


def test_random_boxes_lie_inside_and_keep_to_area_and_aspect():
    rng = np.random.default_rng(0)
    for _ in range(300):
        width, height = rng.integers(20, 400, 2)
        left, upper, w, h = random_box(rng, int(width), int(height), 0.25)
        assert left >= 0
        assert upper >= 0
        assert left + w <= width
        assert upper + h <= height
        if max(width, height) < 1.3 * min(width, height):
            assert 0.24 < w * h / (width * height) <= 1
            assert 0.7 < w / h < 1.4


@pytest.mark.parametrize(("width", "height"), [(1000, 10), (10, 1000), (1, 1)])
def test_odd_shapes_get_the_largest_part_of_allowed_aspect(width, height):
    left, upper, w, h = random_box(np.random.default_rng(0), width, height, 0.5)
    assert 0 <= left <= width - w
    assert 0 <= upper <= height - h
    assert 0.7 < w / h < 1.4


def test_centre_box_takes_its_share_of_the_shorter_side():
    assert centre_box(500, 256, 224, 256) == (138, 16, 224, 224)
    assert centre_box(512, 1000, 224, 256) == (32, 276, 448, 448)


def _file(image, form="jpeg", **how):
    stream = io.BytesIO()
    image.save(stream, form, **how)
    return stream.getvalue()


def _whole(width, height):
    return 0, 0, width, height


@pytest.fixture(params=DECODERS)
def decoder(request):
    if request.param == "turbo":
        pytest.importorskip("simplejpeg")
        pytest.importorskip("cv2")
    return request.param


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "PNG", "PNG with palette"])
def test_every_kind_of_file_becomes_rgb(jpegs, mode, decoder):
    pixels = jpegs.picture(np.random.default_rng(3), 64, 48, 1, 3)
    image = PIL.Image.fromarray(pixels)
    if mode.startswith("PNG"):
        data = _file(image.convert("P") if "palette" in mode else image, "png")
    else:
        data = _file(image.convert(mode), quality=95)
    crop = read_crop(data, _whole, 32, decoder)
    assert crop.shape == (32, 32, 3)
    assert crop.dtype == np.uint8
    found, wanted = (
        np.asarray(x.convert("L"), float)
        for x in (PIL.Image.fromarray(crop), image.resize((32, 32), PIL.Image.Resampling.BILINEAR))
    )
    assert np.abs(found - wanted).mean() < 12  # the palette is coarse


def test_decoders_agree_but_for_interpolation(jpegs):
    pytest.importorskip("simplejpeg")
    pytest.importorskip("cv2")
    data = jpegs.jpeg(jpegs.picture(np.random.default_rng(0), 100, 80))
    one, other = (read_crop(data, _whole, 32, name).astype(float) for name in DECODERS)
    assert np.abs(one - other).mean() < 8


def test_truncated_files_are_refused(jpegs, decoder):
    data = jpegs.jpeg(jpegs.picture(np.random.default_rng(0), 100, 80))
    for length in (0, 10, len(data) // 2):
        with pytest.raises(Exception):  # noqa: B017 -- whatever the library raises
            read_crop(data[:length], _whole, 32, decoder)
