"""Evaluation does not depend on batches, workers and devices, and counts correctly."""

import importlib.util
import io
import json
import re

import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from variables import drawn

from resnet_flax import create_model
from resnet_flax.apply.experiment import train
from resnet_flax.cli import main
from resnet_flax.cli.eval_report import describe
from resnet_flax.data.decoding import load
from resnet_flax.data.preprocessing import Preprocessing
from resnet_flax.data.sources import ArraySource, open_source
from resnet_flax.data.sources.tfds import SEVERAL_LABELS, TfdsSource
from resnet_flax.errors import UserError
from resnet_flax.evaluation.labels import as_outputs
from resnet_flax.evaluation.multi_view import Network
from resnet_flax.evaluation.pretrained import evaluate_pretrained, report
from resnet_flax.weights.loading import load_pretrained
from resnet_flax.weights.torch_layout import export_torch

NAMES = tuple("0123456789")
SMALL = {"stage_sizes": (1, 1), "stage_features": (8, 16), "stem_features": 8}


@pytest.fixture
def source():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (101, 9, 11, 3), np.uint8)
    return ArraySource(images, rng.integers(0, 10, 101), NAMES)


@pytest.mark.usefixtures("x64")
def test_the_result_is_the_same_with_any_batch_workers_and_devices(source):
    types = {"dtype": jnp.float64, "param_dtype": jnp.float64}
    model = create_model("cifar_resnet8", **SMALL, **types)
    variables = drawn(model, jnp.zeros((1, 8, 8, 3)))
    preprocessing = Preprocessing(size=8, crop_fraction=0.9)
    settings = [
        {"batch_size": size, "devices": jax.devices()[:devices], "workers": workers}
        for size, devices, workers in ((101, 1, 0), (7, 1, 0), (30, 8, 0), (13, 2, 2), (200, 4, 0))
    ]
    first, *others = (
        evaluate_pretrained([Network(model, variables, preprocessing)], source, **s)
        for s in settings
    )
    assert first.count == 101
    assert 0.5 < first.error < 1
    for other in others:
        assert (other.class_counts, other.class_errors) == (first.class_counts, first.class_errors)
        assert (other.error, other.top5_error) == (first.error, first.top5_error)
        for name in ("loss", "calibration_error"):
            assert getattr(other, name) == pytest.approx(getattr(first, name), rel=1e-12)


def test_weights_that_give_no_numbers_are_explained(source):
    model = create_model("cifar_resnet8", **SMALL)
    variables = drawn(model, jnp.zeros((1, 8, 8, 3)))
    variables["params"]["head"]["bias"] *= np.nan
    with pytest.raises(UserError, match="loss is nan: its weights are damaged"):
        evaluate_pretrained([Network(model, variables, Preprocessing(0))], source, batch_size=10)


