"""Weights files of all formats, intact, damaged and malicious."""

import io
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from torch_files import legacy_of, zip_of

from resnet_flax.errors import UserError
from resnet_flax.weights.contents import Node, choose
from resnet_flax.weights.files import read_weights, write_weights
from resnet_flax.weights.torch_tensors import Read, Storage, Tensor

# Written by torch, see make_goldens.py.
GOLDENS = Path(__file__).parent.parent / "goldens"
WHOLE = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
TENSORS = {
    "a": WHOLE,
    "turned": WHOLE.transpose(2, 0, 1),
    "part": WHOLE[1, 1:, ::2],
    "half": np.array([0.5, -2.0], np.float16),
    "bfloat16": np.array([0.5, -2.0], ml_dtypes.bfloat16),
    "parameter": np.array([1.5], np.float32),
    "empty": np.zeros((0, 3), np.float32),
    "count": np.array(7),
}


@pytest.mark.parametrize("name", ["tensors.pth", "tensors_legacy.pth"])
def test_what_torch_saved_is_read_without_torch(name):
    """The state dictionary in a training program's checkpoint, under DataParallel's names."""
    arrays = read_weights(GOLDENS / name).arrays
    assert list(arrays) == list(TENSORS)
    for key, expected in TENSORS.items():
        assert arrays[key].dtype == expected.dtype
        np.testing.assert_array_equal(arrays[key], expected)


def test_published_weights_are_read(shared_data):
    for depth, name in ((20, "resnet20-12fca82f.th"), (56, "resnet56-4bfd9763.th")):
        file = read_weights(shared_data / "weights" / name)
        assert file.sha256.startswith(name[9:17])
        assert len(file.arrays) == 5 * (depth - 1) + 2
        assert file.arrays["linear.weight"].shape == (10, 64)


def test_safetensors_and_npz(tmp_path):
    arrays = {"a": WHOLE, "b": np.array([1.5], ml_dtypes.bfloat16)}
    safetensors.numpy.save_file(arrays, tmp_path / "x.safetensors")
    write_weights(tmp_path / "y.safetensors", arrays, {"origin": "here"})
    np.savez(tmp_path / "z.npz", a=WHOLE)
    for name in ("x.safetensors", "y.safetensors", "z.npz"):
        file = read_weights(tmp_path / name)
        np.testing.assert_array_equal(file.arrays["a"], WHOLE)
        assert file.about == ({"origin": "here"} if name[0] == "y" else {})
    with safetensors.safe_open(tmp_path / "y.safetensors", "np") as file:
        assert file.metadata()["format"] == "pt"  # other programs refuse files without it


class _Hostile:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


HOSTILE = {
    "a command": ("posix.system", lambda mark: _Hostile(os.system, f"mkdir {mark}")),
    "code": (r"\w+.exec", lambda mark: _Hostile(exec, f"import os; os.mkdir({str(mark)!r})")),
    "a directory": ("posix.mkdir", lambda mark: _Hostile(os.mkdir, str(mark))),
    "an attribute": (r"\w+.getattr", lambda mark: _Hostile(getattr, "x", "join")),
    "in a state": (
        "posix.system",
        lambda mark: {"state_dict": {"a": _Hostile(os.system, f"mkdir {mark}")}},
    ),
}


@pytest.mark.parametrize("wrapped", [zip_of, legacy_of, bytes], ids=["zip", "legacy", "bare"])
@pytest.mark.parametrize("kind", HOSTILE)
def test_a_pickle_that_runs_code_is_refused_and_nothing_is_run(tmp_path, kind, wrapped):
    function, make = HOSTILE[kind]
    mark = tmp_path / "was_run"
    content = pickle.dumps(make(mark), protocol=2)
    pickle.loads(content)  # it does run
    assert mark.exists() or kind == "an attribute"
    if mark.exists():
        mark.rmdir()
    path = tmp_path / "x.pth"
    path.write_bytes(wrapped(content))
    with pytest.raises(UserError, match=rf"x.pth tries to run {function}, .* nothing was run"):
        read_weights(path)
    assert not mark.exists()


