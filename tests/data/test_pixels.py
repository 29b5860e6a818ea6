"""Rotation, transparency and channels: the same in every way that an image is read."""

import io

import numpy as np
import pytest
from PIL import Image

from resnet_flax.data import ArraySource, batches
from resnet_flax.data.decoding import load
from resnet_flax.data.in_memory import in_memory
from resnet_flax.data.pipeline import eval_batches, train_batches
from resnet_flax.data.pixels import Pixels
from resnet_flax.data.preprocessing import Preprocessing
from resnet_flax.data.sources import open_source
from resnet_flax.data.sources.tfds import TfdsSource
from resnet_flax.data.transforms import (
    EvalTransform,
    ScaleTransform,
    TenCropTransform,
    TrainTransform,
)
from resnet_flax.errors import UserError

ON_WHITE = Pixels("on", "white")
# What EXIF's orientation says was done to an upright picture; it is undone by the inverse.
STORED = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, 1),
    7: lambda x: np.rot90(x, 2).swapaxes(0, 1),
    8: lambda x: np.rot90(x, -1),
}


def _noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def _file(image, kind="PNG", orientation=1, **settings):
    """An image's file; `orientation` is stored in its EXIF."""
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(file, kind, exif=exif, **settings)
    file.seek(0)
    return file


