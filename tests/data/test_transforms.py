"""Crops, resizing and RandAugment: on fixed input, and against torchvision if installed."""

import importlib.util
import sys
import types

import numpy as np
import pytest
from PIL import Image

from resnet_flax.data import rand_augment
from resnet_flax.data.decoding import load
from resnet_flax.data.transforms import EvalTransform, TrainTransform, random_box


def _rng(seed=0):
    return np.random.default_rng(seed)


@pytest.fixture
def photograph():
    """A smooth picture, 60 wide and 40 high."""
    y, x = np.mgrid[:40, :60]
    channels = [127 + 127 * np.sin(x / a + y / b) for a, b in ((7, 9), (5, -11), (13, 4))]
    return Image.fromarray(np.stack(channels, -1).astype(np.uint8))


@pytest.mark.parametrize(("fraction", "shorter"), [(0.875, 256), (224 / 232, 232), (0.95, 235)])
def test_the_crop_fraction_gives_the_side_that_is_resized_to(fraction, shorter):
    image = Image.effect_noise((300, 400), 80).convert("RGB")
    resized = image.resize((shorter, shorter * 4 // 3), Image.Resampling.BILINEAR)
    left, top = (round((side - 224) / 2) for side in resized.size)
    actual = EvalTransform(224, fraction)(image)
    np.testing.assert_array_equal(actual, np.asarray(resized)[top:, left:][:224, :224])


def test_nothing_asked_nothing_done(photograph):
    for transform in (EvalTransform(), lambda x: TrainTransform()(x, _rng(), 0)):
        np.testing.assert_array_equal(transform(photograph), np.asarray(photograph))
        grey = np.arange(12, dtype=np.uint8).reshape(3, 4, 1)
        np.testing.assert_array_equal(transform(grey), grey)


def test_jitter_crops_a_square_of_the_resized_image(photograph):
    transform = TrainTransform("jitter", sizes=(24,), jitter=(30, 50))
    candidates = {
        side: np.asarray(photograph.resize((side * 60 // 40, side), Image.Resampling.BILINEAR))
        for side in range(30, 51)
    }
    sides, corners, smallest = set(), set(), set()
    for seed in range(150):
        crop = transform(photograph, _rng(seed), 0)
        assert crop.shape == (24, 24, 3)
        found = []
        for side, image in candidates.items():
            windows = np.lib.stride_tricks.sliding_window_view(image, (24, 24), (0, 1))
            same = (windows == crop.transpose(2, 0, 1)).all((-3, -2, -1))
            found += [(side, *corner) for corner in np.argwhere(same)]
        assert found
        sides.add(found[0][0])
        corners.add(found[0][1:])
    for seed in range(300):
        fixed = TrainTransform("jitter", sizes=(24,), jitter=(30, 30))
        crop = fixed(photograph, _rng(seed), 0)
        windows = np.lib.stride_tricks.sliding_window_view(candidates[30], (24, 24), (0, 1))
        same = (windows == crop.transpose(2, 0, 1)).all((-3, -2, -1))
        smallest.add(tuple(np.argwhere(same)[0]))
    assert {30, 50} <= sides
    assert len(corners) > 60
    # With the smallest side, 30 by 45, corners are in every row, including the last one.
    rows, columns = zip(*smallest, strict=True)
    assert {min(rows), max(rows)} == {0, 30 - 24}
    assert {min(columns), max(columns)} == {0, 45 - 24}


def test_random_boxes_are_of_the_area_and_shape_that_are_asked():
    boxes = np.array(
        [random_box((500, 375), _rng(s), (0.08, 1.0), (3 / 4, 4 / 3)) for s in range(3000)]
    )
    left, top, right, bottom = boxes.T
    w, h = right - left, bottom - top
    assert (left >= 0).all()
    assert (top >= 0).all()
    assert (right <= 500).all()
    assert (bottom <= 375).all()
    area, ratio = w * h / (500 * 375), w / h
    assert 0.079 < area.min() < 0.1
    assert area.max() > 0.9
    assert 0.74 < ratio.min() < 0.77
    assert 1.3 < ratio.max() < 1.35
    # Uniform up to the area where the largest boxes no longer fit.
    assert abs((area < 0.31).mean() / (area < 0.54).mean() - 0.5) < 0.05
    # Log-uniform: half of the small boxes, which all fit, are wider than high, and a quarter
    # beyond the root of 4/3; a uniform ratio would have 57 and 31 %.
    small = area < 0.4
    assert abs((ratio[small] > 1).mean() - 0.5) < 0.04
    assert abs((ratio[small] > (4 / 3) ** 0.5).mean() - 0.25) < 0.04
    # Corners are uniform over where the box fits.
    for corner, side, length in ((left, w, 500), (top, h, 375)):
        place = corner / (length - side + 1)
        assert abs(place[small].mean() - 0.5) < 0.03
        assert place[small].max() > 0.95
        assert (corner == 0).any()
        assert (corner + side == length).any()


@pytest.mark.parametrize(
    ("size", "box"), [((1000, 10), (493, 0, 506, 10)), ((10, 1000), (0, 493, 10, 506))]
)
def test_where_no_box_fits_it_is_the_largest_in_the_middle(size, box):
    assert random_box(size, _rng(), (0.9, 1.0), (3 / 4, 4 / 3)) == box


def test_progressive_sizes_change_at_their_steps(photograph):
    transform = TrainTransform("random_resized", sizes=(8, 12, 16), boundaries=(10, 20))
    sides = [transform(photograph, _rng(), step).shape[0] for step in (0, 9, 10, 19, 20, 1000)]
    assert sides == [8, 8, 12, 12, 16, 16]


def test_what_is_drawn_depends_on_the_generator_alone(photograph):
    for policy in ("none", "randaugment", "trivialaugment"):
        transform = TrainTransform("random_resized", sizes=(24,), policy=policy)
        results = [transform(photograph, _rng(seed), 0) for seed in (1, 1, 2)]
        np.testing.assert_array_equal(results[0], results[1])
        assert (results[0] != results[2]).any()


OPERATIONS = {
    "identity": 0.0,
    "shear_x": -0.2,
    "shear_y": 0.2,
    "translate_x": 7.6,
    "translate_y": -7.6,
    "rotate": 21.0,
    "brightness": 0.4,
    "colour": -0.4,
    "contrast": 0.4,
    "sharpness": -0.4,
    "posterize": 4.0,
    "solarize": 100.0,
    "autocontrast": 0.0,
    "equalize": 0.0,
}
TORCHVISION = {"colour": "Color", "autocontrast": "AutoContrast"}


@pytest.mark.parametrize("name", rand_augment.RAND)
def test_operations_do_what_they_are_called(photograph, name):
    result = rand_augment.operate(photograph, name, OPERATIONS[name])
    assert result.size == photograph.size
    before, after = (np.asarray(image).astype(int) for image in (photograph, result))
    changed = (before != after).any()
    assert changed == (name != "identity")
    match name:
        case "translate_x":
            np.testing.assert_array_equal(after[:, 7:], before[:, :-7])
            assert not after[:, :7].any()
        case "translate_y":
            np.testing.assert_array_equal(after[:-7], before[7:])
        case "posterize":
            np.testing.assert_array_equal(after, before // 16 * 16)
        case "solarize":
            np.testing.assert_array_equal(after, np.where(before < 155, before, 255 - before))
        case "brightness":
            assert np.abs(after - np.minimum(before * 1.4, 255)).max() <= 1
        case "colour":
            assert np.ptp(after, axis=-1).mean() < np.ptp(before, axis=-1).mean()
        case "rotate":
            # Counterclockwise about the centre: what was on the right is now above.
            assert abs(after[20, 30] - before[20, 30]).max() <= 12


def test_policies_draw_all_operations_and_both_signs(monkeypatch, photograph):
    seen = []
    monkeypatch.setattr(
        rand_augment, "operate", lambda image, name, value: seen.append((name, value)) or image
    )
    rng = _rng()
    for _ in range(600):
        rand_augment.rand_augment(photograph, rng, 2, 9)
    assert len(seen) == 1200
    assert {name for name, _ in seen} == set(rand_augment.RAND)
    assert {round(v, 6) for n, v in seen if n == "rotate"} == {-9.0, 9.0}
    assert {round(v, 6) for n, v in seen if n == "solarize"} == {76.5}
    assert {round(abs(v), 3) for n, v in seen if n == "translate_x"} == {
        round(0.3 * 60 * 150 / 331, 3)
    }
    assert {round(abs(v), 3) for n, v in seen if n == "translate_y"} == {
        round(0.3 * 40 * 150 / 331, 3)
    }
    seen.clear()
    for _ in range(12000):
        rand_augment.trivial_augment(photograph, rng)
    assert len(seen) == 12000
    rotations = {round(v / 4.5) for n, v in seen if n == "rotate"}
    assert rotations == set(range(-30, 31))
    assert {round(v) for n, v in seen if n == "posterize"} == set(range(7))


def test_magnitudes_are_those_of_the_papers_code():
    # torchvision's RandAugment and TrivialAugmentWide, `_augmentation_space` at the last bin.
    enhancers = {"brightness", "colour", "contrast", "sharpness"}
    plain = {"identity": 0, "autocontrast": 0, "equalize": 0, "solarize": 255}
    rand = {"shear_x": 0.3, "shear_y": 0.3, "rotate": 30, "posterize": 4}
    rand |= {"translate_x": 150 / 331, "translate_y": 150 / 331}
    wide = {"shear_x": 0.99, "shear_y": 0.99, "rotate": 135, "posterize": 6}
    wide |= {"translate_x": 32, "translate_y": 32}
    for table, expected, strength in (
        (rand_augment.RAND, rand, 0.9),
        (rand_augment.WIDE, wide, 0.99),
    ):
        found = {name: value for name, (value, _) in table.items()}
        assert found == pytest.approx(plain | expected | dict.fromkeys(enhancers, strength))
        signed = {name for name, (_, signed) in table.items() if signed}
        assert signed == set(found) - {"posterize", "solarize", "identity", "autocontrast"} - {
            "equalize"
        }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("torch", "torchvision"))),
    reason="needs torch and torchvision",
)
class TestTorchvision:
    @pytest.fixture(autouse=True)
    def _torchvision(self):
        sys.modules.setdefault("torchvision._meta_registrations", types.ModuleType("empty"))
        global T
        from torchvision import transforms as T  # noqa: N812

    @pytest.mark.parametrize("name", rand_augment.RAND)
    def test_operations(self, photograph, name):
        value = OPERATIONS[name]
        theirs = TORCHVISION.get(name, "".join(part.capitalize() for part in name.split("_")))
        magnitude = {"posterize": 8 - value, "solarize": 255 - value}.get(name, value)
        expected = T.autoaugment._apply_op(
            photograph, theirs, magnitude, T.InterpolationMode.BILINEAR, None
        )
        actual = rand_augment.operate(photograph, name, value)
        distance = np.abs(np.asarray(actual).astype(int) - np.asarray(expected).astype(int))
        assert distance.max() <= 1

    @pytest.mark.parametrize(
        ("size", "fraction", "interpolation"),
        [(224, 0.875, "bilinear"), (224, 0.95, "bicubic"), (288, 1.0, "bicubic")],
    )
    def test_evaluation_of_photographs(self, shared_data, size, fraction, interpolation):
        mode = getattr(T.InterpolationMode, interpolation.upper())
        theirs = T.Compose([T.Resize(int(size / fraction), mode), T.CenterCrop(size)])
        ours = EvalTransform(size, fraction, interpolation)
        files = sorted((shared_data / "imagenet_sample/train").glob("*/*"))
        assert len(files) == 400
        for file in files:
            image = load(file, str(file), 3)
            with Image.open(file) as again:
                expected = np.asarray(theirs(again.convert("RGB"))).astype(int)
            assert np.abs(ours(image).astype(int) - expected).max() <= 1, file


def test_evaluation_of_photographs_is_as_written_down(shared_data):
    """Means after torchvision's `Resize(256)` and `CenterCrop(224)` (with Pillow 12)."""
    files = sorted((shared_data / "imagenet_sample/train").glob("*/*"))[::80]
    means = [EvalTransform(224)(load(file, str(file), 3)).mean() for file in files]
    np.testing.assert_allclose(means, [114.21, 102.53, 45.088, 121.464, 89.771], atol=0.01)
