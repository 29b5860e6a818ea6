"""Checkpoints of training programs: what they have beside weights, and where these are."""

import argparse
import collections
import datetime
import enum
import fractions
import importlib.util
import pathlib
import pickle
import sys
import types
import zipfile

import numpy as np
import pytest
from torch_files import Made, Name, Tensor, legacy_file, zip_file

from resnet_flax.errors import UserError
from resnet_flax.weights.files import read_weights

WHOLE = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
NAMES = ("conv1.weight", "layer1.0.conv1.weight", "layer1.0.bn1.bias", "fc.weight", "fc.bias")
STATE = {name: WHOLE + i for i, name in enumerate(NAMES)}


def _under(prefix, state=STATE):
    return {f"{prefix}{name}": Tensor(array) for name, array in state.items()}


def _read(tmp_path, tree, address="", file=zip_file):
    (tmp_path / "x.pth").write_bytes(file(tree))
    return read_weights(tmp_path / "x.pth", address)


def _same(arrays, expected=STATE):
    assert set(arrays) == set(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(arrays[name], array)


class Color(enum.Enum):
    RED = 1


class Meter:
    """An object of a training program's own."""

    def __init__(self):
        self.average, self.history = np.float64(1), {"loss": [1.0]}


def _optimizer():
    return {"state": {0: {"exp_avg": Tensor(WHOLE), "step": Tensor(np.array(3.0))}}}


# What the training scripts of timm, torchvision and others save beside the weights.
BESIDE = {
    "args": argparse.Namespace(lr=0.1, out=pathlib.PurePosixPath("runs"), kind=float),
    "path": pathlib.Path("runs"),
    "array": np.ones((2, 3)),
    "scalars": [np.float32(1), np.float64(2), np.int64(3), np.bool_(True), np.dtype("float32")],
    "objects": np.array([{"a": 1}, None], dtype=object),
    "generator": np.random.default_rng(0),
    "random state": np.random.get_state(),  # noqa: NPY002 -- as scripts save it
    "defaultdict": collections.defaultdict(list, {"loss": [1.0]}),
    "ordered": collections.OrderedDict(a=1),
    "counter": collections.Counter("aab"),
    "queue": collections.deque([1, 2], 3),
    "date": datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC),
    "duration": datetime.timedelta(seconds=3),
    "enum": Color.RED,
    "meter": Meter(),
    "namespace": types.SimpleNamespace(a=1),
    "bytes": b"raw",
    "bytearray": bytearray(b"raw"),
    "sets": [{1, 2}, frozenset([3])],
    "number": [1j, fractions.Fraction(1, 2), range(3), slice(1), ..., None],
    "size": Made(Name("torch", "Size"), ((1, 2),)),
    "device": Made(Name("torch", "device"), ("cuda", 0)),
    "dtype": [Name("torch", "float32"), Name("torch", "float8_e5m2"), Name("torch", "qint8")],
    "layout": Made(Name("torch.serialization", "_get_layout"), ("torch.strided",)),
    "rng_state": Tensor(np.arange(5, dtype=np.uint8)),
    "best_acc1": Tensor(np.array(71.2)),
    "optimizer": _optimizer(),
    "lr_scheduler": {"base_lrs": [0.1], "_last_lr": [np.float64(0.1)], "lr_lambdas": [None]},
    "schedule": Made(Name("torch.optim.lr_scheduler", "StepLR"), (), {"step_size": 3}),
    "scaler": {"scale": 65536.0, "growth_factor": 2.0, "_growth_tracker": 0},
    "amp_scaler": Made(Name("torch.amp.grad_scaler", "GradScaler"), (), {"_scale": None}),
    "config": Made(Name("omegaconf.dictconfig", "DictConfig"), (), {"_content": {"a": 1}}),
    "sparse": Made(Name("torch._utils", "_rebuild_sparse_tensor"), (1, 2)),
    "float8": Tensor(np.ones(3, "float8_e4m3fn")),
}


