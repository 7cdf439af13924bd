"""One rule for all readers: depths, formats, sizes, orientation; files read as in evaluation."""

import os
import struct
import zlib

import numpy as np
import PIL.Image
import pytest

from bitmixer_jax.data import ImageReader, StreamSettings, decode, open_split, read_images
from bitmixer_jax.data.crops import DECODERS
from tests.refusals import refused

DEEP = np.asarray([[0, 255, 256, 32767], [32768, 50000, 65280, 65535]] * 2, np.uint16)
EIGHT = DEEP >> 8


@pytest.fixture(params=["memory", *DECODERS])
def read(request):
    """``read(path, side=4, **settings)``: pixels of a file by one of the readers, RGB."""
    if request.param == "turbo":
        pytest.importorskip("simplejpeg")
        pytest.importorskip("cv2")

    def pixels(path, side=4, **settings):
        if request.param == "memory":
            return read_images([path], (side, side, 3))[0]
        how = StreamSettings(size=side, resize=side, decoder=request.param, **settings)
        return ImageReader((side, side, 3), how).read([path])[0]

    return pixels


def png(colour, values):
    """A PNG file of 16 bits; ``values`` [H, W, C]."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, colour, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def tiff(values, order="<", photometric=1):
    """A TIFF file of one channel, 16 or 32 bits."""
    data = values.astype(values.dtype.newbyteorder(order)).tobytes()
    height, width = values.shape
    bits = 8 * values.dtype.itemsize
    kind = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    tags = [
        *((256, width), (257, height), (258, bits), (259, 1), (262, photometric), (273, 134)),
        *((277, 1), (278, height), (279, len(data)), (339, kind)),
    ]
    start = 8 + 2 + 12 * len(tags) + 4
    tags = [(tag, start if tag == 273 else value) for tag, value in tags]
    entries = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in tags)
    magic = b"II*\0" if order == "<" else b"MM\0*"
    head = magic + struct.pack(f"{order}IH", 8, len(tags))
    return head + entries + struct.pack(f"{order}I", 0) + data


SIXTEEN = {
    "grey.png": png(0, DEEP[..., None]),
    "grey and alpha.png": png(4, np.repeat(DEEP[..., None], 2, -1)),
    "rgb.png": png(2, np.repeat(DEEP[..., None], 3, -1)),
    "rgba.png": png(6, np.repeat(DEEP[..., None], 4, -1)),
    "little.tiff": tiff(DEEP),
    "big.tiff": tiff(DEEP, ">"),
    "inverted.tiff": tiff(65535 - DEEP, photometric=0),
    "32 bits.tiff": tiff(DEEP.astype(np.uint32)),
    "grey.ppm": b"P5 4 4 65535\n" + DEEP.astype(">u2").tobytes(),
}


@pytest.mark.parametrize("name", SIXTEEN)
def test_sixteen_bits_are_scaled_alike_in_every_reader(tmp_path, read, name):
    path = tmp_path / name
    path.write_bytes(SIXTEEN[name])
    assert np.array_equal(read(path), np.stack([EIGHT] * 3, -1))


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "P with transparency", "RGB", "RGBA", "CMYK", "YCbCr"]
)
def test_every_mode_gives_the_same_pixels_in_every_reader(tmp_path, read, mode):
    colours = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    image = PIL.Image.fromarray(colours)
    if mode.startswith("P"):
        image, how = image.quantize(16), {"transparency": bytes(16)} if mode != "P" else {}
        wanted = np.asarray(image.convert("RGB"))
    else:
        image, how = image.convert(mode), {}
        wanted = np.asarray(image.convert("RGB"))
    path = tmp_path / ("a.tiff" if mode in ("CMYK", "YCbCr") else "a.png")
    image.save(path, **how)
    assert np.array_equal(read(path, 8), wanted)


@pytest.mark.parametrize(
    ("content", "mentions"),
    [
        (tiff(np.full((4, 4), 70000, np.uint32)), (70000,)),
        (tiff(np.full((4, 4), -1, np.int16)), (-1,)),
        (tiff(np.full((4, 4), 0.5, np.float32)), ()),
        (b"Pf\n4 4\n-1.0\n" + bytes(64), ()),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", decode.FORMATS),
        (b"/* XPM */\nstatic char * a[] = {", decode.FORMATS),
    ],
)
def test_what_has_no_range_or_another_format_is_refused(tmp_path, read, content, mentions):
    path = tmp_path / "a.png"
    path.write_bytes(content)
    with refused("bad-image", path, *mentions) as caught:
        read(path)
    assert ("JPEG" in str(caught.value)) == ("JPEG" in mentions)  # formats that can be read


def test_sizes_are_checked_before_pixels_are_decoded(tmp_path, read, monkeypatch):
    image, blue = PIL.Image.new("RGB", (9, 9)), PIL.Image.new("RGB", (9, 9), "blue")
    names = ["a.png", "a.jpg", "a.gif", "a.tiff", "a.bmp", "a.ppm", "a.webp"]
    for name in names:
        image.save(tmp_path / name)
    image.save(tmp_path / "lossless.webp", lossless=True)
    image.save(tmp_path / "frames.webp", save_all=True, append_images=[blue])
    monkeypatch.setattr(decode, "MAX_PIXELS", 80)
    monkeypatch.setattr(PIL.Image.Image, "convert", None)
    for name in (*names, "lossless.webp", "frames.webp"):
        with refused("bad-image", name, "9 x 9", 80):
            read(tmp_path / name)


def test_a_canvas_of_webp_that_is_too_large_takes_no_memory(tmp_path, read):
    frames = [PIL.Image.new("RGB", (9, 9), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:])
    data = bytearray((tmp_path / "a.webp").read_bytes())
    data[24:30] = (16382).to_bytes(3, "little") * 2
    (tmp_path / "a.webp").write_bytes(data)
    with refused("bad-image", "a.webp", "16383 x 16383"):
        read(tmp_path / "a.webp")


@pytest.mark.parametrize("place", ["a pipe", "/dev/zero"])
def test_pipes_and_devices_are_refused_not_waited_for(tmp_path, read, place):
    path = place
    if place == "a pipe":
        path = tmp_path / "a.png"
        os.mkfifo(path)
    with refused("bad-image", path):
        read(path)


def test_a_pipe_among_streamed_images_is_named(pictures):
    file = next((pictures / "pictures/val/n0001").iterdir())
    file.unlink()
    os.mkfifo(file)
    settings = StreamSettings(size=16, resize=20)
    data = open_split("folder:pictures", "validation", pictures, stream=settings, workers=0)
    with refused("bad-image", file):
        list(data.evaluation(16))


# --- orientation ---


@pytest.fixture
def turned(pictures):
    """The data folder of the pictures, with orientation 6 in every file."""
    for file in (pictures / "pictures").rglob("*.JPEG"):
        with PIL.Image.open(file) as image:
            exif = image.getexif()
            exif[0x0112] = 6
            image.save(file, "jpeg", exif=exif, quality=95)
    return pictures


@pytest.mark.parametrize("orientation", ["auto", "obey", "ignore"])
@pytest.mark.parametrize("decoder", DECODERS)
def test_files_are_read_as_evaluation_reads_them(turned, decoder, orientation):
    if decoder == "turbo":
        pytest.importorskip("simplejpeg")
        pytest.importorskip("cv2")
    settings = StreamSettings(size=16, resize=20, decoder=decoder, orientation=orientation)
    data = open_split("folder:pictures", "validation", turned, stream=settings, workers=0)
    evaluated = np.concatenate([batch.images for batch in data.evaluation(5)])
    paths = [data.source.name(i) for i in range(len(data))]
    reader = ImageReader((16, 16, 3), settings.for_dataset(data.name))
    assert np.array_equal(reader.read(paths), evaluated)
    again = ImageReader.from_json(reader.to_json(), (16, 16, 3), "a file")
    assert np.array_equal(again.read(paths), evaluated)
    other = {"ignore": "obey"}.get(orientation, "ignore")
    turned_so = StreamSettings(size=16, resize=20, decoder=decoder, orientation=other)
    assert not np.array_equal(ImageReader((16, 16, 3), turned_so).read(paths), evaluated)


def test_imagenet_alone_ignores_orientation_by_default():
    settings = StreamSettings()
    for name in ("imagenet", "tfds:imagenet2012", "imagenet2012:5.1.0", "folder:imagenet"):
        assert settings.for_dataset(name).orientation == "ignore"
    for name in ("folder:pictures", "folder:my/imagenet2", "tfds:imagenette", "digits"):
        assert settings.for_dataset(name).orientation == "obey"
    obey = StreamSettings(orientation="obey")
    assert obey.for_dataset("imagenet") == obey
    with refused("bad-value", "config.stream.orientation", "'up'", "auto, obey"):
        StreamSettings(orientation="up")


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_tags_do_not_make_an_image_unreadable(tmp_path, read):
    image = PIL.Image.new("RGB", (4, 4), "white")
    image.save(tmp_path / "a.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f" + bytes(20))
    assert (read(tmp_path / "a.jpg") == 255).all()


@pytest.mark.parametrize(
    "about",
    [
        *([], "pil", 3, {"size": 16}, {"size": 16, "resize": "20", "decoder": "pil"}),
        {"size": 16, "resize": 20, "decoder": "fast", "orientation": "obey"},
        {"size": 16, "resize": 20, "decoder": ["pil"], "orientation": "obey"},
        {"size": 16, "resize": 20, "decoder": "pil", "orientation": {}},
        {"size": 17, "resize": 20, "decoder": "pil", "orientation": "obey"},
        {"size": 16, "resize": 10**9, "decoder": "pil", "orientation": "obey"},
        {"size": True, "resize": 20, "decoder": "pil", "orientation": "obey"},
    ],
)
def test_damaged_descriptions_of_a_reader_are_refused(about):
    with refused("damaged", "file.onnx", '"images"'):
        ImageReader.from_json(about, (16, 16, 3), "file.onnx")


def test_files_without_a_description_are_read_as_sets_in_memory():
    for about in (None, {}):
        assert ImageReader.from_json(about, (8, 8, 1), "a file") == ImageReader((8, 8, 1))
