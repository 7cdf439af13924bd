"""Image files: right pixels for any size, mode and orientation; one line where it is no image."""

import numpy as np
import PIL.Image
import pytest

from bitmixer_jax.data.image_files import SUFFIXES, find_images, read_images
from bitmixer_jax.errors import UserError
from tests.refusals import check_line, refused

RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (8, 8, 3), np.uint8)
GREY = RNG.integers(0, 256, (8, 8), np.uint8)


@pytest.fixture
def save(tmp_path):
    """``save(array or image, name)``: writes an image file, returns its path."""

    def write(image, name="image.png", **settings):
        if isinstance(image, np.ndarray):
            image = PIL.Image.fromarray(image)
        image.save(tmp_path / name, **settings)
        return tmp_path / name

    return write


# --- pixels ---


def test_images_of_the_right_size_keep_their_pixels(save):
    found = read_images([save(COLOUR, "a.png"), str(save(COLOUR[::-1], "b.png"))], (8, 8, 3))
    assert found.dtype == np.uint8
    assert np.array_equal(found, [COLOUR, COLOUR[::-1]])


def test_grey_images_have_one_channel(save):
    found = read_images([save(GREY)], (8, 8, 1))
    assert np.array_equal(found, GREY[None, ..., None])


def test_grey_becomes_rgb_and_rgb_becomes_grey(save):
    assert np.array_equal(read_images([save(GREY)], (8, 8, 3))[0], np.stack([GREY] * 3, -1))
    luma = COLOUR @ [0.299, 0.587, 0.114]
    found = read_images([save(COLOUR)], (8, 8, 1))[0, ..., 0]
    assert np.abs(found - luma).max() <= 1


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "I"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_mode_is_read(save, mode, channels):
    image = PIL.Image.new(mode, (8, 8), 1 if mode == "1" else None)
    name = "image.tiff" if mode in ("CMYK", "YCbCr", "I") else "image.png"
    assert read_images([save(image, name)], (8, 8, channels)).shape == (1, 8, 8, channels)


def test_white_is_white_in_every_mode(save):
    for mode, white in (
        *(("1", 1), ("L", 255), ("LA", (255, 255)), ("RGBA", (255, 255, 255, 128))),
        *(("CMYK", (0, 0, 0, 0)), ("I;16", 65535), ("I", 65535)),
    ):
        image = PIL.Image.new(mode, (8, 8), white)
        found = read_images([save(image, "image.tiff")], (8, 8, 3))
        assert (found == 255).all(), mode


def test_sixteen_bits_are_scaled_not_clipped(save):
    deep = (GREY.astype(np.uint16) << 8) + 7
    assert np.array_equal(read_images([save(deep)], (8, 8, 1))[0, ..., 0], GREY)


def test_palettes_with_transparency_are_read_without_a_warning(save, recwarn):
    palette = PIL.Image.fromarray(COLOUR).quantize(16)
    wanted = np.asarray(palette.convert("RGB"))
    found = read_images([save(palette, transparency=bytes(range(16)))], (8, 8, 3))
    assert np.array_equal(found[0], wanted)
    assert not [w for w in recwarn if "PIL" in str(w.filename) or "Palette" in str(w.message)]


@pytest.mark.parametrize("name", ["a.jpg", "a.webp", "a.bmp", "a.gif", "a.tif", "a.ppm"])
def test_every_format_is_read(save, name):
    flat = np.full((8, 8, 3), (200, 100, 50), np.uint8)
    found = read_images([save(flat, name)], (8, 8, 3))
    assert np.abs(found.astype(int) - flat).max() <= 6


