"""Files without weights that are read here: one sentence says what they are."""

import io
import json
import re
import tarfile
import zipfile

import numpy as np
import pytest

from resnet_flax.cli import main
from resnet_flax.errors import UserError
from resnet_flax.weights.files import read_weights


def _zip(*names):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in names:
            archive.writestr(name, b"content")
    return file.getvalue()


def _tar():
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("resnet.pth"))
    return file.getvalue()


def _npy():
    file = io.BytesIO()
    np.save(file, np.ones(3))
    return file.getvalue()


KINDS = {
    "net.keras": (
        _zip("metadata.json", "config.json", "model.weights.h5"),
        "a Keras model",
    ),
    "net.docx": (_zip("[Content_Types].xml", "word/document.xml"), "a Word document"),
    "net.xlsx": (_zip("[Content_Types].xml", "xl/workbook.xml"), "an Excel document"),
    "net.jar": (_zip("META-INF/MANIFEST.MF", "a/B.class"), "a Java archive"),
    "net.mar": (_zip("MAR-INF/MANIFEST.json", "w.pth"), "a TorchServe archive"),
    "net.whl": (_zip("a/__init__.py", "a-1.dist-info/METADATA"), "a Python package"),
    "net.pt2": (_zip("net/archive_format", "net/models/model.json"), "a torch.export program"),
    "net.zip": (
        _zip("weights/", "weights/resnet18.pth", "README"),
        "a zip archive with weights/resnet18.pth inside, which has to be unpacked first",
    ),
    "net.npz": (_zip("a.npy", "b.txt"), "a zip archive of a.npy, b.txt"),
    "many.zip": (_zip(*"abcde"), "a zip archive of a, b, c and 2 more"),
    "empty.zip": (_zip(), "an empty zip archive"),
    "net.h5": (b"\x89HDF\r\n\x1a\n" + bytes(500), "an HDF5 file, such as Keras and MATLAB write"),
    "net.onnx": (b"\x08\x07\x12\x07pytorch", "an ONNX model"),
    "net.pb": (b"\x0a\x10\x0a\x01x", "a TensorFlow graph"),
    "net.tflite": (b"\x1c\x00\x00\x00TFL3" + bytes(90), "a TensorFlow Lite model"),
    "net.ckpt.index": (b"\x00\x00\x00", "a part of a TensorFlow checkpoint"),
    "net.msgpack": (b"\x81\xa6params", "a msgpack file, such as Flax writes"),
    "net.params": (b"\x12\x01" + bytes(30), "a file of MXNet's parameters"),
    "net.pth.tar": (_tar(), "a tar archive"),
    "net.pth.gz": (b"\x1f\x8b\x08", "an archive compressed with gzip"),
    "net.npy": (_npy(), "one NumPy array without a name"),
    "net.gguf": (b"GGUF\x03\x00", "a GGUF file"),
    "net.jpg": (b"\xff\xd8\xff\xe0", "a JPEG image"),
    "net.json": (b'{"weight_map": {}}', "JSON text"),
    "net.py": ("# Weights of a réseau\n".encode() * 40, "text"),
}


@pytest.mark.parametrize("name", KINDS)
def test_what_a_file_is_and_what_was_expected(tmp_path, name):
    content, kind = KINDS[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as refused:
        read_weights(tmp_path / name)
    assert str(refused.value) == (
        f"{tmp_path / name} is {kind}, not a weights file; expected .safetensors, .pth, .th, "
        ".caffemodel or .npz"
    )


def test_of_bytes_that_nothing_tells_only_what_was_expected_is_said(tmp_path):
    for content in (bytes(range(1, 200)), b"\x00" * 600, "é".encode() * 300 + b"\xff"):
        (tmp_path / "w.dat").write_bytes(content)
        with pytest.raises(UserError, match=r"w.dat is not a weights file|w.dat is text, not"):
            read_weights(tmp_path / "w.dat")


def _safetensors(dtype="F32", shape=(2,), data=bytes(8)):
    header = {"a": {"dtype": dtype, "shape": shape, "data_offsets": [0, len(data)]}}
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize("end", [4, 8, 9, 30, -1])
def test_safetensors_that_are_cut_are_named_as_such(tmp_path, end):
    (tmp_path / "w.safetensors").write_bytes(_safetensors()[:end])
    with pytest.raises(UserError, match=r"w.safetensors is damaged or truncated"):
        read_weights(tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        ("F8_E4M3", "float8_e4m3fn"),
        ("F8_E5M2", "float8_e5m2"),
        ("F8_E4M3FNUZ", "float8_e4m3fnuz"),
        ("F8_E5M2FNUZ", "float8_e5m2fnuz"),
    ],
)
def test_float8_is_read(tmp_path, dtype, name):
    values = np.array([[0.5, -1, 2], [3, 4, -240]], name)
    path = tmp_path / "w.safetensors"
    path.write_bytes(_safetensors(dtype, values.shape, values.tobytes()))
    found = read_weights(path).arrays["a"]
    assert found.dtype == values.dtype
    np.testing.assert_array_equal(found, values)


def test_types_that_are_not_read_are_named(tmp_path):
    (tmp_path / "w.safetensors").write_bytes(_safetensors("F4", (4,), bytes(2)))
    with pytest.raises(UserError, match=r"has tensors of the type F4 \(a\), which is not read; sa"):
        read_weights(tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.array([{"a": 1}], object), "w.npz has Python objects in b, which only running code"),
        (np.array(["x"]), "w.npz has <U1 in b, not real numbers; give a file of weights"),
        (np.array([1j]), "w.npz has complex128 in b, not real numbers; give a file of weights"),
        (np.array(["2026-01-01"], "M8[D]"), r"w.npz has datetime64\[D\] in b, not real numbers"),
    ],
)
def test_arrays_that_are_no_numbers_are_named(tmp_path, array, message):
    np.savez(tmp_path / "w.npz", a=np.ones(3), b=array)
    with pytest.raises(UserError, match=message):
        read_weights(tmp_path / "w.npz")


def test_the_command_line_says_it_in_one_line(tmp_path, capsys):
    (tmp_path / "net.keras").write_bytes(KINDS["net.keras"][0])
    assert main(["export", str(tmp_path / "net.keras"), str(tmp_path / "out.safetensors")]) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(r"error: .* is a Keras model, not a weights file; expected .*\n", error)