def _archive(program: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a/data.pkl", program)
    return file.getvalue()


# Nested tuples, each twice in the next.
_NESTED = b"(U\x01xtq\x00" + b"".join(
    b"(h" + bytes([i]) + b"h" + bytes([i]) + b"tq" + bytes([i + 1]) for i in range(60)
)


CRASHING = (
    # A function of the reader gets itself as its state, and is called.
    b"\x80\x02ctorch\nSize\nq\x01(h\x01)}Ntb)R.",
    b"\x80\x02ctorch._utils\n_rebuild_x\nq\x01(h\x01)}Ntb)R.",
    # The text of nested tuples is exponentially long.
    b"\x80\x02c_codecs\nencode\n(" + _NESTED + b"tR.",
    b"\x80\x02(U\x07storagectorch\nFloatStorage\n" + _NESTED + b"U\x03cpuK\x01NtQ.",
)


def test_a_pickle_cannot_crash_the_interpreter(tmp_path):
    for number, program in enumerate(CRASHING):
        (tmp_path / f"{number}.pth").write_bytes(_archive(program))
    code = (
        "import pathlib, resource, sys\n"
        "from resnet_flax.weights.torch_pickle import read_zip\n"
        "resource.setrlimit(resource.RLIMIT_AS, (2**33, 2**33))\n"
        "for path in pathlib.Path(sys.argv[1]).iterdir():\n"
        "    try:\n"
        "        read_zip(path)\n"
        "    except (TypeError, ValueError) as error:\n"
        "        print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == len(CRASHING)


def _tensor(storage: bytes, size: int, offset: int, shape: tuple, strides: tuple) -> bytes:
    """A legacy file with one tensor, written in the opcodes of pickles."""

    def numbers(values):
        return b"(" + b"".join(b"J" + struct.pack("<i", v) for v in values) + b"t"

    tensor = (
        b"\x80\x02}U\x01actorch._utils\n_rebuild_tensor_v2\n((U\x07storagectorch\nFloatStorage\n"
        b"U\x01kU\x03cpuJ" + struct.pack("<i", size) + b"NtQJ" + struct.pack("<i", offset)
    )
    tensor += numbers(shape) + numbers(strides) + b"\x89NtRs."
    return legacy_of(tensor) + pickle.dumps(["k"], protocol=2) + struct.pack("<q", size) + storage


def test_tensors_stay_within_their_storage(tmp_path):
    """A view is made of raw memory: one that reaches out of its storage would read what is not
    the file's."""
    path = tmp_path / "x.pth"
    storage = np.arange(6, dtype=np.float32).tobytes()
    path.write_bytes(_tensor(storage, 6, 1, (2, 2), (1, 2)))
    np.testing.assert_array_equal(read_weights(path).arrays["a"], [[1, 3], [2, 4]])
    for offset, shape, strides in (
        (0, (7,), (1,)),
        (3, (2, 2), (2, 2)),
        (0, (2,), (6,)),
        (-1, (2,), (1,)),
        (5, (2,), (-1,)),
        (0, (-2,), (1,)),
        (0, (2000, 2000), (0, 0)),
        (0, (2, 2), (1,)),
    ):
        path.write_bytes(_tensor(storage, 6, offset, shape, strides))
        with pytest.raises(UserError, match=r"x.pth is damaged"):
            read_weights(path)
    path.write_bytes(_tensor(storage, 2**30, 0, (2,), (1,)))
    with pytest.raises(UserError, match=r"x.pth is damaged or truncated .*truncated"):
        read_weights(path)


def test_a_small_file_takes_little_memory(tmp_path):
    path = tmp_path / "x.pth"

    def refused(content, reason):
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"x.pth is damaged or truncated \(.*{reason}"):
            read_weights(path)

    # The unpickler allocates its memo up to the largest index.
    refused(legacy_of(b"\x80\x02}r" + struct.pack("<I", 2**28) + b"."), "too large a memo index")
    # Compressed, a megabyte of zeros is a kilobyte.
    for name in ("data.pkl", "data/k"):
        file = io.BytesIO()
        with zipfile.ZipFile(GOLDENS / "tensors.pth") as whole, zipfile.ZipFile(file, "w") as new:
            for info in whole.infolist():
                squeezed = info.filename.endswith(name.replace("/k", "/0"))
                kind = zipfile.ZIP_DEFLATED if squeezed else zipfile.ZIP_STORED
                new.writestr(info.filename, whole.read(info), kind)
        refused(file.getvalue(), "is compressed")
    # Nested lists, each twice in the next, are never expanded.
    nested = b"]q\x00" + b"".join(
        b"](h" + bytes([i]) + b"h" + bytes([i]) + b"eq" + bytes([i + 1]) for i in range(60)
    )
    path.write_bytes(legacy_of(b"\x80\x02" + nested + b".") + pickle.dumps([], protocol=2))
    with pytest.raises(UserError, match="has no state dictionary"):
        read_weights(path)


def test_numbers_of_another_machine_s_order_are_refused(tmp_path):
    content = (GOLDENS / "tensors_legacy.pth").read_bytes()
    assert content.count(b"little_endian") == 1
    at = content.index(b"little_endian")
    true = content.index(b"\x88", at)  # NEWTRUE
    (tmp_path / "x.pth").write_bytes(content[:true] + b"\x89" + content[true + 1 :])
    with pytest.raises(UserError, match="big-endian"):
        read_weights(tmp_path / "x.pth")


def test_values_that_are_not_finite_are_named(tmp_path):
    arrays = {"a.weight": np.array([1.0, np.nan]), "b.weight": np.ones(2), "c": np.array([np.inf])}
    np.savez(tmp_path / "w.npz", **arrays)
    with pytest.raises(UserError, match=r"w.npz has values that are not finite in a.weight, c;"):
        read_weights(tmp_path / "w.npz")


def _files(tmp_path):
    write_weights(tmp_path / "w.safetensors", {"a": WHOLE, "b": np.ones(3)}, {})
    np.savez(tmp_path / "w.npz", a=WHOLE)
    return [
        *(GOLDENS / name for name in ("tensors.pth", "tensors_legacy.pth")),
        *(tmp_path / name for name in ("w.safetensors", "w.npz")),
    ]


def test_a_truncated_file_is_an_error_wherever_it_ends(tmp_path):
    for whole in _files(tmp_path):
        content = whole.read_bytes()
        path = tmp_path / f"cut_{whole.name}"
        for end in [*range(0, len(content), 37), len(content) - 1]:
            path.write_bytes(content[:end])
            with pytest.raises(
                UserError, match=r"cut_.* is (damaged|empty|not a weights|a pickle)"
            ):
                read_weights(path)


@pytest.mark.filterwarnings("ignore")
def test_flipped_bits_give_an_error_or_arrays_but_no_traceback(tmp_path):
    rng = np.random.default_rng(0)
    for whole in _files(tmp_path):
        content, refused = whole.read_bytes(), 0
        path = tmp_path / f"flipped_{whole.name}"
        for _ in range(150):
            at = int(rng.integers(8 * min(len(content), 1500)))
            flipped = bytearray(content)
            flipped[at // 8] ^= 1 << at % 8
            path.write_bytes(flipped)
            try:
                read_weights(path)
            except UserError:
                refused += 1
        assert refused > 20


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "w.pth is empty; download it again"),
        (b"\n<!DOCTYPE html><html>", "w.pth is a web page, not weights"),
        (b"\xef\xbb\xbf<!DOCTYPE html>", "w.pth is a web page, not weights"),
        (b"<html><head>", "w.pth is a web page, not weights"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "w.pth is a pointer of Git LFS"),
        (
            b"hello, world, this is text",
            "w.pth is text, not a weights file; expected .safetensors, .pth",
        ),
        (pickle.dumps({"a": 1}, protocol=2), "w.pth is a pickle, but not from torch.save"),
        (
            legacy_of(pickle.dumps({"a": 1}, 2) + pickle.dumps([], 2)),
            "w.pth has no state dictionary",
        ),
    ],
)
def test_what_is_no_weights_file_is_explained(tmp_path, content, message):
    path = tmp_path / "w.pth"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_weights(path)


