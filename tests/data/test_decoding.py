"""Reading image files: every kind rightly, or a sentence on what is not supported."""

import io

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from resnet_flax.data import decoding
from resnet_flax.data.decoding import load
from resnet_flax.data.transforms import EvalTransform
from resnet_flax.errors import UserError

RAMP = np.arange(0, 65536, 256, dtype=np.uint16).reshape(16, 16) + 255


def _levels(file, channels=1):
    return EvalTransform()(load(file, "scan.tif", channels))


def _file(image, kind, **settings):
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file


def _tiff(array, photometric=1, sample_format=1, extra=(), bits=None, data=b""):
    """A TIFF, uncompressed, of any kind of pixels; `data` if they are not the array's bytes."""
    height, width, *more = array.shape
    samples = more[0] if more else 1
    data = data or array.tobytes()
    tags = TiffImagePlugin.ImageFileDirectory_v2(prefix=b"II")
    bits = (bits or array.dtype.itemsize * 8,) * samples
    short = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 277: samples}
    short |= {278: height, 339: (sample_format,) * samples} | ({338: extra} if extra else {})
    for tag, value in short.items():
        tags.tagtype[tag] = 3
        tags[tag] = value
    for tag, value in ((273, 0), (279, len(data))):  # offsets are counted from the tags' end
        tags.tagtype[tag] = 4
        tags[tag] = value
    return io.BytesIO(b"II*\0\x08\0\0\0" + tags.tobytes(8) + data)


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "CMYK", "1", "YCbCr"])
def test_all_modes_become_rgb_or_grey(mode):
    file = _file(Image.new(mode, (5, 4)), "TIFF")
    with Image.open(file) as image:
        np.testing.assert_array_equal(_levels(file, 3), np.asarray(image.convert("RGB")))
        grey = np.asarray(image.convert("RGB").convert("L"))
    np.testing.assert_array_equal(_levels(file, 1)[..., 0], grey)


def _pgm(maximum, levels):
    return io.BytesIO(b"P5 16 16 %d\n" % maximum + levels.astype(">u2").tobytes())


@pytest.mark.parametrize(
    "file",
    [
        lambda: _file(Image.fromarray(RAMP), "PNG"),
        lambda: _file(Image.fromarray(RAMP), "TIFF"),
        lambda: _file(Image.fromarray(RAMP), "TIFF", compression="tiff_deflate"),
        lambda: _file(Image.fromarray(RAMP), "JPEG2000", irreversible=False),
        lambda: _pgm(65535, RAMP),
        lambda: _pgm(4095, RAMP >> 4),
        lambda: io.BytesIO(b"P2 16 16 65535\n" + b" ".join(b"%d" % n for n in RAMP.ravel())),
        lambda: _tiff(65535 - RAMP, photometric=0),
        lambda: _tiff(RAMP, bits=12, data=_twelve(RAMP >> 4)),
        lambda: _tiff(np.stack([RAMP] * 3, -1), photometric=2),
        lambda: _tiff(np.stack([RAMP] * 3 + [np.full_like(RAMP, 65535)], -1), 2, extra=(2,)),
    ],
    ids=[
        *("PNG", "TIFF", "compressed TIFF", "JPEG 2000", "PGM", "12-bit PGM", "plain PGM"),
        *("TIFF with white 0", "12-bit TIFF", "RGB TIFF", "RGBA TIFF"),
    ],
)
def test_sixteen_and_twelve_bits_become_eight(file):
    np.testing.assert_array_equal(_levels(file())[..., 0], RAMP >> 8)


def _twelve(levels):
    """12-bit levels as TIFF packs them: two in three bytes."""
    first, second = levels[:, ::2], levels[:, 1::2]
    packed = [first >> 4, (first & 15) << 4 | second >> 8, second & 255]
    return np.stack(packed, -1).astype(np.uint8).tobytes()


def test_a_transparent_level_of_sixteen_bits_is_transparent():
    level = int(RAMP[3, 5])
    image = load(_file(Image.fromarray(RAMP), "PNG", transparency=level), "a.png", 1)
    np.testing.assert_array_equal(np.asarray(image.getchannel("A")) == 0, level == RAMP)


@pytest.mark.parametrize(
    ("file", "said"),
    [
        (lambda: _file(Image.fromarray(RAMP.astype(np.float32)), "TIFF"), "in floating point who"),
        (lambda: _file(Image.fromarray(RAMP.astype(np.int32)), "TIFF"), "pixels in 32 bits, or"),
        (lambda: _tiff(RAMP.astype(np.int16), 1, 2), "pixels in 32 bits, or with a sign, whose"),
        (lambda: _tiff((RAMP >> 9).astype(np.int8), 1, 2), "pixels with a sign, whose range is"),
        (lambda: _file(Image.new("LAB", (4, 3)), "TIFF"), "pixels in the color space Lab"),
        (lambda: _tiff(np.zeros((4, 3, 5), np.uint8), 2, extra=(0, 0)), "5 channels, which is no"),
        (lambda: _tiff(np.zeros((4, 3), np.float64), 1, 3), "unknown pixel mode"),
        (lambda: _tiff(np.zeros((4, 3, 2), np.uint16), 1, extra=(2,)), "unknown pixel mode"),
        (lambda: _tiff(np.zeros((4, 3, 3), np.float32), 2, 3), "unknown pixel mode"),
    ],
    ids=["float", "32", "-16", "-8", "Lab", "5", "double", "LA 16", "RGB float"],
)
def test_intact_files_of_other_pixels_are_not_called_damaged(file, said):
    with pytest.raises(UserError, match=f"^scan.tif .*{said}") as error:
        _levels(file())
    assert "convert it to grey, RGB or RGBA with 8 or 16 bits per channel" in str(error.value)
    assert "damaged" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"<html></html>", "truncated"])
def test_what_is_no_image_is_named(content):
    if content == "truncated":
        content = _file(Image.effect_noise((60, 40), 80), "JPEG").getvalue()[:-200]
    with pytest.raises(UserError, match=r"cat.jpg cannot be decoded \(.*\); it is damaged"):
        load(io.BytesIO(content), "cat.jpg", 3)


def test_a_large_scan_is_read_if_it_is_allowed(monkeypatch):
    scan = _file(Image.new("L", (300, 200), 7), "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # which reading sets
    monkeypatch.setattr(decoding, "USUAL", 40_000)  # in place of 179 million
    with pytest.raises(UserError, match=r"60000 pixels; more than 40000 are.* RESNET_FLAX_MAX_"):
        _levels(scan)
    monkeypatch.setenv(decoding.MAX_PIXELS, "60000")
    assert _levels(scan).shape == (200, 300, 1)
    monkeypatch.setenv(decoding.MAX_PIXELS, "59998")
    with pytest.raises(UserError, match="60000 pixels; more than 59998 are not read"):
        _levels(scan)
    monkeypatch.setenv(decoding.MAX_PIXELS, "many")
    with pytest.raises(UserError, match="RESNET_FLAX_MAX_PIXELS must be a number of pixels, such"):
        _levels(scan)
