"""Directories of the Hugging Face hub: sharded weights, and what is said of them there."""

import importlib.util
import json
import re
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from other_programs import assert_same, drawn

from resnet_flax import UserError, create_model, load
from resnet_flax.cli import main
from resnet_flax.data.preprocessing import Preprocessing
from resnet_flax.weights import hub, places
from resnet_flax.weights.files import read_weights
from resnet_flax.weights.fitting import torch_shapes

pytestmark = pytest.mark.usefixtures("soon_traced")

NETWORK = {"depths": (1, 2), "widths": (32, 64), "bottleneck": True}
CONFIG = {
    "model_type": "resnet",
    "layer_type": "bottleneck",
    "depths": [1, 2],
    "hidden_sizes": [32, 64],
    "embedding_size": 8,
    "downsample_in_bottleneck": False,
    "id2label": {"0": "cat", "1": "dog", "2": "bird"},
}
IMAGES = {
    "size": {"shortest_edge": 224},
    "crop_pct": 0.9,
    "resample": 2,
    "image_mean": [0.1, 0.2, 0.3],
    "image_std": [0.4, 0.5, 0.6],
}


def _transformers(directory, config=CONFIG, images=IMAGES):
    """A directory as transformers writes it, its weights in two files; returns them."""
    arrays = drawn("transformers", **NETWORK)
    names = sorted(arrays)
    shards = {"model-1-of-2.safetensors": names[:7], "model-2-of-2.safetensors": names[7:]}
    for file, some in shards.items():
        safetensors.numpy.save_file({name: arrays[name] for name in some}, directory / file)
    files = {name: file for file, some in shards.items() for name in some}
    _write(directory / "model.safetensors.index.json", {"metadata": {}, "weight_map": files})
    _write(directory / "config.json", config)
    _write(directory / "preprocessor_config.json", images)
    return arrays


def _write(path, value):
    path.write_text(json.dumps(value))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("in_bottleneck", "stride_on"), [(False, "3x3"), (True, "1x1")])
def test_transformers_network_is_the_same_in_float64(tmp_path, in_bottleneck, stride_on):
    arrays = _transformers(tmp_path, {**CONFIG, "downsample_in_bottleneck": in_bottleneck})
    found = load(tmp_path)
    assert (found.model.stride_on, found.model.stage_features) == (stride_on, (8, 16))
    assert found.class_names == ("cat", "dog", "bird")
    mean, std = tuple(IMAGES["image_mean"]), tuple(IMAGES["image_std"])
    assert found.preprocessing == Preprocessing(224, 0.9, "bilinear", mean, std)
    assert not found.assumed
    model = found.model.clone(dtype=jnp.float64, param_dtype=jnp.float64)
    variables = load(tmp_path, model=model).variables
    on = 1 if in_bottleneck else 2
    assert_same(variables, model, arrays, "transformers", 33, stride_on=on, **NETWORK)
    with pytest.raises(UserError, match=f"with stride_on='{stride_on}', not"):
        load(tmp_path, model=model.clone(stride_on="1x1" if stride_on == "3x3" else "3x3"))