def test_images_that_cannot_be_normalised_are_explained(source):
    model = create_model("cifar_resnet8", **SMALL)
    variables = drawn(model, jnp.zeros((1, 8, 8, 3)))
    two = Preprocessing(0, mean=(0.5, 0.4))
    image = Preprocessing(0, mean=(0.0,), pixel_mean=tuple(np.zeros((8, 8, 3)).tolist()))
    for preprocessing, message in (
        (two, r"mean=0.5,0.4 has 2 numbers, but the images have 3 channels"),
        (image, r"the mean image has shape \[8, 8, 3\], the images \[9, 11, 3\]"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate_pretrained([Network(model, variables, preprocessing)], source, batch_size=10)


class _Pictures:
    """Five pictures: two with transparent pixels, one of these turned, and one other turned."""

    class_names = NAMES

    def __len__(self):
        return 5

    def __getitem__(self, index):
        levels = np.random.default_rng(index).integers(0, 256, (16, 20, 4), np.uint8)
        image = Image.fromarray(levels if index in (1, 4) else levels[..., :3])
        if index in (0, 4):
            image.getexif()[0x0112] = 6
            image.info["exif"] = image.getexif().tobytes()
        return {"image": image, "label": index}


def test_what_is_ignored_of_images_is_said_once_with_its_number():
    model = create_model("cifar_resnet8", **SMALL)
    variables = drawn(model, jnp.zeros((1, 8, 8, 3)))

    def said(preprocessing, protocol="center"):
        sentences = []
        settings = {"protocol": protocol, "batch_size": 2, "warn": sentences.append, "flags": "--"}
        evaluate_pretrained([Network(model, variables, preprocessing)], _Pictures(), **settings)
        return sentences

    expected = [
        "warning: 2 images have an alpha channel, which is dropped (of 5), as torchvision's loader "
        "does; --alpha=white shows them on white",
        "warning: 2 images have an EXIF orientation, which is ignored (of 5), as torchvision's "
        "loader does; --exif=on turns them upright",
    ]
    published = Preprocessing(8, 0.8)
    assert said(published) == expected
    assert said(published, "ten_crop") == expected
    assert said(Preprocessing(8, 0.8, exif="on", alpha="white")) == []
    with pytest.raises(UserError, match="an image has transparent pixels, which alpha=error"):
        said(Preprocessing(8, 0.8, alpha="error"))
    with pytest.raises(UserError, match=r"takes images of 3 .* have 1; convert .*--channels=3"):
        said(Preprocessing(8, 0.8, channels=1))


class _Real(list):
    """Examples as those of TFDS's imagenet2012_real: several labels, or none."""

    def __getitem__(self, index):
        file = io.BytesIO()
        Image.fromarray(np.full((8, 8, 3), 5 * index, np.uint8)).save(file, "PNG")
        several = np.array([[], [1], [2, 3]][index % 3], np.int64)
        return {"image": file.getvalue(), "original_label": 4, "real_label": several}


def test_a_label_set_counts_what_has_a_label():
    assert SEVERAL_LABELS["imagenet2012_real"][2] == {"validation": 46_837}
    features = tfds.builder("imagenet2012_real").info.features
    assert {"original_label", "real_label"} <= set(features)
    # ImageNet-V2 is an ordinary data set, with the same classes.
    again = tfds.builder("imagenet_v2/matched-frequency").info.features
    names = tfds.builder("imagenet2012").info.features["label"].names
    assert again["label"].names == features["original_label"].names == names
    labels = SEVERAL_LABELS["imagenet2012_real"][:2]
    real = TfdsSource("tfds:imagenet2012_real", _Real(range(30)), NAMES, 3, labels, 20)
    model = create_model("cifar_resnet8", **SMALL)
    variables = drawn(model, jnp.zeros((1, 8, 8, 3)))
    # A network that predicts 3 for every image: correct with {2, 3}, wrong with {1}.
    head = variables["params"]["head"]
    head["kernel"] *= 0
    head["bias"] = head["bias"].at[3].set(5.0)
    result = evaluate_pretrained([Network(model, variables, Preprocessing(0))], real, batch_size=7)
    assert (result.count, result.errors, result.error) == (20, 10, 0.5)
    wrong = TfdsSource("tfds:imagenet2012_real", _Real(range(30)), NAMES, 3, labels, 21)
    with pytest.raises(RuntimeError, match="counted 20 labelled examples of 21"):
        evaluate_pretrained([Network(model, variables, Preprocessing(0))], wrong, batch_size=7)
    # Under other names, in another order.
    swapped = as_outputs(real, (*NAMES[::-1], "x"), 11)
    np.testing.assert_array_equal(np.flatnonzero(swapped[2]["valid_labels"]), [6, 7])
    assert swapped[2]["label"] == 5


def _eval(capsys, *arguments):
    status = main(["eval", *map(str, arguments)])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def test_a_run_is_evaluated_as_it_evaluated_itself(config, tmp_path, capsys):
    config.data.pixel_mean = True
    config.data.mean = (0.0,)
    result = train(config, tmp_path / "run")
    out = tmp_path / "r.json"
    capsys.readouterr()
    status, printed, _ = _eval(capsys, tmp_path / "run", "--batch_size=77", "--out", out)
    assert status == 0
    found = json.loads(out.read_text())
    assert found["top1_error"]["errors"] == result.errors
    assert found["preprocessing"]["pixel_mean"] is True
    assert found["negative_log_likelihood"] == pytest.approx(result.loss, rel=1e-5)
    assert found["count"] == sum(c["count"] for c in found["classes"].values()) == 360
    assert {"commit", "device", "jax"} <= found.keys() | found.get("versions", {}).keys()
    assert f"{100 * result.error:.2f} %" in printed
    lines = [line for line in printed.splitlines()[1:] if not line.startswith("written to")]
    assert max(map(len, lines)) <= 80


def test_published_weights_make_their_published_errors(shared_data, tmp_path, capsys):
    out = tmp_path / "r.json"
    status, printed, _ = _eval(
        capsys,
        shared_data / "weights/resnet20-12fca82f.th",
        "--data=tfds:cifar10",
        f"--data_dir={shared_data / 'tfds'}",
        f"--out={out}",
    )
    assert status == 0
    found = json.loads(out.read_text())
    assert abs(found["top1_error"]["errors"] - 827) <= 2
    assert found["count"] == 10_000
    assert found["model"] == "cifar_resnet20.akamaster_cifar10"
    assert "8.2" in printed


@pytest.mark.long
def test_published_resnet56_makes_its_published_errors(shared_data, tmp_path, capsys):
    out = tmp_path / "r.json"
    weights = shared_data / "weights/resnet56-4bfd9763.th"
    data = ("--data=tfds:cifar10", f"--data_dir={shared_data / 'tfds'}", f"--out={out}")
    assert _eval(capsys, "cifar_resnet56", f"--weights={weights}", *data)[0] == 0
    assert abs(json.loads(out.read_text())["top1_error"]["errors"] - 661) <= 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--protocol=corners"],
            "--protocol must be center, ten_crop or multiscale, not 'corners'",
        ),
        (["--batch_size=0"], "--batch_size must be a whole number from 1 to 1048576, not '0'"),
        (["--dtype=int8"], "--dtype must be float32 or bfloat16, not 'int8'"),
        (["--size=-1"], "--size must be a whole number from 0 to 16384, not '-1'"),
        (["--crop_fraction=1.5"], "--crop_fraction must be a number from 0.05 to 1, not '1.5'"),
        (["--crop_fraction=1e-5"], "--crop_fraction must be a number from 0.05 to 1"),
        (["--interpolation=cubic"], "--interpolation must be bilinear or bicubic, not 'cubic'"),
        (["--mean=nan"], "--mean must be one number, or one for each channel"),
        (["--mean=0.5,0.4"], "error: --mean=0.5,0.4 has 2 numbers, but the images have 3 channels"),
        (
            ["--out=/proc/x/y.json"],
            "--out must be a file that can be written, not '/proc/x/y.json': ",
        ),
        (["--mean=a,b"], "--mean must be one number, or one for each channel separated by commas"),
        (["--std=0"], "--std must be one number other than 0, or one for"),
        (["--split=valid"], "has no split 'valid'"),
        (["--data=tfds:digits", "--split=test"], "of the data's 10 classes are not among the netw"),
        (["--model=resnet18"], "itself as a network other than resnet18; leave resnet18 out"),
        (["--fast"], "there is no flag '--fast'"),
    ],
)
def test_bad_arguments_are_one_sentence(shared_data, data_dir, capsys, arguments, message):
    weights = shared_data / "weights/resnet20-12fca82f.th"
    where = data_dir if "--data=tfds:digits" in arguments else shared_data / "tfds"
    base = ["--data=tfds:cifar10", f"--data_dir={where}"]
    status, _, error = _eval(capsys, weights, *base, *arguments)
    assert status == 2
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"size": -1}, "size of a preprocessing must be a number of pixels from 0 to 16384"),
        ({"crop_fraction": 1.5}, "crop_fraction of a preprocessing must be a number from 0.05"),
        ({"crop_fraction": 1e-5}, "crop_fraction of a preprocessing must be a number from 0.05"),
        ({"interpolation": "cubic"}, "must be one of bilinear, bicubic, not 'cubic'"),
        ({"mean": (float("nan"),)}, "mean of a preprocessing must be finite numbers"),
        ({"std": (0.0,)}, "std of a preprocessing must be finite numbers other than 0"),
    ],
)
def test_a_preprocessing_from_a_file_is_checked_too(values, message):
    with pytest.raises(UserError, match=re.escape(message)):
        Preprocessing(**values)