def test_files_that_cannot_be_read_or_written_are_explained(tmp_path):
    with pytest.raises(UserError, match=r"nowhere.pth cannot be read: No such file"):
        read_weights(tmp_path / "nowhere.pth")
    with pytest.raises(UserError, match=r"is not a file; give a file of weights"):
        read_weights(tmp_path)


@pytest.mark.parametrize("path", ["/dev/zero", "/dev/null", "/tmp"])
def test_what_is_not_a_file_is_not_read(path):
    with pytest.raises(UserError, match=f"{path} is not a file; give a file of weights"):
        read_weights(path)


def test_networks_of_the_same_name_do_not_hide_each_other():
    tensors = {"layer1.0.conv1.weight": WHOLE}
    nodes = [Node("a.b", tensors), Node("a", {"b.layer1.0.conv1.weight": WHOLE})]
    for address in ("", "a.b"):
        with pytest.raises(UserError, match=r"w has 2 networks that are all called a.b; save the"):
            choose(nodes, address, "w")


def test_only_an_optimizer_s_keys_are_left_out():
    storage = Storage(np.dtype("float32"), 0)
    tree = {key: {"w": Tensor(storage, 0, (0,), (1,))} for key in ("optim", "optimal_model", "ema")}
    assert [node.path for node in Read(tree, 0, "w").nodes()] == ["optimal_model", "ema"]
