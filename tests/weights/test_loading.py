"""Loading and exporting weights."""

import importlib.util
import json
import re

import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest
import safetensors.numpy

from resnet_flax import create_model, load_pretrained
from resnet_flax.apply.experiment import train
from resnet_flax.data.preprocessing import Preprocessing
from resnet_flax.errors import UserError
from resnet_flax.models import ResNet
from resnet_flax.models.scan import stack
from resnet_flax.training.checkpoint_files import read_meta
from resnet_flax.weights.catalog import CATALOG, CIFAR10
from resnet_flax.weights.files import read_weights, write_weights
from resnet_flax.weights.loading import Pretrained, export, load
from resnet_flax.weights.torch_layout import export_torch, flatten, layout_of

pytestmark = pytest.mark.usefixtures("soon_traced")


def _random(model, side=64, channels=3):
    """Variables of a network, each array drawn by its name."""
    shapes = jax.eval_shape(
        lambda: model.init(jax.random.key(0), jnp.zeros((1, side, side, channels)), train=False)
    )
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), shapes)


def _export(tmp_path, model, variables, **facts):
    path = tmp_path / "w.safetensors"
    settings = {"preprocessing": None, "class_names": (), "origin": "a test", **facts}
    export(Pretrained(model, variables, **settings), path)
    return path


def _same(ours, theirs):
    a, b = flatten(ours), flatten(theirs)
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].dtype == b[key].dtype
        np.testing.assert_array_equal(a[key], b[key], err_msg=str(key))


TINY = {"stage_sizes": (2, 1, 1, 1), "num_classes": 7}


@pytest.mark.parametrize(
    ("name", "axes"),
    [
        ("resnet18", TINY),
        ("resnet50", TINY),
        ("resnext50_32x4d", TINY),
        ("wide_resnet50_2", TINY),
        ("seresnet18", TINY),
        ("resnet50d", TINY),
        ("resnetv2_50", TINY),
        ("resnetv2_18", TINY | {"stem": "deep", "se_ratio": 16}),
        ("resnet50_v1", TINY | {"stem_bias": True, "stem_pool": "ceil"}),
        ("resnet18", TINY | {"norm": "group"}),
        ("cifar_resnet20", {}),
        ("cifar_resnet8", {"shortcut": "C", "se_ratio": 4}),
        ("cifar_resnetv2_110", {"stage_sizes": (2, 1, 1)}),
    ],
)
def test_a_round_trip_is_bit_identical(tmp_path, name, axes):
    model = create_model(name, **axes)
    variables = _random(model)
    preprocessing = Preprocessing(
        96, 0.9, "bicubic", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), exif="on", alpha="white", channels=3
    )
    names = tuple(f"class {i}" for i in range(model.num_classes))
    path = _export(tmp_path, model, variables, preprocessing=preprocessing, class_names=names)
    _same(load_pretrained(path, model), variables)
    # The file describes its network.
    found = load(str(path))
    assert found.model == model
    assert (found.preprocessing, found.class_names) == (preprocessing, names)
    _same(found.variables, variables)
    again = tmp_path / "again.safetensors"
    export(found._replace(origin="a test"), again)
    first, second = read_weights(path), read_weights(again)
    assert first.about == second.about
    assert {k: a.tobytes() for k, a in first.arrays.items()} == {
        k: a.tobytes() for k, a in second.arrays.items()
    }


def test_a_scanned_network_gets_stacked_variables(tmp_path):
    axes = {"stage_sizes": (3, 1), "stage_features": (8, 16), "stem_features": 8}
    plain = create_model("cifar_resnet20", **axes)
    variables = _random(plain, 32)
    path = _export(tmp_path, plain, variables)
    scanned = create_model("cifar_resnet20", scan=True, remat=2, dtype=jnp.bfloat16, **axes)
    loaded = load_pretrained(path, scanned)
    _same(loaded, stack(variables))
    logits = jax.jit(lambda v: scanned.apply(v, jnp.ones((1, 32, 32, 3)), train=False))(loaded)
    assert logits.shape == (1, 10)
    _same(load_pretrained(_export(tmp_path, scanned, loaded), plain), variables)


