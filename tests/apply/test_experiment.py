"""Trainings that are started from Python: on arrays and folders, and from given weights."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from experiments import TINY
from PIL import Image
from variables import drawn

import resnet_flax
from resnet_flax import UserError, create_model, parse_overrides
from resnet_flax import config as configs
from resnet_flax.apply import tables
from resnet_flax.apply.experiment import make_run
from resnet_flax.apply.given_data import as_source, with_source
from resnet_flax.apply.initial import starting_from
from resnet_flax.apply.tables import check, keys
from resnet_flax.config import conflicts, flatten, load_config
from resnet_flax.data import ArraySource
from resnet_flax.data.experiment import make_preprocessing, make_transforms
from resnet_flax.data.preprocessing import Preprocessing
from resnet_flax.data.sources import open_source
from resnet_flax.training.checkpoint_files import read_meta
from resnet_flax.training.resume import check_config
from resnet_flax.weights.loading import Pretrained, export, load
from resnet_flax.weights.torch_layout import export_torch

SMALL = {"stage_sizes": (1, 1), "stage_features": (8, 16), "stem_features": 8}


def _bars(n, seed):
    """Horizontal bars, labelled 1, and vertical ones in noise: `(images, labels)`."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 100, (n, 8, 8, 1), np.uint8)
    labels = rng.integers(0, 2, n)
    for image, label in zip(images, labels, strict=True):
        (image if label else image.swapaxes(0, 1))[rng.integers(8)] = 255
    return images, labels


def _config(**settings):
    config = resnet_flax.default_config()
    config.model.name, config.model.overrides = "cifar_resnet8", TINY
    config.steps, config.batch_size = 30, 64
    config.log.tensorboard = False
    for key, value in settings.items():
        config.update_from_flattened_dict({key: value})
    return config


def test_arrays_train_a_network_which_is_loaded_and_continues(tmp_path, capsys):
    workdir, train, test = tmp_path / "run", _bars(512, 0), _bars(200, 1)
    result = resnet_flax.train(_config(), workdir, data=train, eval_data=test)
    assert (result.count, result.error < 0.1) == (200, True)
    found = load(workdir)
    assert found.class_names == ("0", "1")
    with pytest.raises(UserError, match="the run was trained on arrays that a Python program gave"):
        open_source(found.config["data.source"], "test")
    again = resnet_flax.train(_config(), workdir, data=train, eval_data=test)
    assert again == result
    assert "is finished at step 30" in capsys.readouterr().out
    train[0][0, 0, 0] = 7
    with pytest.raises(UserError, match="of the training images, its fingerprint differs"):
        resnet_flax.train(_config(), workdir, data=train, eval_data=test)


def test_arrays_can_be_evaluated_on_a_part_that_is_held_out(tmp_path):
    config = _config(steps=4)
    with pytest.raises(UserError, match=r"no images for the evaluation; give eval_data=, or eval"):
        resnet_flax.train(config, tmp_path / "a", data=_bars(128, 0))
    config.data.holdout, config.data.eval_split = 0.25, "holdout"
    assert resnet_flax.train(config, tmp_path / "a", data=_bars(128, 0)).count == 32
    names = ("vertical", "horizontal")
    source = ArraySource(*_bars(128, 0), names)
    resnet_flax.train(config, tmp_path / "b", data=source)
    assert load(tmp_path / "b").class_names == names


def test_a_directory_is_its_folder_source(tmp_path):
    for split, n in (("train", 40), ("val", 12)):
        for i, (image, label) in enumerate(zip(*_bars(n, n), strict=True)):
            file = tmp_path / "photos" / split / f"class{label}" / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[..., 0]).save(file)
    config = _config(steps=2, batch_size=8)
    result = resnet_flax.train(config, tmp_path / "run", data=tmp_path / "photos")
    assert result.count == 12
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved["data.source"] == f"folder:{tmp_path / 'photos'}"
    assert saved["data.eval_split"] == "val"
    assert config.data.source == "tfds:digits"  # the caller's config is as it was


@pytest.mark.parametrize(
    ("data", "eval_data", "message"),
    [
        ({"images": 1}, None, "data must be a directory, the name of a data set such as"),
        ((np.zeros((4, 8, 8)), np.zeros(4, int)), None, "images must be uint8"),
        ((np.zeros((4, 8, 8, 1), np.uint8), np.zeros(4)), None, "labels must be 4 whole numbers"),
        (
            (np.zeros((9, 8, 8, 1), np.uint8), np.zeros(9, int)),
            (np.zeros((9, 8, 8, 1), np.uint8), np.arange(9)),
            r"evaluation has 9 classes \(0, 1, 2, 3, 4, ...\), the training 1 class \(0\); give",
        ),
    ],
)
def test_data_that_cannot_be_used_is_explained(tmp_path, data, eval_data, message):
    with pytest.raises(UserError, match=message):
        resnet_flax.train(_config(), tmp_path / "run", data=data, eval_data=eval_data)


