"""What a file is that has no weights that are read here, in words."""

import re
from collections.abc import Sequence
from pathlib import Path

from resnet_flax.errors import listed

_ARCHIVE = "an archive compressed with {}"

# How files begin, and what they are then.
_BEGINNINGS: tuple[tuple[bytes, str], ...] = (
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file, such as Keras and MATLAB write"),
    (b"\x1f\x8b", _ARCHIVE.format("gzip")),
    (b"BZh", _ARCHIVE.format("bzip2")),
    (b"\xfd7zXZ\x00", _ARCHIVE.format("xz")),
    (b"\x28\xb5\x2f\xfd", _ARCHIVE.format("zstd")),
    (b"7z\xbc\xaf\x27\x1c", _ARCHIVE.format("7-Zip")),
    (b"Rar!", _ARCHIVE.format("RAR")),
    (b"\x93NUMPY", "one NumPy array without a name"),
    (b"GGUF", "a GGUF file"),
    (b"MATLAB 5.0", "a MATLAB file"),
    (b"SQLite format 3", "an SQLite database"),
    (b"\x12\x01\x00\x00\x00\x00\x00\x00", "a file of MXNet's parameters"),
    (b"%PDF", "a PDF document"),
    (b"\x89PNG", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"GIF8", "a GIF image"),
    (b"\x7fELF", "a program"),
    (b"MZ", "a program"),
)

# What the names of files without a beginning of their own say.
_ENDINGS: tuple[tuple[str, str], ...] = (
    (r"\.onnx", "an ONNX model"),
    (r"\.pb", "a TensorFlow graph"),
    (r"\.index|\.data-\d+-of-\d+|\.meta|/checkpoint", "a part of a TensorFlow checkpoint"),
    (r"\.msgpack", "a msgpack file, such as Flax writes"),
    (r"\.mlmodel", "a Core ML model"),
    (r"\.prototxt", "the description of a Caffe network, without its weights"),
    (r"\.t7", "a file of Lua Torch"),
)

# Members that tell what a zip archive is.
_MEMBERS: tuple[tuple[str, str], ...] = (
    (r"model\.weights\.h5", "a Keras model"),
    (r"word/.*", "a Word document"),
    (r"xl/.*", "an Excel document"),
    (r"ppt/.*", "a PowerPoint document"),
    (r"AndroidManifest\.xml", "an Android package"),
    (r"META-INF/MANIFEST\.MF", "a Java archive"),
    (r".*\.dist-info/METADATA", "a Python package"),
    (r"MAR-INF/MANIFEST\.json", "a TorchServe archive"),
    (r"(?:.*/)?serialized_exported_program\.json|(?:.*/)?archive_format", "a torch.export program"),
)

_OURS = re.compile(r".*\.(?:safetensors|pth|pt|th|tar|bin|ckpt|caffemodel|npz)", re.IGNORECASE)


def file_kind(path: Path, head: bytes) -> str:
    """What a file is by its beginning or else its name; empty if neither tells."""
    if head[257:262] == b"ustar":
        return "a tar archive"
    if head[4:8] == b"TFL3":
        return "a TensorFlow Lite model"
    kinds = (kind for beginning, kind in _BEGINNINGS if head.startswith(beginning))
    named = (kind for end, kind in _ENDINGS if re.search(f"(?:{end})$", str(path), re.IGNORECASE))
    return next(kinds, "") or next(named, "") or _text_kind(head)


def _text_kind(head: bytes) -> str:
    try:
        # The last character may be cut.
        text = head.decode().strip() if len(head) < 512 else head[:-4].decode("utf-8", "strict")
    except UnicodeDecodeError:
        return ""
    if not text or any(ord(letter) < 32 and letter not in "\t\r\n\f" for letter in text):
        return ""
    return "JSON text" if text.lstrip().startswith(("{", "[")) else "text"


def archive_kind(names: Sequence[str]) -> str:
    """What a zip archive is by its members, and what to do with it."""
    for member, kind in _MEMBERS:
        if any(re.fullmatch(member, name) for name in names):
            return kind
    inside = [name for name in names if _OURS.fullmatch(name)]
    if inside:
        return f"a zip archive with {listed(inside)} inside, which has to be unpacked first"
    files = [name for name in names if not name.endswith("/")]
    return f"a zip archive of {listed(files)}" if files else "an empty zip archive"
