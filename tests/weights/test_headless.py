"""Weights with and without a head: `num_classes=0` takes them without."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict
from variables import drawn, initialised

from resnet_flax import UserError, create_model, load, load_pretrained
from resnet_flax.apply.experiment import train
from resnet_flax.apply.initial import starting_from
from resnet_flax.cli import main
from resnet_flax.data import ArraySource
from resnet_flax.data.preprocessing import Preprocessing
from resnet_flax.evaluation.multi_view import Network
from resnet_flax.evaluation.pretrained import evaluate_pretrained
from resnet_flax.weights.files import read_weights
from resnet_flax.weights.loading import Pretrained, export

pytestmark = pytest.mark.usefixtures("soon_traced")

NARROW = {"stage_sizes": (1, 1), "stage_features": (8, 16), "stem_features": 8}


def _file(tmp_path, model):
    """A file of this package with random weights."""
    path = tmp_path / "w.safetensors"
    export(Pretrained(model, drawn(model, jnp.zeros((1, 32, 32, 3))), None, (), "a test"), path)
    return path


def _bare(path):
    """The same weights in a file without a description, as other programs write it."""
    safetensors.numpy.save_file(read_weights(path).arrays, path.with_name("bare.safetensors"))
    return path.with_name("bare.safetensors")


def _same(ours, theirs):
    a, b = flatten_dict(ours, sep="/"), flatten_dict(theirs, sep="/")
    assert a.keys() == b.keys()
    for path in a:
        np.testing.assert_array_equal(a[path], b[path], err_msg=path)


def _without_head(variables):
    params = {name: tree for name, tree in variables["params"].items() if name != "head"}
    return {**variables, "params": params}


def test_published_weights_without_their_head(shared_data, tmp_path, monkeypatch):
    name = "cifar_resnet20.akamaster_cifar10"
    monkeypatch.setenv("RESNET_FLAX_WEIGHTS", str(tmp_path))
    shutil.copy(shared_data / "weights/resnet20-12fca82f.th", tmp_path / f"{name}.th")
    whole, headless = load(name), load(name, num_classes=0)
    assert headless.model == whole.model.clone(num_classes=0)
    assert (headless.class_names, headless.preprocessing) == ((), whole.preprocessing)
    assert "head" in whole.variables["params"]
    _same(headless.variables, _without_head(whole.variables))
    given = create_model("cifar_resnet20", num_classes=0)
    _same(load_pretrained(name, given), headless.variables)


@pytest.mark.parametrize(
    ("name", "axes"),
    [
        ("resnet18", {}),  # its head is called fc
        ("cifar_resnet8", {"shortcut": "A"}),  # linear
        ("resnetv2_18", {}),  # head.fc
    ],
)
def test_files_without_a_head_are_written_and_loaded(tmp_path, name, axes):
    model = create_model(name, num_classes=0, **NARROW, **axes)
    path = _file(tmp_path, model)
    assert not [name for name in read_weights(path).arrays if "fc" in name or "linear" in name]
    found = load(path)
    assert (found.model, found.class_names) == (model, ())
    _same(load(path, num_classes=0).variables, found.variables)
    with pytest.raises(UserError, match="has no head, the network has one for 3 classes; ask for"):
        load(path, num_classes=3)
    other = load(path, num_classes=3, reset_head=True, seed=1)
    fresh = initialised(other.model, jnp.zeros((1, 32, 32, 3)))
    assert jax.tree.map(jnp.shape, other.variables) == jax.tree.map(jnp.shape, fresh)
    assert other.model == model.clone(num_classes=3)
    _same(_without_head(other.variables), found.variables)


def test_more_than_a_missing_head_is_named(tmp_path):
    path = _file(tmp_path, create_model("resnet18", num_classes=0, **NARROW))
    deeper = create_model("resnet18", num_classes=3, **{**NARROW, "stage_sizes": (1, 2)})
    with pytest.raises(UserError, match=r"its stages have 1, 1 blocks, .*; 12 missing .*; give"):
        load(path, model=deeper)


def test_a_head_for_other_classes_is_named_by_num_classes(tmp_path):
    path = _file(tmp_path, create_model("resnet18", num_classes=5, **NARROW))
    with pytest.raises(UserError, match="is for 5 classes, the network has 3; ask for a new head"):
        load(path, num_classes=3)
    found = load(path, num_classes=3, reset_head=True)
    assert found.variables["params"]["head"]["kernel"].shape == (16, 3)
    model = create_model("resnet18", num_classes=0, **NARROW)
    with pytest.raises(UserError, match="a model has its own num_classes; leave"):
        load(path, model=model, num_classes=0)
    with pytest.raises(UserError, match="num_classes must be a whole number from 0, not -1"):
        load(path, num_classes=-1)


def test_a_file_of_another_program_without_a_head_is_identified(tmp_path):
    model = create_model("resnet18d", num_classes=0)
    found = load(_bare(_file(tmp_path, model)))
    assert found.model == model
    # A head that is damaged is not left out silently.
    arrays = read_weights(tmp_path / "bare.safetensors").arrays
    for name, shape in (("fc.weight", (3, 512)), ("fc.bias", ())):
        damaged = {**arrays, name: np.zeros(shape, np.float32)}
        safetensors.numpy.save_file(damaged, tmp_path / "damaged.safetensors")
        with pytest.raises(UserError, match=r"the head of .*, fc, has no bias of one number per"):
            load(tmp_path / "damaged.safetensors")


def test_a_head_that_is_no_linear_layer_is_left_out_if_that_is_asked_for(tmp_path):
    """As in networks of contrastive training, for which `init` makes a new head."""
    model = create_model("resnet18", num_classes=5, **NARROW)
    arrays = read_weights(_file(tmp_path, model.clone(num_classes=0))).arrays
    other = {f"fc.{i}.weight": np.ones((4, 16), np.float32) for i in (0, 2)}
    other["projection_head.0.bias"] = np.ones(3, np.float32)
    queue = {"queue": np.ones((4, 3), np.float32)}
    names = {f"encoder_q.{name}": array for name, array in (arrays | other).items()}
    safetensors.numpy.save_file(names | queue, tmp_path / "moco.safetensors")
    with pytest.raises(UserError, match=r"the head of .*, fc, has no bias .*fc.0.weight, fc.2.wei"):
        load(tmp_path / "moco.safetensors", num_classes=5)
    moco = str(tmp_path / "moco.safetensors")
    found, note = starting_from(moco, model, 1, channels=3, class_names=())
    left_out = "without queue, fc.0.weight, fc.2.weight and 1 more"
    assert note == (
        f"starting from {tmp_path / 'moco.safetensors'} ({left_out}); the missing head is replaced "
        "by a new one"
    )
    expected = load(tmp_path / "w.safetensors", model=model, reset_head=True, seed=1).variables
    _same(found, expected)
    headless = load(tmp_path / "moco.safetensors", model=model.clone(num_classes=0))
    _same(headless.variables, _without_head(expected))


def test_one_of_several_networks_is_named_after_the_file(tmp_path):
    model = create_model("cifar_resnet8", num_classes=2, **NARROW)
    arrays = read_weights(_file(tmp_path, model)).arrays
    both = {f"student.{name}": np.zeros_like(array) for name, array in arrays.items()}
    both |= {f"teacher.{name}": array for name, array in arrays.items()}
    path = str(tmp_path / "dino.safetensors")
    safetensors.numpy.save_file(both, path)
    with pytest.raises(UserError, match=r"has 2 networks, student, teacher; add the name of the"):
        load_pretrained(path, model)
    _same(load_pretrained(f"{path}:teacher", model), load(tmp_path / "w.safetensors").variables)
    assert not load_pretrained(f"{path}:student", model)["params"]["head"]["kernel"].any()
    with pytest.raises(UserError, match="has no network nobody; it has student, teacher"):
        load_pretrained(f"{path}:nobody", model)
    with pytest.raises(
        UserError, match=r"nowhere.pth:teacher is not a file, a workdir or the name"
    ):
        load("nowhere.pth:teacher")


def test_whole_numbers_are_no_weights(tmp_path):
    model = create_model("cifar_resnet8", num_classes=2, **NARROW)
    arrays = read_weights(_file(tmp_path, model)).arrays
    arrays["conv1.weight"] = arrays["conv1.weight"].astype(np.int8)
    safetensors.numpy.save_file(arrays, tmp_path / "int8.safetensors")
    with pytest.raises(
        UserError, match=r"has whole numbers in conv1.weight; give the floating-poi"
    ):
        load_pretrained(tmp_path / "int8.safetensors", model)


def test_a_run_without_its_head_and_no_evaluation_of_it(config, tmp_path, capsys):
    config.model.overrides = "stage_sizes=1,1 stage_features=8,16 stem_features=8"
    config.steps, config.optim.warmup_steps = 2, 1
    train(config, tmp_path / "run")
    whole, headless = load(tmp_path / "run"), load(tmp_path / "run", num_classes=0)
    assert headless.model == whole.model.clone(num_classes=0)
    _same(headless.variables, _without_head(whole.variables))
    export(headless, tmp_path / "headless.safetensors")
    capsys.readouterr()
    data = ["--data=tfds:digits", f"--data_dir={config.data.data_dir}"]
    assert main(["eval", str(tmp_path / "headless.safetensors"), *data]) == 2
    sentence = "a network without a head (num_classes=0) predicts no classes and cannot be"
    assert capsys.readouterr().err.startswith(f"error: {sentence}")
    config.model.overrides = "num_classes=0"
    with pytest.raises(UserError, match=r"model\.overrides cannot set num_classes"):
        train(config, tmp_path / "other")


def test_an_evaluation_from_python_needs_a_head_too():
    model = create_model("cifar_resnet8", num_classes=0, **NARROW)
    network = Network(model, drawn(model, jnp.zeros((1, 8, 8, 3))), Preprocessing(size=0))
    source = ArraySource(np.zeros((2, 8, 8, 3), np.uint8), np.array([0, 1]), ("a", "b"))
    with pytest.raises(UserError, match="predicts no classes and cannot be evaluated; give one"):
        evaluate_pretrained([network], source, batch_size=8)


def test_a_summary_without_a_head(capsys):
    assert main(["summary", "resnet50", "--classes=0"]) == 0
    printed = capsys.readouterr().out
    assert "head" not in printed
    assert "resnet50: 49 layers, 23,508,032 parameters, 4.087 GMAC" in printed