def test_what_does_not_fit_is_named_all_at_once(tmp_path):
    model = create_model("resnet18", **TINY)
    arrays = read_weights(_export(tmp_path, model, _random(model))).arrays
    arrays["layer1.0.conv1.weight"] = np.zeros((64, 64, 5, 5), np.float32)
    arrays["layer2.0.bn1.bias"] = np.zeros(3, np.float32)
    for name in ("conv1.weight", "layer4.0.bn2.running_var"):
        del arrays[name]
    arrays["extra.weight"] = arrays["extra.bias"] = np.zeros(1, np.float32)
    path = tmp_path / "bad.safetensors"
    safetensors.numpy.save_file(arrays, path)
    message = (
        f"{path} does not fit the network: 2 missing (layer4.0.bn2.running_var, conv1.weight); "
        "2 unexpected (extra.bias, extra.weight); 2 of another shape (layer1.0.conv1.weight "
        "[64, 64, 5, 5], not [64, 64, 3, 3], layer2.0.bn1.bias [3], not [128])"
    )
    with pytest.raises(UserError, match=f"^{re.escape(message)}; give the network"):
        load_pretrained(path, model)


def test_a_file_of_another_network_is_refused(shared_data):
    path = shared_data / "weights" / "resnet20-12fca82f.th"
    with pytest.raises(UserError, match=r"not fit .* 3, 3, 3 blocks, .* 9, 9, 9; 180 missing \("):
        load_pretrained(path, create_model("cifar_resnet56"))
    with pytest.raises(UserError, match=r"does not fit .*\d+ missing .*\d+ unexpected"):
        load_pretrained(path, create_model("resnet18", num_classes=10))
    with pytest.raises(UserError, match="itself as a network other than resnet50; leave resnet50"):
        load(str(path), variant="resnet50")


def test_another_number_of_classes_needs_a_new_head_that_is_asked_for(tmp_path):
    narrow = {"stage_sizes": (1, 1), "stage_features": (8, 16), "stem_features": 8}
    model = create_model("resnet18", num_classes=7, **narrow)
    variables = _random(model)
    path = _export(tmp_path, model, variables)
    other = model.clone(num_classes=3)
    with pytest.raises(UserError, match=r"is for 7 classes, the network has 3; ask for a new head"):
        load_pretrained(path, other)
    loaded = load_pretrained(path, other, reset_head=True, seed=1)
    fresh = jax.jit(other.init, static_argnames="train")(
        jax.random.key(1), jnp.zeros((1, 32, 32, 3)), train=False
    )
    _same({"params": loaded["params"]["head"]}, {"params": fresh["params"]["head"]})
    for tree in (loaded, variables):
        tree["params"].pop("head")
    _same(loaded, variables)
    # With the same number of classes the head is the file's, even with reset_head.
    loaded = load_pretrained(path, model, reset_head=True)
    assert (loaded["params"]["head"]["kernel"] != 0).all()
    _same(loaded, load_pretrained(path, model))


def test_other_channels_than_three(tmp_path):
    model = create_model("cifar_resnet8")
    variables = _random(model, 16, channels=1)
    _same(load_pretrained(_export(tmp_path, model, variables), model), variables)


def test_half_precision_becomes_float32(tmp_path):
    model = create_model("cifar_resnet8")
    arrays = read_weights(_export(tmp_path, model, _random(model, 32))).arrays
    half = {n: a.astype(np.float16) if a.dtype == np.float32 else a for n, a in arrays.items()}
    safetensors.numpy.save_file(half, tmp_path / "half.safetensors")
    loaded = load_pretrained(tmp_path / "half.safetensors", model)
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {jnp.dtype("float32")}


def test_the_network_is_inferred_where_shapes_decide_it(tmp_path):
    def bare(name, **axes):
        model = create_model(name, **axes)
        shapes = jax.eval_shape(lambda: _random(model))
        zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
        arrays = read_weights(_export(tmp_path, model, zeros)).arrays
        safetensors.numpy.save_file(arrays, tmp_path / "bare.safetensors")
        return str(tmp_path / "bare.safetensors"), model

    for name in ("resnext50_32x4d", "resnet18d", "resnetv2_18"):
        path, model = bare(name, num_classes=4)
        assert load(path).model == model
    path, model = bare("resnet34")  # which resnet34_b is another name of
    assert load(path).model == model
    path, _ = bare("resnet34_a")
    with pytest.raises(UserError, match=r"bare.safetensors fits resnet34_a and plain34, which"):
        load(path)
    path, _ = bare("resnet50")
    with pytest.raises(UserError, match="fits resnet50 and resnet50_v1, which have the same"):
        load(path)
    assert load(path, variant="resnet50_v1").model.stride_on == "1x1"
    path, _ = bare("resnet50", stage_sizes=(1, 1, 1, 1))
    with pytest.raises(UserError, match="network; its stages have 1, 1, 1, 1 blocks; name the"):
        load(path)