def test_what_is_not_said_is_asked_for(shared_data, tmp_path, capsys):
    model = create_model("cifar_resnet8")
    variables = drawn(model, jnp.zeros((1, 8, 8, 3)))
    np.savez(tmp_path / "w.npz", **export_torch(variables, model, "akamaster"))
    command = [tmp_path / "w.npz", "--model=cifar_resnet8"]
    assert "has no data set of its own; pass --data=" in _eval(capsys, *command)[2]
    command += ["--data=tfds:cifar10", f"--data_dir={shared_data / 'tfds'}", "--split=test[:50]"]
    assert "it is unknown how images" in _eval(capsys, *command)[2]
    status, printed, _ = _eval(capsys, *command, "--mean=0.5", "--std=0.25")
    assert status == 0
    assert "of 50" in printed
    assert "test[:50] (50 images), center: images as they are\n" in printed


@pytest.mark.parametrize(
    ("protocol", "scales", "size", "text"),
    [
        ("center", (), 0, "images as they are"),
        ("center", (), 16, "crop of 16 from a shorter side of 18, bilinear"),
        ("ten_crop", (), 16, "crops of 16 from a shorter side of 18, bilinear, with mirror images"),
        ("multiscale", (32, 36), 0, "shorter sides 32, 36, bilinear, with mirror images"),
    ],
)
def test_views_are_described(protocol, scales, size, text):
    assert describe(Preprocessing(size), protocol, scales) == text