@pytest.mark.parametrize("file", [zip_file, legacy_file], ids=["zip", "legacy"])
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_what_is_beside_the_weights_does_not_matter(tmp_path, file, protocol):
    tree = {**BESIDE, "model": _under("module."), "epoch": 3}
    (tmp_path / "x.pth").write_bytes(file(tree, protocol))
    found = read_weights(tmp_path / "x.pth")
    _same(found.arrays)
    assert found.left_out == ()
    for key, value in BESIDE.items():  # each on its own, so that none needs another
        _same(_read(tmp_path, {key: value, "state_dict": _under("")}, file=file).arrays)


# Which file each would create, if it were run.
UNKNOWN = {
    "a class that opens a file": lambda mark: (zipfile.ZipFile, (str(mark), "w")),
    "a function": lambda mark: (np.savetxt, (str(mark), [1.0])),
    "a method": lambda mark: (pathlib.Path.touch, (mark,)),
}


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("kind", UNKNOWN)
def test_functions_beside_the_weights_are_not_run(tmp_path, kind, protocol):
    mark = tmp_path / "was_run"

    class Hostile:
        def __reduce__(self):
            return UNKNOWN[kind](mark)

    pickle.loads(pickle.dumps(Hostile()))  # it does run
    mark.unlink()
    for file in (zip_file, legacy_file):
        (tmp_path / "x.pth").write_bytes(file({"hook": Hostile(), **_under("")}, protocol))
        _same(read_weights(tmp_path / "x.pth").arrays)
        assert not mark.exists()


def test_nothing_is_imported(tmp_path):
    assert "this" not in sys.modules
    _same(_read(tmp_path, {"a": Made(Name("this", "d"), (1,)), "model": _under("")}).arrays)
    assert "this" not in sys.modules


def test_a_pickle_cannot_change_a_tensor_that_was_checked(tmp_path):
    """A view is of raw memory, so one that is changed afterwards would reach out of its storage."""
    tensor = Made(Name("torch._utils", "_rebuild_parameter"), (Tensor(WHOLE), True, None))
    _same(_read(tmp_path, {**_under(""), "fc.bias": tensor}).arrays, STATE | {"fc.bias": WHOLE})
    for attributes in ({"_strides": (9, 9, 9)}, (None, {"_offset": -5})):
        changed = tensor._replace(attributes=attributes)
        with pytest.raises(UserError, match=r"is damaged .*a tensor that the pickle changes"):
            _read(tmp_path, {**_under(""), "fc.bias": changed})


def test_very_many_kinds_of_objects_are_refused(tmp_path):
    many = [Name("a", f"b{i}") for i in range(1100)]  # each would become a class
    with pytest.raises(UserError, match="more kinds of objects than a checkpoint has"):
        _read(tmp_path, {"model": _under(""), "many": many})


@pytest.mark.parametrize(
    ("tree", "left_out"),
    [
        ({"state": {"model": _under("")}, "epoch": 1}, ()),
        ({"model_state": _under("module.")}, ()),
        ({"ema": {"decay": 0.9, "shadow": _under("")}}, ()),
        ({"state_dict_ema": _under("")}, ()),
        ({"a": {"b": {"c": {"d": _under("")}}}}, ()),
        (_under("backbone."), ()),
        (_under("net."), ()),
        (_under("encoder_q."), ()),
        (_under("module.encoder."), ()),
        ({"state_dict": _under("model.module._orig_mod.")}, ()),
        (_under("backbone.body."), ()),
        ({"n_averaged": Tensor(np.array(3)), **_under("module.")}, ()),  # torch's AveragedModel
        ({**_under("backbone."), "neck.conv.weight": Tensor(WHOLE)}, ("neck.conv.weight",)),
        ({**_under("m.encoder_q."), "m.queue": Tensor(WHOLE)}, ("m.queue",)),
        ({"model": _under(""), "optimizer": {"momentum": _under("")}}, ()),
    ],
)
def test_the_network_is_found_wherever_it_is(tmp_path, tree, left_out):
    for file in (zip_file, legacy_file):
        found = _read(tmp_path, tree, file=file)
        _same(found.arrays)
        assert found.left_out == left_out