def _transparent():
    """Images with transparent pixels by their form, each with its RGBA levels."""
    rgba = Image.fromarray(_noise(6, 9, 4))
    palette = Image.fromarray(_noise(6, 9, 3)).quantize(16)
    grey = Image.fromarray(_noise(6, 9) // 2)
    key = int(np.asarray(grey)[2, 3])
    return {
        "RGBA": _file(rgba),
        "LA": _file(rgba.convert("LA")),
        "palette": _file(palette, transparency=3),
        "palette of alphas": _file(palette, transparency=bytes(range(0, 160, 10))),
        "grey key": _file(grey, transparency=key),
        "GIF": _gif(palette),
        "WebP": _file(rgba, "WEBP", lossless=True, exact=True),
        "TIFF": _file(rgba, "TIFF"),
    }


def _gif(image):
    file = io.BytesIO()
    image.save(file, "GIF", transparency=3)
    return file


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize("form", _transparent())
def test_transparent_pixels_are_white_or_dropped(form):
    file = _transparent()[form]
    with Image.open(file) as again:
        levels = np.asarray(again.convert("RGBA")).astype(float)
        before = np.asarray(again.convert("RGB"))  # as images were read before `alpha` existed
    share = levels[..., 3:] / 255
    white = EvalTransform(pixels=Pixels(alpha="white"))(load(file, "a.png", 3))
    assert np.abs(white - (levels[..., :3] * share + 255 * (1 - share))).max() <= 0.51
    np.testing.assert_array_equal(EvalTransform()(load(file, "a.png", 3)), before)
    assert (white != before).any()
    with pytest.raises(UserError, match=r"a\.png has transparent pixels, which alpha=error"):
        EvalTransform(pixels=Pixels(alpha="error"))(load(file, "a.png", 3))
    grey = EvalTransform(pixels=Pixels(alpha="white"))(load(file, "a.png", 1))
    assert grey.shape == (6, 9, 1)
    assert np.abs(grey[..., 0] - white @ np.array([0.299, 0.587, 0.114])).max() <= 1.51


def test_what_is_drawn_in_alpha_alone_is_seen():
    drawn = np.zeros((8, 8, 4), np.uint8)
    drawn[2:6, 3:5, 3] = 255
    image = load(_file(Image.fromarray(drawn)), "icon.png", 3)
    seen = EvalTransform(pixels=ON_WHITE)(image)
    np.testing.assert_array_equal(seen[..., 0], 255 - drawn[..., 3])
    assert EvalTransform()(image).max() == 0
    # An opaque alpha channel says nothing: nothing is dropped, and nothing refused.
    drawn[..., 3] = 255
    opaque = load(_file(Image.fromarray(drawn)), "icon.png", 3)
    assert opaque.mode == "RGB"
    assert not Pixels().ignored(opaque).any()
    EvalTransform(pixels=Pixels(alpha="error"))(opaque)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_images_are_turned_upright_before_they_are_cropped(kind):
    upright = np.kron(_noise(5, 8, 3), np.ones((8, 8, 1), np.uint8))  # 40 high, 64 wide
    settings = {"PNG": {}, "WEBP": {"lossless": True}, "JPEG": {"quality": 95, "subsampling": 0}}
    evaluation = EvalTransform(24, 0.75, pixels=ON_WHITE)
    training = TrainTransform("random_resized", (24,), pixels=ON_WHITE)
    ten = TenCropTransform(24, 32, pixels=ON_WHITE)
    transforms = (
        evaluation,
        lambda image: training(image, np.random.default_rng(5), 0),
        lambda image: TrainTransform(pixels=ON_WHITE)(image, np.random.default_rng(5), 0),
        lambda image: ten(image)[1],
        ScaleTransform(24, 8, pixels=ON_WHITE),
    )
    expected = [transform(upright) for transform in transforms]
    assert expected[2].shape == (40, 64, 3)
    for orientation, store in STORED.items():
        stored = Image.fromarray(np.ascontiguousarray(store(upright)))
        image = load(_file(stored, kind, orientation, **settings[kind]), "photo", 3)
        assert Pixels().ignored(image).tolist() == [False, orientation != 1]
        # A JPEG's levels are near those of the picture only.
        for transform, one in zip(transforms, expected, strict=True):
            distance = np.abs(transform(image).astype(int) - one)
            assert distance.max() <= (40 if kind == "JPEG" else 0)
            assert distance.mean() < (4 if kind == "JPEG" else 1e-9)
        as_stored = EvalTransform()(image)
        assert as_stored.shape == (*stored.size[::-1], 3)


def test_sixteen_bit_images_are_turned_too_and_damaged_exif_says_nothing():
    wide = (np.arange(12, dtype=np.uint16) * 5000).reshape(3, 4)
    image = load(_file(Image.fromarray(wide), "PNG", 6), "scan", 1)
    np.testing.assert_array_equal(
        EvalTransform(pixels=ON_WHITE)(image)[..., 0], np.rot90(wide >> 8, -1)
    )
    file = io.BytesIO()
    Image.new("RGB", (4, 3)).save(file, "JPEG", exif=b"Exif\0\0no EXIF at all")
    assert EvalTransform(pixels=ON_WHITE)(load(file, "photo", 3)).shape == (3, 4, 3)


class _Drawings(list):
    """Examples as TFDS has them, the image still encoded."""

    def __getitem__(self, index):
        return {"image": list.__getitem__(self, index).getvalue(), "label": 0}


class _Opened:
    """A user's own source, which opens files with Pillow."""

    class_names = ("a",)

    def __init__(self, files):
        self._files = files

    def __len__(self):
        return len(self._files)

    def __getitem__(self, index):
        return {"image": Image.open(self._files[index]), "label": 0}


@pytest.mark.parametrize("exif", ["off", "on"])
@pytest.mark.parametrize("alpha", ["drop", "white"])
def test_every_way_of_reading_gives_the_same_pixels(tmp_path, exif, alpha):
    files = [_file(Image.fromarray(_noise(6, 9, 4, seed=i)), "PNG", 1 + 5 * i) for i in (0, 1)]
    (tmp_path / "train" / "a").mkdir(parents=True)
    for i, file in enumerate(files):
        (tmp_path / "train" / "a" / f"{i}.png").write_bytes(file.getvalue())
    pixels = Preprocessing(exif=exif, alpha=alpha).pixels
    sources = {
        "folder": open_source(f"folder:{tmp_path}", "train"),
        "tfds": TfdsSource("tfds:x", _Drawings(files), ("a",), 3),
        "own": _Opened(files),
    }
    kept = [in_memory(Part(s, 0), pixels=pixels) for s in sources.values()]
    expected = EvalTransform(pixels=pixels)
    for name, source in sources.items():
        for i in (0, 1):
            with Image.open(files[i]) as file:
                np.testing.assert_array_equal(expected(source[i]["image"]), expected(file), name)
        found = EvalTransform(8, pixels=pixels)
        with eval_batches(source, batch_size=2, transform=found) as read:
            batch = next(read)["image"]
        np.testing.assert_array_equal(batch[1], found(sources["folder"][1]["image"]))
        notebook = batches(source, batch_size=2, size=8, exif=exif, alpha=alpha)
        np.testing.assert_array_equal(next(iter(notebook))["image"], batch)
        train = TrainTransform("random_resized", (8,), pixels=pixels)
        with train_batches(source, seed=3, batch_size=2, transform=train) as read:
            drawn = next(read)["image"]
        with train_batches(sources["folder"], seed=3, batch_size=2, transform=train) as read:
            np.testing.assert_array_equal(drawn, next(read)["image"])
    for source in kept:
        np.testing.assert_array_equal(source.images[0], expected(sources["folder"][0]["image"]))
        # What is kept is not changed a second time.
        np.testing.assert_array_equal(expected(source.images[0]), source.images[0])


class Part:
    """One example of a source."""

    def __init__(self, source, index):
        self._source, self._index, self.class_names = source, index, source.class_names

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return self._source[self._index + index]


def test_a_folder_in_a_notebook_is_upright_and_on_white(tmp_path):
    (tmp_path / "train" / "a").mkdir(parents=True)
    file = _file(Image.fromarray(_noise(6, 9, 4)), "PNG", 6)
    (tmp_path / "train" / "a" / "0.png").write_bytes(file.getvalue())
    found = next(iter(batches(f"folder:{tmp_path}", batch_size=1)))["image"][0]
    np.testing.assert_array_equal(found, EvalTransform(pixels=ON_WHITE)(Image.open(file)))
    with pytest.raises(UserError, match="alpha must be one of drop, white, error, not 'black'"):
        batches(f"folder:{tmp_path}", alpha="black")


def test_four_channels_stay_four_unless_others_are_asked_for():
    drawing = _noise(6, 9, 4)
    source = TfdsSource("tfds:x", _Drawings([_file(Image.fromarray(drawing))]), ("a",), 4)
    image = source[0]["image"]
    for of in (image, drawing, ArraySource(drawing[None], [0], ("a",))[0]["image"]):
        np.testing.assert_array_equal(EvalTransform()(of), drawing)
        assert EvalTransform(4)(of).shape == (4, 4, 4)
        three = EvalTransform(pixels=Pixels(alpha="white", channels=3))
        np.testing.assert_array_equal(
            three(of), EvalTransform(pixels=ON_WHITE)(Image.fromarray(drawing))
        )
        assert Pixels(channels=3).ignored(of).tolist() == [True, False]
    # The fourth need not be an alpha channel: where it is 0, the others are resized all the same.
    infrared = drawing.copy()
    infrared[..., 3] = 0
    small = EvalTransform(4)(infrared)
    np.testing.assert_array_equal(small[..., :3], EvalTransform(4)(drawing[..., :3]))
    np.testing.assert_array_equal(
        EvalTransform(pixels=Pixels(channels=4))(Image.fromarray(drawing)), drawing
    )


def test_channels_are_converted_as_asked():
    grey = _noise(6, 9, 1)
    three = EvalTransform(pixels=Pixels(channels=3))
    for of in (grey, Image.fromarray(grey[..., 0])):
        np.testing.assert_array_equal(three(of), np.repeat(grey, 3, -1))
    color = _noise(6, 9, 3)
    found = EvalTransform(pixels=Pixels(channels=1))(color)
    np.testing.assert_array_equal(found[..., 0], np.asarray(Image.fromarray(color).convert("L")))
    with pytest.raises(
        UserError, match="an image has 5 channels; only those with 1, 3 or 4 can be"
    ):
        three(_noise(6, 9, 5))
    with pytest.raises(UserError, match="an image has 5 channels"):
        EvalTransform(4)(_noise(6, 9, 5))


def test_checkpoints_without_these_fields_are_read_as_they_were_made():
    old = {name: value for name, value in Preprocessing().to_json().items() if name != "exif"}
    del old["alpha"], old["channels"]
    found = Preprocessing.from_json(old)
    assert (found.exif, found.alpha, found.channels) == ("off", "drop", 0)
    for wrong in ({"exif": "yes"}, {"alpha": "black"}, {"channels": 2}):
        with pytest.raises(UserError, match=f"{next(iter(wrong))} must be one of"):
            Preprocessing.from_json({**old, **wrong})


def test_published_weights_see_the_pixels_that_they_always_saw(shared_data):
    files = sorted((shared_data / "imagenet_sample/train").glob("*/*"))[::20]
    for file in files:
        with Image.open(file) as image:
            whole = image.convert("RGB")
        width, height = whole.size
        size = (256, 256 * height // width) if width <= height else (256 * width // height, 256)
        resized = np.asarray(whole.resize(size, Image.Resampling.BILINEAR))
        left, top = (round((side - 224) / 2) for side in size)
        found = Preprocessing().transform(load(file, str(file), 3))
        np.testing.assert_array_equal(found, resized[top : top + 224, left : left + 224])