def test_a_checkpoint_of_ours(config, tmp_path):
    config.model.scan = True
    axes = {"stage_sizes": (2, 1), "stage_features": (8, 16), "stem_features": 8}
    config.model.overrides = "stage_sizes=2,1 stage_features=8,16 stem_features=8"
    train(config, tmp_path / "run")
    found = load(str(tmp_path / "run"))
    assert isinstance(found.model, ResNet)
    assert found.model.scan
    assert found.class_names == tuple("0123456789")
    assert found.origin.startswith("step 12 of")
    assert (found.preprocessing.size, found.preprocessing.mean) == (0, tuple(config.data.mean))
    assert "image_shape" not in read_meta(tmp_path / "run/checkpoints/12")["preprocessing"]
    plain = create_model("cifar_resnet8", **axes)
    loaded = load_pretrained(tmp_path / "run", plain)
    wide = plain.clone(num_classes=3, scan=True, dtype=jnp.bfloat16)
    with pytest.raises(UserError, match=r"is for 10 classes, the network has 3; ask for a new"):
        load(tmp_path / "run", model=wide)
    other = load(tmp_path / "run", model=wide, reset_head=True)
    assert (other.model, other.class_names) == (wide, ())
    assert (other.preprocessing, other.origin) == (found.preprocessing, found.origin)
    assert other.variables["params"]["head"]["bias"].shape == (3,)
    with pytest.raises(
        UserError, match=r"fit .*: its stages have 2, 1 blocks, .*; 10 missing \(ba"
    ):
        load_pretrained(tmp_path / "run", plain.clone(stage_sizes=(3, 1)))
    with pytest.raises(UserError, match="is for a network with shortcut='A', not 'none'"):
        load_pretrained(tmp_path / "run", create_model("cifar_plain8", **axes))
    _same(stack(loaded), found.variables)
    _same(load_pretrained(tmp_path / "run" / "checkpoints" / "12", found.model), found.variables)
    with pytest.raises(
        UserError, match=r"run already names its network, cifar_resnet8; give .*run alone"
    ):
        load(str(tmp_path / "run"), variant="resnet18")
    with pytest.raises(UserError, match=r"cifar_resnet8; give .*run alone"):
        load("cifar_resnet8", weights=tmp_path / "run")
    with pytest.raises(
        UserError, match="run is a workdir or checkpoint and has weights; leave out w"
    ):
        load(tmp_path / "run", weights="w.pth")
    with pytest.raises(UserError, match="is the name of published weights and has weights; leave"):
        load("resnet50.a1_in1k", weights="resnet50.a2_in1k")
    stages = plain.stage_sizes
    assert load(tmp_path / "run", overrides={"norm_unbiased": True}).model.norm_unbiased
    with pytest.raises(UserError, match="is for a network with shortcut='A', not 'none'; give"):
        load(tmp_path / "run", overrides={"shortcut": "none", "stage_sizes": stages})
    victim = next(
        file
        for file in (tmp_path / "run/checkpoints/12/state").rglob("*")
        if file.is_file() and file.stat().st_size > 5000
    )
    content = bytearray(victim.read_bytes())
    content[3000] ^= 1
    victim.write_bytes(content)
    with pytest.raises(UserError, match=r"checkpoints/12 is damaged: .*; give an older one"):
        load(str(tmp_path / "run"))


def test_a_file_goes_into_the_network_that_is_given(tmp_path):
    model = create_model("cifar_resnet8", num_classes=3)
    preprocessing = Preprocessing(8, mean=(0.1,), std=(0.4,))
    facts = {"preprocessing": preprocessing, "class_names": ("a", "b", "c")}
    path = _export(tmp_path, model, _random(model, 32), **facts)
    wanted = model.clone(scan=True, remat=1)
    found = load(path, model=wanted, dtype="bfloat16")
    assert found.model == wanted.clone(dtype=jnp.dtype("bfloat16"))
    assert (found.preprocessing, found.class_names) == (preprocessing, ("a", "b", "c"))
    _same(found.variables, load_pretrained(path, wanted))
    found = load(path, model=model.clone(num_classes=5), reset_head=True)
    assert found.class_names == ()
    for named in ({"variant": "cifar_resnet8"}, {"weights": path}):
        what = "cifar_resnet8" if "weights" in named else path
        with pytest.raises(UserError, match="given twice, as cifar_resnet8 and as a model"):
            load(what, model=model, **named)