def test_prefixes_in_files_of_arrays(tmp_path):
    np.savez(tmp_path / "w.npz", **{f"net.{name}": array for name, array in STATE.items()})
    _same(read_weights(tmp_path / "w.npz").arrays)


def test_the_head_of_mmpretrain_is_beside_its_backbone(tmp_path):
    tree = {f"backbone.{name}": Tensor(STATE[name]) for name in NAMES[:3]}
    tree |= {f"head.{name}": Tensor(STATE[name]) for name in NAMES[3:]}
    _same(_read(tmp_path, {"meta": {}, "state_dict": tree}).arrays)


TEACHER = {name: array + 100 for name, array in STATE.items()}
# The networks of a checkpoint, and a shorter name for each.
SEVERAL = {
    "model, model_ema.module": (
        {"model": _under(""), "model_ema": _under("module.", TEACHER)},
        ("model", "model_ema"),
    ),
    "state_dict, state_dict_ema": (
        {"state_dict": _under(""), "state_dict_ema": _under("", TEACHER)},
        ("state_dict", "state_dict_ema"),
    ),
    "student.module.backbone, teacher.backbone": (
        {"student": _under("module.backbone."), "teacher": _under("backbone.", TEACHER)},
        ("student", "teacher"),
    ),
    "state_dict.module.encoder_q, state_dict.module.encoder_k": (
        {"state_dict": {**_under("module.encoder_q."), **_under("module.encoder_k.", TEACHER)}},
        ("encoder_q", "module.encoder_k"),
    ),
    "., momentum": ({**_under(""), **_under("momentum.", TEACHER)}, (".", "momentum")),
}


@pytest.mark.parametrize("names", SEVERAL)
def test_of_several_networks_none_is_guessed(tmp_path, names):
    (tree, shorter), whole = SEVERAL[names], names.split(", ")
    file = tmp_path / "x.pth"
    with pytest.raises(UserError) as refused:
        _read(tmp_path, tree)
    assert str(refused.value) == (
        f"{file} has 2 networks, {names}; add the name of the one to use, such as {file}:{whole[0]}"
    )
    for student, teacher in (whole, shorter):
        _same(_read(tmp_path, tree, student).arrays)
        _same(_read(tmp_path, tree, teacher).arrays, TEACHER)
    with pytest.raises(UserError, match=f"x.pth has no network nobody; it has {names}"):
        _read(tmp_path, tree, "nobody")


def _module(children=None, **parameters):
    """A network as torch.save writes it if it is given the object."""
    attributes = {
        "training": True,
        "_parameters": {name: Tensor(array) for name, array in parameters.items()},
        "_buffers": collections.OrderedDict(),
        "_modules": collections.OrderedDict(children or {}),
    }
    return Made(Name("my_project.networks", "Module"), (), attributes)


@pytest.mark.parametrize("file", [zip_file, legacy_file], ids=["zip", "legacy"])
def test_a_network_that_was_saved_as_an_object_is_read_as_its_weights(tmp_path, file):
    block = _module(
        {"conv1": _module(weight=STATE[NAMES[1]]), "bn1": _module(bias=STATE[NAMES[2]])}
    )
    children = {"conv1": _module(weight=STATE[NAMES[0]]), "layer1": _module({"0": block})}
    net = _module({**children, "fc": _module(weight=STATE[NAMES[3]], bias=STATE[NAMES[4]])})
    for tree in (net, _module({"module": net}), {"model": net, "epoch": 1}):
        _same(_read(tmp_path, tree, file=file).arrays)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ([1, 2], "but a list"),
        (Tensor(WHOLE), "but a tensor without a name"),
        (
            {"args": 1, "epoch": 2, "a": 3, "b": 4},
            "but a dictionary .* args, epoch, a and 1",
        ),
        ({"conv1.weight": np.ones(3)}, "but a dictionary without tensors, of conv1.weight"),
        (Made(Name("my.project", "Trainer")), "but an object of the class my.project.Trainer"),
    ],
)
def test_a_checkpoint_without_weights_says_what_it_has(tmp_path, tree, message):
    with pytest.raises(UserError, match=f"x.pth has no state dictionary of tensors, {message}.*;"):
        _read(tmp_path, tree)