def test_the_index_of_several_files_is_read_and_checked(tmp_path):
    arrays = _transformers(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    read = read_weights(index)
    assert len(read.arrays) == len(arrays)
    assert "layer2.1.conv3.weight" in read.arrays
    assert places.path_of(f"{index}:teacher") == (index, "teacher")
    assert places.path_of(f"{tmp_path}:teacher") == (index, "teacher")
    assert load(f"{tmp_path}:.").class_names == ("cat", "dog", "bird")
    whole = json.loads(index.read_text())
    (tmp_path / "model-1-of-2.safetensors").rename(tmp_path / "kept")
    with pytest.raises(UserError, match=r"model-1-of-2.safetensors cannot be read: No such file"):
        load(tmp_path)
    (tmp_path / "kept").rename(tmp_path / "model-1-of-2.safetensors")
    for files, message in (
        ({"a.weight": "model-1-of-2.safetensors"}, r"1 tensors in model-1.* \(such as a.weight\)"),
        ({"a.weight": "../w.safetensors"}, r"names '../w.safetensors', which is not a file beside"),
        *(
            ({"a.weight": file}, "which is not a file beside it")
            for file in ("", "..", "a\0", "\ud800", 5000 * "x")
        ),
        ({"a.weight": 3}, "is missing, damaged or no index of weights"),
        (None, "is missing, damaged or no index of weights"),
    ):
        _write(index, {**whole, "weight_map": files})
        with pytest.raises(UserError, match=message):
            load(index)


def test_names_that_transformers_made_up_are_none(tmp_path):
    _transformers(
        tmp_path, {**CONFIG, "id2label": {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}}
    )
    assert load(tmp_path).class_names == ()
    assert load(tmp_path, num_classes=0).model.num_classes == 0


@pytest.mark.parametrize(
    ("config", "images", "message"),
    [
        ({"hidden_act": "gelu"}, {}, "no network here has hidden_act=gelu"),
        ({"downsample_in_first_stage": True}, {}, "no network here has downsample_in_first_stage"),
        ({"model_type": "vit"}, {}, "it is for a network of 'vit', not a ResNet of timm, transf"),
        ({"id2label": {"0": "a", "1": "b"}}, {}, "names 2 classes, and the weights are for 3; c"),
        ({"id2label": {"0": "a", "2": "b", "3": "c"}}, {}, "not numbered from 0 without gaps"),
        ({"id2label": {"0": "a", "1": "b\n", "2": "c"}}, {}, "with line breaks or control charac"),
        ({"id2label": "abc"}, {}, "are neither a list nor numbered"),
        ({"depths": "x"}, {}, "config.json cannot be followed"),
        ({"depths": [1, 1]}, {}, "does not fit the network"),
        ({}, {"size": {"height": 224, "width": 224}}, "size={'height': 224, 'width': 224}, and o"),
        (
            {},
            {"size": {"shortest_edge": 384}},
            "stretches images to 384 x 384 pixels, which is not",
        ),
        (
            {},
            {"image_processor_type": "BitImageProcessor"},
            r"preprocessor_config.json cannot be followed \(BitImageProcessor without do_center_c",
        ),
        ({}, {"feature_extractor_type": "ViTFeatureExtractor"}, "ViTFeatureExtractor without do"),
        (
            {},
            {"do_center_crop": True, "crop_size": {"height": 224, "width": 192}},
            "it crops to 224 x 192 pixels",
        ),
        ({}, {"resample": 1}, "has resample=1, and only 2 and 3 are available"),
        ({}, {"rescale_factor": 1 / 127.5}, "has rescale_factor=0.0078"),
        ({}, {"image_std": [0.0]}, "std of a preprocessing must be"),
    ],
)
def test_what_is_not_available_here_is_refused(tmp_path, config, images, message):
    _transformers(tmp_path, {**CONFIG, **config}, {**IMAGES, **images})
    with pytest.raises(UserError, match=message):
        load(tmp_path)


def test_how_transformers_crops(tmp_path):
    for images, size, fraction in (
        ({"size": 160, "crop_pct": None}, 160, 0.875),
        ({"image_processor_type": "ConvNextImageProcessorFast"}, 224, 0.9),
        ({"size": {"shortest_edge": 256}, "do_center_crop": True, "crop_size": 224}, 224, 0.875),
        ({"size": {"shortest_edge": 224}, "do_normalize": False}, 224, 0.9),
    ):
        _write(tmp_path / "config.json", CONFIG)
        _write(tmp_path / "preprocessor_config.json", {**IMAGES, **images})
        found = hub.describe(tmp_path, 3).preprocessing
        assert (found.size, found.crop_fraction) == (size, fraction)
    assert (found.mean, found.std) == ((0.0,), (1.0,))


TIMM = {
    "architecture": "resnet18",
    "num_classes": 3,
    "global_pool": "avg",
    "label_names": ["cat", "dog", "bird"],
    "model_args": {"num_classes": 3, "in_chans": 3},
    "pretrained_cfg": {
        "input_size": [3, 96, 96],
        "test_input_size": [3, 128, 128],
        "interpolation": "bicubic",
        "crop_pct": 0.9,
        "crop_mode": "center",
        "mean": [0.5, 0.5, 0.5],
        "std": [0.25, 0.25, 0.25],
    },
}


def _timm(directory, **changes):
    _write(directory / "config.json", {**TIMM, **changes})


def test_timm_s_description_is_used(tmp_path):
    _timm(tmp_path)
    model = create_model("resnet18", num_classes=3)
    arrays = {n: np.zeros(shape, np.float16) for n, (_, shape) in torch_shapes(model, {}).items()}
    safetensors.numpy.save_file(arrays, tmp_path / "model.safetensors")
    found = load(tmp_path)
    assert (found.model, found.class_names) == (model, ("cat", "dog", "bird"))
    half, quarter = (0.5,) * 3, (0.25,) * 3
    assert found.preprocessing == Preprocessing(128, 0.9, "bicubic", half, quarter)
    assert load("resnet18", weights=tmp_path).model == found.model
    with pytest.raises(UserError, match="describes itself as a network other than resnet34"):
        load(tmp_path, variant="resnet34")


@pytest.mark.parametrize(
    "changes",
    [
        {"label_names": {"1": "dog", "2": "bird", "0": "cat"}},
        {"label_names": None, "labels": ["cat", "dog", "bird"]},
        {"pretrained_cfg": None, **TIMM["pretrained_cfg"]},  # as older versions wrote it
        {
            "label_names": None,
            "pretrained_cfg": {**TIMM["pretrained_cfg"], "label_names": TIMM["label_names"]},
        },
        {"model_args": {"drop_path_rate": 0.1, "drop_rate": 0.2, "zero_init_last": False}},
    ],
)
def test_what_timm_writes_in_other_ways_is_the_same(tmp_path, changes):
    _timm(tmp_path)
    expected = hub.describe(tmp_path, 3)
    assert expected.class_names == ("cat", "dog", "bird")
    _timm(tmp_path, **changes)
    assert hub.describe(tmp_path, 3) == expected


def test_timm_s_squeezed_channels_are_a_multiple_of_8(tmp_path):
    _timm(tmp_path, architecture="seresnet18")
    model = hub.describe(tmp_path, 3).model
    assert model == create_model("seresnet18", num_classes=3, se_divisor=8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        # It has the names and shapes of resnet18.
        ({"architecture": "resnetblur18"}, r"no network here is timm's resnetblur18\); give the f"),
        ({"model_args": {"output_stride": 8}}, "timm's resnet18 with output_stride=8"),
        ({"global_pool": "max"}, "timm's resnet18 with global_pool=max"),
        (
            {"pretrained_cfg": {**TIMM["pretrained_cfg"], "crop_mode": "squash"}},
            "crop_mode='squash' at 128 x 128 pixels is not available",
        ),
        (
            {"pretrained_cfg": {"input_size": [3, 64, 64]}},
            r"cannot be followed .*it has no crop_pct",
        ),
        ({"architecture": ["resnet18"]}, "its architecture is .'resnet18'., not a name"),
        ({"label_names": {"0": "a", "1": "b", "n2": "c"}}, "not numbered from 0 without gaps"),
        ({"label_names": "abc"}, "are neither a list nor numbered"),
        ({"label_names": ["a", "b", "c\x1b"]}, "with line breaks or control characters"),
    ],
)
def test_what_timm_has_and_we_have_not_is_refused(tmp_path, changes, message):
    _timm(tmp_path, **changes)
    with pytest.raises(UserError, match=message):
        hub.describe(tmp_path, 3)