def test_a_config_file_is_named_by_its_path(tmp_path):
    for name in ("configs/nothing.py", Path("configs/nothing.py")):
        with pytest.raises(UserError, match=r"there is no config file configs/nothing\.py"):
            resnet_flax.train(name, tmp_path)


@pytest.mark.parametrize("type_", [np.uint8, np.int64])
def test_labels_of_any_integer_type_are_taken(type_):
    images, labels = _bars(8, 0)
    source = as_source((images, labels.astype(type_)), "train", resnet_flax.default_config().data)
    assert source.class_names == ("0", "1")
    np.testing.assert_array_equal(source.labels, labels)


def test_images_of_a_folder_are_upright_and_on_white_and_those_of_others_as_stored(tmp_path):
    data = resnet_flax.default_config()
    for source, expected in (("folder:x", ("on", "white")), ("tfds:x", ("off", "drop"))):
        data.data.source = source
        for config in (data, check(data), check(check(data))):
            found = make_preprocessing(config.data)
            assert (found.exif, found.alpha) == expected
            assert [transform.pixels for transform in make_transforms(config.data)] == [
                found.pixels,
                found.pixels,
            ]
    for name in ("imagenet", "imagenet_paper"):  # as in published figures, also from folders
        config = load_config(f"configs/{name}.py")
        config.data.source = "folder:x"
        assert check(config).data.exif == "off"
        assert check(config).data.alpha == "drop"


def test_a_run_from_before_these_keys_continues_as_it_began():
    config = resnet_flax.default_config()
    for source, expected in (
        ("tfds:digits", {}),
        ("folder:x", {"data.exif": ("off", "on"), "data.alpha": ("drop", "white")}),
    ):
        config.data.source = source
        now = check(config)
        saved = {k: v for k, v in flatten(now).items() if k not in ("data.exif", "data.alpha")}
        assert conflicts(now, saved, keys()) == expected
    with pytest.raises(UserError, match=r"pass --config.data.exif=off --config.data.alpha="):
        check_config(now, keys(), {"config": saved, "step": 0}, Path("runs/x"))
    config.data.exif, config.data.alpha = "off", "drop"
    assert conflicts(check(config), saved, keys()) == {}


def test_a_policy_needs_grey_or_rgb():
    images = np.zeros((8, 6, 6, 4), np.uint8)
    splits = (ArraySource(images, [0, 1] * 4, ("a", "b")),) * 2
    settings = {"data.policy": "trivialaugment", "data.resident": False, "data.in_memory": False}
    config = _config(batch_size=8, **settings)
    with pytest.raises(UserError, match=r"data.policy changes grey .* 4 channels; set it to none"):
        make_run(check(config), splits=splits)


def test_a_run_keeps_how_images_are_read(tmp_path):
    for i in range(16):
        image = np.zeros((6, 8, 4), np.uint8)  # nothing in RGB, and nothing in the alpha channel
        file = tmp_path / "photos" / "train" / f"class{i % 2}" / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(file)
    (tmp_path / "photos" / "val").symlink_to(tmp_path / "photos" / "train")
    config = _config(batch_size=8)
    config.data.in_memory = True
    run = make_run(check(with_source(config, tmp_path / "photos")))
    made = Preprocessing.from_json(run.about["preprocessing"])
    assert (made.exif, made.alpha) == ("on", "white")
    np.testing.assert_array_equal(run.train_source.images[0], 255)
    assert run.notes == []
    config.data.alpha = "drop"
    run = make_run(check(with_source(config, tmp_path / "photos")))
    np.testing.assert_array_equal(run.eval_source.images[1], 0)
    assert run.notes == [
        "warning: 16 images have an alpha channel, which is dropped (of those looked at in "
        "'val'), as torchvision's loader does; data.alpha=white shows them on white"
    ]
    config.data.alpha = "error"
    with pytest.raises(UserError, match=r"class0/0.png has transparent pixels, which alpha=error"):
        make_run(check(with_source(config, tmp_path / "photos")))


def test_weights_for_other_channels_are_named_with_the_key_that_converts(tmp_path):
    model = create_model("cifar_resnet8", num_classes=2, **SMALL)
    variables = drawn(model, jnp.zeros((1, 8, 8, 3)))
    export(Pretrained(model, variables, None, (), "it"), tmp_path / "rgb.safetensors")
    splits = tuple(ArraySource(*_bars(64, seed), ("a", "b")) for seed in (0, 1))
    config = _config(init=str(tmp_path / "rgb.safetensors"))
    run = make_run(check(config), splits=splits)
    with pytest.raises(
        UserError, match=r"init=\S+ takes images of 3 channels, but .* 1; .* data.channels=3"
    ):
        run.initial()
    config.data.channels = 3
    make_run(check(config), splits=splits).initial()