@pytest.mark.parametrize("rebuild", ["qtensor", "sparse_tensor", "meta_tensor_no_storage"])
def test_weights_of_a_kind_that_is_not_read_are_named(tmp_path, rebuild):
    odd = Made(Name("torch._utils", f"_rebuild_{rebuild}"), (1, 2, 3))
    message = rf"of a kind that is not read \(fc.bias: {rebuild}\); save the state_dict of a "
    with pytest.raises(UserError, match=message):
        _read(tmp_path, {**_under(""), "fc.bias": odd})


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "uint16", "uint32"])
def test_types_of_newer_torch_are_read(tmp_path, dtype):
    values = np.array([[0, 1, 2], [3, 4, 448]], dtype)
    for file in (zip_file, legacy_file):
        arrays = _read(tmp_path, {"a.weight": Tensor(values)}, file=file).arrays
        assert arrays["a.weight"].dtype == dtype
        np.testing.assert_array_equal(arrays["a.weight"], values)


@pytest.mark.parametrize(
    ("arrays", "names"),
    [
        ({"module.a": WHOLE, "module.b": WHOLE}, {"a", "b"}),
        ({"module._orig_mod.a": WHOLE}, {"a"}),
        ({"module.a": WHOLE, "n_averaged": np.array(3)}, {"a"}),  # torch's AveragedModel
        ({"module.a": WHOLE, "b": WHOLE}, {"module.a", "b"}),
    ],
)
def test_what_wrappers_put_before_names_is_taken_off(tmp_path, arrays, names):
    np.savez(tmp_path / "w.npz", **arrays)
    assert set(read_weights(tmp_path / "w.npz").arrays) == names


@pytest.mark.skipif(not importlib.util.find_spec("torch"), reason="needs torch")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
def test_what_torch_users_save_is_read(tmp_path, new):
    import torch

    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    net(torch.ones(2, 3, 5, 5)).sum().backward()
    optimizer.step()
    saved = {
        "model": net.state_dict(),
        "optimizer": optimizer.state_dict(),
        "dtype": torch.float32,
        "device": torch.device("cpu"),
        "seen": {1, 2},
        "raw": b"bytes",
        "shape": torch.Size([1]),
        "counter": collections.Counter("aab"),
    }
    averaged = torch.optim.swa_utils.AveragedModel(net)
    expanded = {"a": torch.ones(1).expand(3, 4)}
    path = tmp_path / "x.pth"
    for what, of in ((saved, net), (averaged.state_dict(), net), ({"state_dict_ema": expanded}, 0)):
        torch.save(what, path, _use_new_zipfile_serialization=new)
        expected = torch.load(path, weights_only=True)
        arrays = read_weights(path).arrays
        if not of:
            np.testing.assert_array_equal(arrays["a"], np.ones((3, 4)))
            continue
        assert list(arrays) == list(net.state_dict())
        assert isinstance(expected, dict)
        for name, tensor in net.state_dict().items():
            np.testing.assert_array_equal(arrays[name], tensor.numpy())
    torch.save({"a": torch._neg_view(torch.ones(2))}, path, _use_new_zipfile_serialization=new)
    with pytest.raises(UserError, match=r"of a kind that is not read \(a: conj"):
        read_weights(path)