def test_the_scales_that_are_taken_by_default_are_printed(config, tmp_path, capsys):
    config.steps, config.optim.warmup_steps, config.eval.every = 2, 1, 0
    train(config, tmp_path / "run")
    command = [tmp_path / "run", "--protocol=multiscale", "--split=test[:20]"]
    _, printed, _ = _eval(capsys, *command)
    assert "multiscale: shorter sides 8, " in printed
    assert "multiscale: shorter sides 12, 16, bil" in _eval(capsys, *command, "--scales=12,16")[1]
    status, _, error = _eval(capsys, tmp_path / "run", "--weights=w.pth")
    assert status == 2
    assert (
        f"{tmp_path / 'run'} is a workdir or checkpoint and has weights; leave out --wei" in error
    )
    _, _, error = _eval(capsys, tmp_path / "run", "--model=resnet50")
    assert f"run already names its network, cifar_resnet8; give {tmp_path / 'run'} alone" in error


@pytest.mark.filterwarnings("ignore")
@pytest.mark.long
@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("torch", "torchvision", "timm"))),
    reason="needs torch, torchvision and timm",
)
@pytest.mark.parametrize(
    "name",
    [name for name in networks.CASES if "dilated" not in name and "cifar" not in name],
)
def test_photographs_are_predicted_as_torch_does(shared_data, tmp_path, name):
    """Random weights, torch's own transforms, each of the 400 photographs separately."""
    import torch_networks
    from safetensors.torch import save_file
    from torchvision import transforms as T  # noqa: N812

    torch = torch_networks.torch
    theirs = torch_networks.torch_network(name).float().eval()
    model = networks.network(name, jnp.float32)
    variables = jax.tree.map(np.float32, networks.random_variables(name))
    layout = networks.CASES[name][1].removesuffix("_v1")
    torch_networks.load(theirs, export_torch(variables, model, layout))
    save_file(theirs.state_dict(), tmp_path / "w.safetensors")
    loaded = load_pretrained(tmp_path / "w.safetensors", model)

    preprocessing = Preprocessing(size=96, crop_fraction=0.875, interpolation="bicubic")
    transform = T.Compose(
        [
            T.Resize(int(96 / 0.875), T.InterpolationMode.BICUBIC),
            T.CenterCrop(96),
            T.ToTensor(),
            T.Normalize(preprocessing.mean, preprocessing.std),
        ]
    )
    source = open_source(f"folder:{shared_data / 'imagenet_sample'}", "train")
    assert len(source) == 400

    @jax.jit
    def ours(images):
        return model.apply(loaded, preprocessing.normalize(images), train=False)

    files = sorted((shared_data / "imagenet_sample/train").glob("*/*"))
    found, expected = [], []
    for start in range(0, 400, 50):
        part = range(start, start + 50)
        found.append(ours(np.stack([preprocessing.transform(source[i]["image"]) for i in part])))
        inputs = torch.stack([transform(load(files[i], str(files[i]), 3)) for i in part])
        with torch.no_grad():
            expected.append(theirs(inputs).numpy())
    logits, expected = np.concatenate(found), np.concatenate(expected)
    assert np.abs(logits - expected).max() < 1e-4 * np.abs(expected).max()
    # With random weights one class always wins; with this bias of the head, each sometimes does.
    bias = expected.mean(0)
    predictions, theirs = (logits - bias).argmax(1), (expected - bias).argmax(1)
    assert len(set(theirs)) >= 5
    np.testing.assert_array_equal(predictions, theirs)


def test_the_report_has_an_interval_for_each_rate(source):
    model = create_model("cifar_resnet8", **SMALL)
    variables = drawn(model, jnp.zeros((1, 8, 8, 3)))
    result = evaluate_pretrained(
        [Network(model, variables, Preprocessing(0))], source, batch_size=50
    )
    reported = report(result, NAMES)
    rates = [reported["top1_error"], reported["top5_error"], *reported["classes"].values()]
    assert len(rates) == 12
    for rate in rates:
        low, high = rate["interval"]
        assert low <= rate["rate"] == rate["errors"] / rate["count"] <= high
        assert high - low < 1