def test_of_an_animation_the_first_frame_counts(save):
    frames = [PIL.Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    path = save(frames[0], "a.gif", save_all=True, append_images=frames[1:])
    assert np.array_equal(read_images([path], (8, 8, 3))[0, 0, 0], [255, 0, 0])


# --- size and orientation ---


@pytest.mark.parametrize("size", [(6, 12), (12, 6), (8, 8), (5, 40), (40, 5), (1, 1), (1, 300)])
@pytest.mark.parametrize("shape", [(8, 8, 3), (4, 10, 1), (10, 4, 3)])
def test_any_size_becomes_the_shape(save, size, shape):
    image = RNG.integers(0, 256, (*size, 3), np.uint8)
    assert read_images([save(image)], shape).shape == (1, *shape)


def bands(width, height):
    """Black, white, black: the white band is the centre square."""
    image = np.zeros((height, width, 3), np.uint8)
    side = min(width, height)
    top, left = (height - side) // 2, (width - side) // 2
    image[top : top + side, left : left + side] = 255
    return image


@pytest.mark.parametrize(("width", "height"), [(48, 16), (16, 48), (33, 11), (8, 24)])
def test_the_centre_is_what_remains(save, width, height):
    found = read_images([save(bands(width, height))], (8, 8, 3))
    assert (found[0, 2:6, 2:6] == 255).all()
    assert found.mean() > 240


def test_it_is_scaling_to_the_shorter_side_and_cropping_at_the_centre(save):
    image = RNG.integers(0, 256, (16, 32, 3), np.uint8)
    scaled = PIL.Image.fromarray(image).resize((16, 8), PIL.Image.Resampling.BICUBIC)
    wanted = np.asarray(scaled)[:, 4:12].astype(int)
    assert np.abs(read_images([save(image)], (8, 8, 3))[0] - wanted).max() <= 1


def test_large_images_are_averaged_not_sampled(save):
    fine = np.indices((256, 256)).sum(0) % 2 * 255
    found = read_images([save(fine.astype(np.uint8))], (8, 8, 1))
    assert np.abs(found.astype(int) - 127).max() <= 2


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_tags_are_obeyed(save, orientation):
    upright = np.kron(np.asarray([[250, 130], [60, 0]], np.uint8), np.ones((8, 8), np.uint8))
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: np.rot90(upright),
        7: upright[::-1, ::-1].T,
        8: np.rot90(upright, -1),
    }[orientation]
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    path = save(np.ascontiguousarray(stored), "a.jpg", exif=exif, quality=95)
    found = read_images([path], (16, 16, 1))[0, ..., 0]
    assert np.abs(found.astype(int) - upright).max() <= 8


def test_no_paths_are_no_images():
    assert read_images([], (8, 8, 3)).shape == (0, 8, 8, 3)


# --- what it refuses ---


@pytest.mark.parametrize("channels", [0, 2, 4])
def test_other_numbers_of_channels_are_refused(save, channels):
    with refused("bad-value", channels):
        read_images([save(COLOUR)], (8, 8, channels))


def read_is_refused(path, code, *mentions):
    with refused(code, *mentions) as caught:
        read_images([path], (8, 8, 3))
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize(
    "content", [b"", b"no image", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM\n\n\n"]
)
def test_a_file_that_is_no_image_is_refused(tmp_path, content):
    path = tmp_path / "a.png"
    path.write_bytes(content)
    read_is_refused(path, "bad-image")


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.gif", "a.webp", "a.tif"])
def test_a_file_cut_short_or_damaged_is_refused_or_read(save, name):
    path = save(RNG.integers(0, 256, (32, 32, 3), np.uint8), name)
    original = path.read_bytes()
    path.write_bytes(original[: len(original) // 2])
    read_is_refused(path, "bad-image")
    rng, errors = np.random.default_rng(1), []
    for _ in range(40):
        damaged = bytearray(original)
        for place in rng.integers(len(original), size=8):
            damaged[place] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        try:
            assert read_images([path], (8, 8, 3)).shape == (1, 8, 8, 3)
        except UserError as error:
            errors.append(error)
    assert errors or name == "a.tif"  # whose pixels are not compressed
    for error in errors:
        assert error.code == "bad-image"
        check_line(str(error), start=f"{path}: ")


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    read_is_refused(tmp_path / "none.png", "no-such-file")
    read_is_refused(tmp_path, "bad-image")


def test_a_decompression_bomb_is_refused(save, monkeypatch):
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 20)
    read_is_refused(save(COLOUR), "bad-image", 64, 40)  # pixels: there are, are allowed


def test_floating_point_pixels_are_refused(save):
    path = save(PIL.Image.new("F", (8, 8)), "a.tiff")
    with PIL.Image.open(path) as image:
        assert image.mode == "F"  # the file is whole
    read_is_refused(path, "bad-image")


def test_a_bad_file_among_good_ones_is_named(save, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"")
    with refused("bad-image", tmp_path / "bad.png"):
        read_images([save(COLOUR), tmp_path / "bad.png"], (8, 8, 3))


# --- folders ---


def test_images_are_found_by_suffix_and_sorted(save, tmp_path):
    names = ["b.PNG", "a.jpeg", "c.webp", "10.jpg", "9.bmp"]
    for name in names:
        save(COLOUR, name)
    for name in ("notes.txt", ".hidden.png", "png"):
        (tmp_path / name).write_text("")
    (tmp_path / "folder.png").mkdir()
    for folder in (tmp_path, str(tmp_path)):
        assert [path.name for path in find_images(folder)] == sorted(names)
    assert len(read_images(find_images(tmp_path), (8, 8, 3))) == 5


def test_all_suffixes_are_of_formats_that_can_be_read():
    assert set(SUFFIXES) <= set(PIL.Image.registered_extensions())


def test_a_folder_without_images_is_refused(tmp_path):
    with refused("no-data", tmp_path, *SUFFIXES):
        find_images(tmp_path)


def test_a_folder_that_is_missing_or_a_file_is_refused(tmp_path, save):
    for path in (tmp_path / "none", save(COLOUR)):
        with refused("bad-path", path):
            find_images(path)
