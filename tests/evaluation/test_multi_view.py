"""Every protocol against the same views computed one by one."""

import csv
import functools
import importlib.util
import json
from functools import partial

import jax
import jax.numpy as jnp
import networks as golden
import numpy as np
import pytest
from marks import long
from PIL import Image
from scipy.special import log_softmax, logsumexp
from variables import drawn

from resnet_flax import create_model
from resnet_flax.cli import main
from resnet_flax.data.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from resnet_flax.data.sources import ArraySource, open_source
from resnet_flax.data.transforms import ScaleTransform, TenCropTransform
from resnet_flax.errors import UserError
from resnet_flax.evaluation.multi_view import (
    SCALES,
    Network,
    average,
    log_probabilities,
    make_views,
    measure,
    predict,
)
from resnet_flax.evaluation.pretrained import evaluate_pretrained
from resnet_flax.evaluation.result import Metrics
from resnet_flax.weights.torch_layout import export_torch

IMAGENET = (IMAGENET_MEAN, IMAGENET_STD)
NAMES = tuple("0123456")


class _Photographs(list):
    """Images of several shapes, as a source."""

    class_names = NAMES

    def __getitem__(self, index):
        return {"image": Image.fromarray(list.__getitem__(self, index)), "label": index % 7}


@pytest.fixture
def photographs():
    rng = np.random.default_rng(0)
    shapes = [(20, 20), (21, 35), (43, 20), (20, 60), (20, 35), (30, 30)]
    images = [rng.integers(0, 256, (h // 4 + 1, w // 4 + 1, 3), np.uint8) for h, w in shapes]
    large = [
        Image.fromarray(image).resize((w, h), Image.Resampling.BICUBIC)
        for image, (h, w) in zip(images, shapes, strict=True)
    ]
    return _Photographs(np.asarray(image) for image in large)


@pytest.fixture
def network():
    """A network of stride 4, for images of 16 pixels: its last map has 4 x 4 positions."""
    with jax.enable_x64(True):
        types = {"dtype": jnp.float64, "param_dtype": jnp.float64}
        widths = {"stage_features": (8, 16, 32), "stem_features": 8}
        model = create_model("cifar_resnet8", num_classes=7, **widths, **types)
        variables = drawn(model, jnp.zeros((1, 16, 16, 3)))
        # As initialised, it predicts nearly the same for all images.
        variables["params"]["head"]["kernel"] *= 30
        yield Network(model, variables, Preprocessing(16, 0.8, "bicubic"))


@functools.cache
def _compiled(model, **what):
    return jax.jit(partial(model.apply, train=False, **what))


def _apply(network, x, **what):
    return _compiled(network.model, **what)(network.variables, x)


def _logits(network, images):
    x = network.preprocessing.normalize(jnp.asarray(images), jnp.float64)
    return np.asarray(_apply(network, x))


def _mean(logits):
    """The logarithm of the mean probability over the views `[v, classes]`."""
    return logsumexp(log_softmax(logits, -1), axis=0) - np.log(len(logits))


def _predicted(network, source, protocol, **settings):
    shape = network.preprocessing.transform(source[0]["image"]).shape
    return predict(network, source, make_views(protocol, network, shape, **settings), batch_size=3)


def test_multiscale_at_the_training_side_is_the_centre_crop(network, photographs):
    images = [photographs[i]["image"].resize((20, 20)) for i in range(6)]
    square = _Photographs(np.asarray(image) for image in images)
    whole = network._replace(preprocessing=Preprocessing(16, 1.0, "bicubic"))
    found = _predicted(whole, square, "multiscale", scales=[16])
    for i, log_p in enumerate(found.log_p):
        view = whole.preprocessing.transform(square[i]["image"])
        expected = _mean(_logits(whole, [view, view[:, ::-1]]))
        np.testing.assert_allclose(log_p, expected, rtol=1e-10, atol=1e-12)


def _windows(network, images):
    """The head on every 4 x 4 window of the last map separately: `[windows, b, classes]`."""
    x = network.preprocessing.normalize(jnp.asarray(images), jnp.float64)
    maps = _apply(network, x, return_features=True)["c4"]
    maps, head = np.asarray(maps), jax.device_get(network.variables["params"]["head"])
    _, h, w, _ = maps.shape
    pooled = [
        maps[:, y : y + 4, x : x + 4].mean((1, 2)) for y in range(h - 3) for x in range(w - 3)
    ]
    return np.stack(pooled) @ head["kernel"] + head["bias"]


def test_the_fully_convolutional_pass_is_the_head_window_by_window(network):
    images = np.random.default_rng(0).integers(0, 256, (2, 24, 32, 3), np.uint8)
    x = network.preprocessing.normalize(jnp.asarray(images), jnp.float64)
    found = _apply(network, x, pool_window=4)
    assert found.shape == (2, 3, 5, 7)
    expected = _windows(network, images).swapaxes(0, 1).reshape(found.shape)
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)


def test_ten_crop_is_ten_explicit_crops(network, photographs):
    found = _predicted(network, photographs, "ten_crop")
    for i, log_p in enumerate(found.log_p):
        resized = _resized(photographs[i]["image"], 20)
        h, w = resized.shape[:2]
        middle = round((h - 16) / 2), round((w - 16) / 2)
        places = [(0, 0), (0, w - 16), (h - 16, 0), (h - 16, w - 16), middle]
        crops = [resized[y : y + 16, x : x + 16] for y, x in places]
        crops += [crop[:, ::-1] for crop in crops]
        np.testing.assert_allclose(log_p, _mean(_logits(network, crops)), rtol=1e-10, atol=1e-12)


def _resized(image, shorter):
    w, h = image.size
    size = (shorter, shorter * h // w) if w <= h else (shorter * w // h, shorter)
    return np.asarray(image.resize(size, Image.Resampling.BICUBIC))


@pytest.mark.parametrize("exact", [False, long(True)])
def test_multiscale_is_each_scale_by_itself(network, photographs, exact):
    photographs = _Photographs([*photographs][:4])  # square, wide, high and very wide
    found = _predicted(network, photographs, "multiscale", scales=[16, 24], exact=exact)
    for i, log_p in enumerate(found.log_p):
        of_scales = []
        for shorter in (16, 24):
            resized = _resized(photographs[i]["image"], shorter)
            h, w = resized.shape[:2]
            if not exact:
                dy, dx = (h - shorter) % 4, (w - shorter) % 4
                top, left = round(dy / 2), round(dx / 2)
                resized = resized[top : top + h - dy, left : left + w - dx]
            logits = _windows(network, np.stack([resized, resized[:, ::-1]]))
            of_scales.append(_mean(logits.reshape(-1, 7)))
        expected = logsumexp(of_scales, axis=0) - np.log(2)
        np.testing.assert_allclose(log_p, expected, rtol=1e-10, atol=1e-12)


def test_at_most_forty_shapes_a_scale():
    for shorter in SCALES:
        shapes = set()
        for longer in range(shorter, 5 * shorter, 13):
            for size in ((shorter, longer), (longer, shorter)):
                shape = ScaleTransform(shorter)(Image.new("RGB", size)).shape
                assert min(shape[:2]) == shorter
                assert max(shape[:2]) % 32 == 0
                assert max(shape[:2]) > min(longer, shorter + 19 * 32) - 32
                shapes.add(shape)
        assert 20 < len(shapes) <= 40


def test_predictions_do_not_depend_on_batches_and_devices(network, photographs):
    views = make_views("multiscale", network, (16, 16, 3), scales=[24])
    first = predict(network, photographs, views, batch_size=7, devices=jax.devices()[:1])
    for batch_size, devices, workers in ((1, 1, 0), (5, 8, 1)):
        other = predict(
            *(network, photographs, views),
            batch_size=batch_size,
            devices=jax.devices()[:devices],
            workers=workers,
        )
        np.testing.assert_allclose(other.log_p, first.log_p, rtol=1e-10, atol=1e-12)
        np.testing.assert_array_equal(other.label, first.label)


def test_an_ensemble_averages_probabilities(network, photographs):
    params = jax.tree.map(lambda leaf: leaf * 1.1, network.variables["params"])
    other = network._replace(variables={**network.variables, "params": params})
    both = [_predicted(one, photographs, "center") for one in (network, other)]
    p = np.mean([np.exp(one.log_p) for one in both], axis=0)
    np.testing.assert_allclose(np.exp(average(both).log_p), p, rtol=1e-10)
    result = evaluate_pretrained([network, other], photographs, batch_size=4, confusion=True)
    assert result.errors == (p.argmax(1) != np.arange(6)).sum()
    expected = np.zeros((7, 7), int)
    expected[np.arange(6), p.argmax(1)] += 1
    np.testing.assert_array_equal(result.confusion, expected)


def test_the_confusion_matrix_of_one_view_is_that_of_its_predictions(network):
    rng = np.random.default_rng(1)
    source = ArraySource(
        rng.integers(0, 256, (50, 17, 17, 3), np.uint8), rng.integers(0, 7, 50), NAMES
    )
    result = evaluate_pretrained([network], source, batch_size=16, confusion=True)
    found = _predicted(network, source, "center")
    np.testing.assert_array_equal(
        result.confusion, measure(found, source, Metrics(7, confusion=True)).confusion
    )
    matrix = np.array(result.confusion)
    assert matrix.sum() == 50
    assert matrix.trace() == 50 - result.errors
    assert tuple(matrix.sum(1)) == result.class_counts
    assert evaluate_pretrained([network], source, batch_size=16).confusion is None


def test_the_matrix_counts_any_of_several_right_classes_as_right():
    logits = jnp.array([[0.0, 5, 0], [0, 5, 0], [5, 0, 0]])
    valid_labels = jnp.array([[True, True, False], [False, False, True], [True, False, False]])
    metrics = Metrics(3, confusion=True)
    labels, mask = jnp.array([0, 2, 0]), jnp.ones(3, bool)
    states = metrics.add(metrics.zeros(), logits, labels, mask, valid_labels)
    result = metrics.result(states, 3, 3)
    assert result.errors == 1
    np.testing.assert_array_equal(result.confusion, [[2, 0, 0], [0, 0, 0], [0, 1, 0]])


def test_a_mean_image_becomes_a_mean_colour_at_other_sizes(network):
    mean = np.full((16, 16, 3), 100.0)
    mean[:8] = 140
    by_image = Preprocessing(16, 1.0, mean=(0.0,), std=(0.25,), pixel_mean=tuple(mean.tolist()))
    (view,) = make_views("multiscale", network._replace(preprocessing=by_image), (16, 16, 3), [16])
    image = jnp.full((1, 16, 24, 3), 120, jnp.uint8)
    np.testing.assert_allclose(view.preprocessing.normalize(image), 0, atol=1e-6)


def test_probabilities_too_small_for_a_float_stay_finite(network):
    params = jax.tree.map(lambda leaf: leaf, network.variables["params"])
    params["head"] = {"kernel": params["head"]["kernel"] * 1e4, "bias": params["head"]["bias"]}
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 16, 16, 3), np.uint8)
    log_p = log_probabilities(
        {**network.variables, "params": params},
        jnp.asarray(images),
        model=network.model,
        prepare=network.preprocessing.normalize,
        flip=True,
        pool_window=0,
    )
    assert np.isfinite(log_p).all()
    assert log_p.min() < -1000


def test_protocols_that_do_not_apply_are_explained(network):
    whole = network._replace(preprocessing=Preprocessing(0))
    with pytest.raises(UserError, match="ten_crop needs images that are larger than the crops"):
        make_views("ten_crop", whole, (32, 32, 3))
    with pytest.raises(UserError, match="the scale 12 is less than the side 16"):
        make_views("multiscale", network, (16, 16, 3), [24, 12])


def test_the_paper_s_scales_are_the_default_at_224():
    model = create_model("resnet18")
    shapes = jax.eval_shape(
        partial(model.init, train=False), jax.random.key(0), jnp.zeros((1, 64, 64, 3))
    )
    network = Network(model, shapes, Preprocessing())
    views = make_views("multiscale", network, (224, 224, 3))
    assert [view.transform.shorter for view in views] == [224, 256, 384, 480, 640]
    # No scale is smaller, even if the side is not a multiple of the stride.
    for side in (208, 232, 240, 299):
        sides = [s.transform.shorter for s in make_views("multiscale", network, (side, side, 3))]
        assert min(sides) >= side
        assert len(sides) >= 4
    assert {(view.pool_window, view.flip, view.transform.multiple) for view in views} == {
        (7, True, 32)
    }
    (ten,) = make_views("ten_crop", network, (224, 224, 3))
    assert ten.transform == TenCropTransform(224, 256)


@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("torch", "torchvision", "timm"))),
    reason="needs torch, torchvision and timm",
)
@pytest.mark.parametrize("protocol", ["center", "ten_crop", "multiscale"])
def test_torch_computes_the_same_of_photographs(shared_data, protocol):
    """Random weights, torchvision's network and transforms, softmax and averages in torch."""
    import torch_networks
    from torchvision.transforms import functional as F  # noqa: N812
    from torchvision.transforms.functional import InterpolationMode

    torch, name = torch_networks.torch, "resnet18"
    theirs = torch_networks.torch_network(name).eval()
    variables = golden.random_variables(name)
    model = golden.network(name, jnp.float64)
    torch_networks.load(theirs, export_torch(variables, model, "torchvision"))
    head, theirs.fc, theirs.avgpool = theirs.fc, torch.nn.Identity(), torch.nn.Identity()
    with jax.enable_x64(True):
        source = open_source(f"folder:{shared_data / 'imagenet_sample'}", "train")
        few = _Photographs(np.asarray(source[i]["image"]) for i in (0, 60, 133, 200))
        network = Network(model, variables, Preprocessing(96, 0.75, "bicubic"))
        found = _predicted(network, few, protocol, scales=[96, 128])

    def windows(image):
        x = F.normalize(F.to_tensor(image).double(), *IMAGENET)[None]
        flat = theirs(x)  # torchvision flattens after the pool that was removed
        h, w = (-(-side // 32) for side in x.shape[2:])
        maps = torch.nn.functional.avg_pool2d(flat.view(1, 512, h, w), 3, stride=1)
        return torch.softmax(head(maps[0].flatten(1).T), 1)

    def views(image):
        def resized(side):
            return F.resize(image, side, InterpolationMode.BICUBIC)

        if protocol == "center":
            return [[F.center_crop(resized(128), 96)]]
        if protocol == "ten_crop":
            # Not F.ten_crop, whose centre crop of the flipped image is off by one at odd margins.
            crops = F.five_crop(resized(128), 96)
            return [[*crops, *map(F.hflip, crops)]]
        scales = []
        for side in (96, 128):
            whole = resized(side)
            w, h = (s - (s - side) % 32 for s in whole.size)
            cropped = F.center_crop(whole, [h, w])
            scales.append([cropped, F.hflip(cropped)])
        return scales

    for i, log_p in enumerate(found.log_p):
        with torch.no_grad():
            scales = [
                torch.cat([windows(v) for v in each]).mean(0) for each in views(few[i]["image"])
            ]
        expected = torch.stack(scales).mean(0).numpy()
        np.testing.assert_allclose(np.exp(log_p), expected, rtol=1e-6)


def test_the_command_line_knows_protocols_ensembles_and_the_matrix(shared_data, tmp_path, capsys):
    weights = [
        str(shared_data / f"weights/{n}") for n in ("resnet20-12fca82f.th", "resnet56-4bfd9763.th")
    ]
    out, matrix = tmp_path / "out.json", tmp_path / "confusion.csv"
    flags = [
        *("--data=tfds:cifar10", f"--data_dir={shared_data / 'tfds'}", "--split=test[:50]"),
        *("--protocol=multiscale", "--scales=32,36", f"--ensemble={weights[1]}"),
        *(f"--out={out}", f"--confusion={matrix}"),
    ]
    assert main(["eval", weights[0], *flags]) == 0
    assert "multiscale" in capsys.readouterr().out
    written = json.loads(out.read_text())
    assert written["scales"] == [32, 36]
    assert written["ensemble"][0]["model"].startswith("cifar_resnet56")
    assert written["top1_error"]["count"] == 50
    rows = list(csv.reader(matrix.read_text().splitlines()))
    assert len(rows) == 11
    counts = np.array([[int(n) for n in row[1:]] for row in rows[1:]])
    assert counts.sum() - counts.trace() == written["top1_error"]["errors"]