def test_training_starts_from_given_weights(tmp_path):
    data = _bars(256, 0)
    resnet_flax.train(_config(), tmp_path / "first", data=data, eval_data=data)
    first = load(tmp_path / "first")
    config = tables.check(_config(init=str(tmp_path / "first"), seed=3))
    splits = (ArraySource(*data, ("a", "b")),) * 2
    run = make_run(config, splits=splits)
    state, notes = run.initial_state()
    jax.tree.map(np.testing.assert_array_equal, state.variables, first.variables)
    assert int(state.step) == 0
    assert notes == [f"starting from step 30 of {tmp_path / 'first'}"]
    more = ArraySource(*data, ("a", "b", "c"))
    run = make_run(config, splits=(more, more))
    state, notes = run.initial_state()
    assert "its head of 2 classes is replaced by a new one" in notes[0]
    params = state.params
    assert params["head"]["kernel"].shape == (16, 3)
    kernel = first.variables["params"]["stage1_block1"]["conv1"]["kernel"]
    np.testing.assert_array_equal(params["stage1_block1"]["conv1"]["kernel"], kernel)
    result = resnet_flax.train(
        _config(init=str(tmp_path / "first"), steps=2),
        *(tmp_path / "second",),
        data=data,
        eval_data=data,
    )
    assert result.error < 0.1  # two steps from random weights would be at chance


@pytest.mark.parametrize("name", ["cifar_resnet8", "cifar_plain8"])
def test_a_file_is_for_the_network_of_the_config_where_its_shapes_do_not_decide(tmp_path, name):
    model = create_model(name, num_classes=2, **parse_overrides(TINY))
    given = drawn(model, np.zeros((1, 8, 8, 1), np.float32))
    np.savez(tmp_path / "w.npz", **export_torch(given, model, "akamaster"))
    settings = {"model.name": name, "init": str(tmp_path / "w.npz")}
    config = _config(**settings)
    splits = tuple(as_source(_bars(64, seed), "", config.data) for seed in (0, 1))
    run = make_run(tables.check(config), splits=splits)
    variables, said = run.initial()
    assert said.startswith("starting from ")
    np.testing.assert_array_equal(
        variables["params"]["head"]["kernel"], given["params"]["head"]["kernel"]
    )


@pytest.mark.parametrize(
    ("init", "message"),
    [
        ("nowhere.safetensors", r"nowhere\.safetensors is not a file, a workdir or"),
        (
            "resnet50",
            r"init=resnet50 is the name of a network, without weights; give the name of "
            r"published weights, such as resnet50\.\w+, a weights file or a workdir",
        ),
    ],
)
def test_weights_that_there_are_not_are_explained(tmp_path, init, message):
    config = _config(init=init)
    with pytest.raises(UserError, match=message):
        resnet_flax.train(config, tmp_path / "run", data=_bars(64, 0), eval_data=_bars(64, 0))


def test_a_config_is_checked_once(tmp_path, monkeypatch):
    calls = []
    check = configs.check

    def counted(*arguments):
        calls.append(1)
        return check(*arguments)

    monkeypatch.setattr(configs, "check", counted)
    resnet_flax.train(_config(steps=1), tmp_path / "run", data=_bars(64, 0), eval_data=_bars(64, 0))
    assert len(calls) == 1


def test_a_partial_config_is_enough(tmp_path):
    config = ml_collections.ConfigDict(
        {"model": {"name": "cifar_resnet8", "overrides": TINY}, "steps": 2, "batch_size": 8}
    )
    data = _bars(64, 0)
    assert resnet_flax.train(config, tmp_path / "run", data=data, eval_data=data).count == 64


@pytest.mark.parametrize(
    "setting",
    [
        jax.enable_x64(True),
        jax.default_prng_impl("rbg"),
        jax.threefry_partitionable(False),
    ],
    ids=["64 bits", "another generator", "other keys"],
)
def test_settings_of_the_environment_change_no_number(tmp_path, setting):
    config = _config(steps=6, **{"data.pad": 1, "data.flip": True, "data.erase": 0.5})
    data = _bars(128, 0)
    expected = resnet_flax.train(config, tmp_path / "a", data=data, eval_data=data)
    with setting:
        found = resnet_flax.train(config, tmp_path / "b", data=data, eval_data=data)
    assert found == expected
    a, b = (read_meta(tmp_path / name / "checkpoints" / "6")["digests"] for name in "ab")
    assert a == b


def test_the_outputs_of_given_weights_stay_those_of_their_classes(tmp_path):
    """As where directories named by numbers were sorted as text when the weights were trained."""
    model = resnet_flax.create_model("cifar_resnet8", num_classes=3)
    variables = drawn(model, np.zeros((1, 8, 8, 3), np.float32))
    export(
        Pretrained(model, variables, None, ("1", "10", "2"), "drawn"), tmp_path / "w.safetensors"
    )
    head = variables["params"]["head"]
    for names, order in (
        (("1", "2", "10"), [0, 2, 1]),
        (("10", "1", "2"), [1, 0, 2]),
        (("1", "10", "2"), [0, 1, 2]),
        (("a", "b", "c"), [0, 1, 2]),
    ):
        weights = str(tmp_path / "w.safetensors")
        found, note = starting_from(weights, model, 0, channels=3, class_names=names)
        for name in ("kernel", "bias"):
            outputs = found["params"]["head"][name]
            np.testing.assert_array_equal(outputs, np.asarray(head[name])[..., order])
        assert ("its outputs are put in the order" in note) == (order != [0, 1, 2])