def test_what_a_file_says_of_itself_is_not_overruled(tmp_path):
    model = create_model("resnet50_v1", stem_bias=True, stem_pool="ceil", num_classes=3)
    path = str(_export(tmp_path, model, _random(model)))
    for variant in ("resnet50", "resnet101_v1", "seresnet50"):
        with pytest.raises(UserError, match=f"itself as a network other than {variant}; leave"):
            load(path, variant=variant)
    assert load(path, variant="resnet50_v1").model == model
    assert load("resnet50_v1", weights=path).model == model
    with pytest.raises(UserError, match="named twice, resnet50 and resnet50_v1; leave one out"):
        load("resnet50", weights=path, variant="resnet50_v1")
    with pytest.raises(UserError, match=r"is for a network with stem_pool='ceil', not 'padded'"):
        load_pretrained(path, model.clone(stem_pool="padded"))
    with pytest.raises(UserError, match=r"is for a network with stride_on='1x1', not '3x3'"):
        load_pretrained(path, model.clone(stride_on="3x3"))


def _bare(path, model, side=32):
    """A file of weights that says nothing of itself."""
    arrays = export_torch(_random(model, side), model, layout_of(model))
    np.savez(path, **arrays)
    return path


def test_a_file_may_be_called_by_the_published_name_of_its_weights(tmp_path):
    published = "cifar_resnet20.akamaster_cifar10"
    model = create_model("cifar_resnet20")
    path = _bare(tmp_path / "w.npz", model)
    found = load(published, weights=path)
    assert found.model == model
    assert found.preprocessing == CATALOG[published].preprocessing
    assert (found.class_names, found.assumed) == (CIFAR10, False)
    assert found.origin == f"{path}, as {published}"
    again = load(path, variant=published)
    assert again._replace(variables={}) == found._replace(variables={})
    _same(again.variables, found.variables)
    other = _bare(tmp_path / "three.npz", model.clone(num_classes=3))
    assert load(other, variant=published).class_names == ()
    with pytest.raises(
        UserError, match=r"w.npz does not fit the network: its stages have 3, 3, 3 blo"
    ):
        load("cifar_resnet32.akamaster_cifar10", weights=path)
    # What a file says of itself is true.
    own = Preprocessing(8, mean=(0.1,), std=(0.4,))
    described = _export(tmp_path, model, _random(model, 32), preprocessing=own)
    assert load(published, weights=described).preprocessing == own
    with pytest.raises(UserError, match="as a network other than cifar_resnet32; leave cifar_resn"):
        load("cifar_resnet32.akamaster_cifar10", weights=described)


def test_overrides_change_the_network_that_a_file_is_for(tmp_path):
    narrow = {"stage_sizes": (1, 1), "stage_features": (8, 16), "stem_features": 8}
    model = create_model("cifar_resnet8", num_classes=3, **narrow)
    path = _bare(tmp_path / "w.npz", model)
    assert load(path, variant="cifar_resnet8", overrides=narrow).model == model
    # The shapes decide between the networks with these attributes.
    text = "stage_sizes=1,1 stage_features=8,16 stem_features=8 shortcut=A"
    assert load(path, overrides=text).model == model
    with pytest.raises(UserError, match="fits cifar_resnet8 and cifar_plain8, which have the sam"):
        load(path, overrides=narrow)
    for wrong, message in (
        ({"depth": 3}, "overrides cannot set 'depth'"),
        ({"num_classes": 3}, "overrides cannot set num_classes, which"),
        ({"stem": "big"}, "stem must be one of cifar, imagenet, deep, not 'big'"),
        ({**narrow, "stage_features": (8,)}, "must have the same number of entries"),
    ):
        with pytest.raises(UserError, match=message):
            load(path, variant="cifar_resnet8", overrides=wrong)
    with pytest.raises(UserError, match="leave overrides or model out"):
        load(path, model=model, overrides=narrow)


TRUE = {
    "axes": {
        "stage_sizes": [1, 1, 1],
        "stem": "cifar",
        "num_classes": 3,
        "stage_features": [16, 32, 64],
        "stem_features": 16,
        "shortcut": "A",
    },
    "preprocessing": {"size": 8, "mean": [0.5], "std": [0.5]},
    "class_names": ["a", "b", "c"],
}