def test_a_refusal_on_the_command_line_is_one_sentence(tmp_path, capsys):
    _transformers(tmp_path, {**CONFIG, "model_type": "vit"})
    assert main(["eval", str(tmp_path), "--data=tfds:digits"]) == 2
    said = capsys.readouterr().err
    assert re.search(r"config.json cannot be followed \(it is for a network of 'vit'", said)
    assert said.count("\n") == 1


def test_a_damaged_config_is_explained(tmp_path):
    _timm(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json is damaged: it is not a JSON object"):
        hub.describe(tmp_path, 3)
    (tmp_path / "config.json").unlink()
    assert hub.describe(tmp_path, 3) is None
    with pytest.raises(UserError, match=r"has neither checkpoints nor weights of the Hugging"):
        load(tmp_path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("x64")
@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("torch", "transformers"))),
    reason="needs torch and transformers",
)
@pytest.mark.parametrize("kind", ["basic", "bottleneck", "bottleneck in 1x1"])
def test_what_transformers_writes_is_what_it_computes(tmp_path, kind):
    sys.modules.setdefault("torchvision._meta_registrations", types.ModuleType("empty"))
    import torch
    from transformers import ConvNextImageProcessorPil, ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        embedding_size=8,
        hidden_sizes=[32, 64, 96],
        depths=[1, 2, 1],
        layer_type=kind.split()[0],
        downsample_in_bottleneck="1x1" in kind,
        num_labels=3,
    )
    theirs = ResNetForImageClassification(config).double().eval()
    rng = np.random.default_rng(0)
    for parameter in (*theirs.parameters(), *theirs.buffers()):
        if parameter.ndim == 1:
            parameter.data = torch.from_numpy(0.5 + np.abs(rng.normal(size=parameter.shape)))
    theirs.save_pretrained(tmp_path, max_shard_size="40KB")
    ConvNextImageProcessorPil(size={"shortest_edge": 224}).save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors.index.json").is_file()
    model = load(tmp_path).model.clone(dtype=jnp.float64, param_dtype=jnp.float64)
    found = load(tmp_path, model=model)
    assert found.preprocessing == Preprocessing(224, 0.875, "bicubic", (0.5,) * 3, (0.5,) * 3)
    x = rng.normal(size=(2, 65, 79, 3))
    expected = theirs(torch.from_numpy(x.transpose(0, 3, 1, 2))).logits.detach().numpy()
    actual = model.apply(found.variables, jnp.asarray(x), train=False)
    assert np.abs(actual - expected).max() <= 1e-10 * np.abs(expected).max()