@pytest.mark.parametrize(
    "lie",
    [
        [1],
        5,
        "abc",
        {"x": 1},
        *({**TRUE, "axes": axes} for axes in ([], {"stem": 3}, {"zzz": 1}, {"stage_sizes": "x"})),
        *({**TRUE, "class_names": names} for names in (5, [1, 2, 3], ["a"] * 6, [["a"]])),
        *(
            {**TRUE, "preprocessing": {**TRUE["preprocessing"], **wrong}}
            for wrong in (
                {"size": "x"},
                {"size": -5},
                {"size": 10**6},
                {"crop_fraction": 0},
                {"crop_fraction": 1e-5},
                {"interpolation": "x"},
                {"mean": "abc"},
                {"mean": []},
                {"std": [0]},
                {"std": [float("nan")]},
                {"mean": [[1]]},
            )
        ),
        {**TRUE, "preprocessing": "x"},
    ],
)
def test_what_a_file_says_of_itself_is_checked(tmp_path, lie):
    model = create_model("cifar_resnet8", num_classes=3)
    arrays = read_weights(_export(tmp_path, model, _random(model, 32))).arrays
    write_weights(tmp_path / "true.safetensors", arrays, TRUE)
    found = load(str(tmp_path / "true.safetensors"))
    assert (found.preprocessing.size, found.class_names) == (8, ("a", "b", "c"))
    said = {"resnet_flax": json.dumps(lie)}
    safetensors.numpy.save_file(arrays, tmp_path / "lie.safetensors", metadata=said)
    with pytest.raises(UserError, match=r"lie.safetensors has an invalid description of itself"):
        load(str(tmp_path / "lie.safetensors"))


def test_a_damaged_head_is_no_other_head(tmp_path):
    model = create_model("resnet18", **TINY)
    arrays = read_weights(_export(tmp_path, model, _random(model))).arrays
    arrays["fc.weight"] = np.zeros((7, 99), np.float32)
    np.savez(tmp_path / "w.npz", **arrays)
    with pytest.raises(UserError, match=r"1 of another shape \(fc.weight \[7, 99\], not"):
        load_pretrained(tmp_path / "w.npz", model, reset_head=True)
    for name, array in (("fc.bias", np.float32(1)), ("conv1.weight", np.zeros((64, 0, 7, 7)))):
        np.savez(tmp_path / "w.npz", **{**arrays, name: array})
        with pytest.raises(UserError):
            load(str(tmp_path / "w.npz"), variant="resnet18")


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (
            "resnet50",
            r"resnet50 is not a file, a workdir or the name of published weights, but a network "
            r"without weights; use one of resnet50.tv_in1k, .*, or give a file of them as weights",
        ),
        (
            "resnet5O.tv_in1k",
            r"is not a file, a workdir or the name of published weights; did you mean res",
        ),
        (5000 * "x", "^x{80} cannot be read: File name too long"),
        ("", r"^'' is not a file, a workdir or the name of published weights"),
        (
            "nowhere/w.pth",
            r"nowhere/w.pth is not a file, a workdir or the name of published weights",
        ),
    ],
)
def test_what_is_not_there_is_explained(what, message):
    with pytest.raises(UserError, match=message):
        load(what)
    with pytest.raises(UserError, match=message):
        load_pretrained(what, create_model("resnet50"))


def test_a_directory_without_checkpoints_is_explained(tmp_path):
    with pytest.raises(
        UserError, match=r"has neither checkpoints nor weights of the Hugging Face hub; give"
    ):
        load(str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="checkpoints has no finished checkpoint yet"):
        load(str(tmp_path))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("torch", "torchvision", "timm"))),
    reason="needs torch, torchvision and timm",
)
@pytest.mark.parametrize("name", networks.CASES)
def test_torch_loads_what_is_exported_strictly(tmp_path, name):
    import torch_networks
    from safetensors.torch import load_file

    model = networks.network(name, jnp.float32)
    variables = jax.tree.map(jnp.float32, networks.random_variables(name))
    state = load_file(_export(tmp_path, model, variables))
    theirs = torch_networks.torch_network(name).float()
    assert {k: v.shape for k, v in theirs.state_dict().items()} == {
        k: v.shape for k, v in state.items()
    }
    assert set(theirs.state_dict()) == set(state)
    theirs.load_state_dict(state, strict=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "int77"}, "dtype must be a floating-point type such as float32 or bfloat16"),
        ({"dtype": "int32"}, "dtype must be a floating-point type such as float32 or bfloat16"),
        ({"reset_head": True}, "reset_head needs num_classes=, or model= with the other number"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(shared_data, arguments, message):
    with pytest.raises(UserError, match=message):
        load(shared_data / "weights/resnet20-12fca82f.th", **arguments)
