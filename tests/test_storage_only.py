"""Files are read and written through `runtime/storage` alone, but for those listed here."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "resnet_flax"
STORAGE = ROOT / "runtime" / "storage"
FILES = sorted(file for file in ROOT.rglob("*.py") if STORAGE not in file.parents)

# Functions of modules that read, write, list, rename or remove files.
FUNCTIONS = {
    "builtins": {"open"},
    "os": {
        *("access", "chmod", "fsync", "ftruncate", "link", "listdir", "lstat", "makedirs", "mkdir"),
        *("open", "remove", "removedirs", "rename", "renames", "replace", "rmdir", "scandir"),
        *("stat", "statvfs", "symlink", "sync", "truncate", "unlink", "utime", "walk"),
    },
    "os.path": {
        *("exists", "getmtime", "getsize", "isdir", "isfile", "islink", "ismount", "lexists"),
        *("realpath", "samefile"),
    },
    "shutil": {"copy", "copy2", "copyfile", "copytree", "disk_usage", "move", "rmtree"},
    "tempfile": {"NamedTemporaryFile", "TemporaryDirectory", "mkdtemp", "mkstemp"},
    "glob": {"glob", "iglob"},
    "io": {"open"},
    "gzip": {"open"},
    "np": {"load", "save", "savez"},
}
# Methods of `Path`, and others by which objects write themselves to a path. `replace` is one too,
# and tells itself from that of a string by its number of arguments.
METHODS = {
    *("chmod", "exists", "glob", "hardlink_to", "is_dir", "is_file", "is_symlink", "iterdir"),
    *("lstat", "mkdir", "open", "read_bytes", "read_text", "rename", "rglob", "rmdir", "samefile"),
    *("stat", "symlink_to", "touch", "unlink", "walk", "write_bytes", "write_text"),
}

# What is no workdir: for each module the calls that it may have, and what they are for.
ELSEWHERE = {
    "cli/__init__": ({"os.open"}, "/dev/null"),
    "cli/parser": ({"os.path.isdir", "os.path.isfile"}, "what an argument may be"),
    "config": ({".is_dir", ".is_file", ".glob"}, "config files, which are Python"),
    "data/decoding": ({".open"}, "images"),
    "data/sources/folder": ({".open", ".is_dir", ".stat", "os.scandir"}, "images"),
    "data/sources/image_files": ({".is_dir", "os.listdir", "os.scandir", "os.walk"}, "images"),
    "data/sources/tfds": (
        {".is_dir", ".iterdir", ".open", ".rglob", ".stat"},
        "a data set of TFDS",
    ),
    "models/counts": ({".read_text", ".write_text"}, "a file of this package"),
    "runtime/allocator": (
        {".glob", ".read_text", "os.path.exists", "os.path.realpath"},
        "/dev, /sys and the files of an installed package",
    ),
    "runtime/compilation_cache": ({".mkdir", ".read_text"}, "JAX's cache, and /proc"),
    "runtime/launchers": ({".glob"}, "/dev"),
    "runtime/relay": ({".open"}, "a method of its own, which opens a socket"),
    "runtime/terminal": ({"open", "os.open"}, "/dev/null"),
    "training/writers": ({"open"}, "/dev/null"),
    "weights/catalog": (
        {".is_file", ".mkdir", ".open", ".replace", ".unlink", ".write_bytes"},
        "a cache of published weights",
    ),
    "weights/formats": (
        {".exists", ".is_file", ".open", ".read_bytes", "np.load"},
        "weights of other programs",
    ),
    "weights/torch_pickle": ({".open", ".stat"}, "weights of other programs"),
}


def _name(file: Path) -> str:
    return file.relative_to(ROOT).with_suffix("").as_posix()


def calls(source: str) -> set[str]:
    """Calls in a module's source that look like an access to files, such as "os.replace"."""
    return {found for node in ast.walk(ast.parse(source)) for found in _access(node)}


def _access(node: ast.AST) -> list[str]:
    if isinstance(node, ast.ImportFrom):
        functions = FUNCTIONS.get(node.module or "", set())
        return [f"{node.module}.{a.name}" for a in node.names if a.name in functions]
    return _call(node) if isinstance(node, ast.Call) else []


def _call(call: ast.Call) -> list[str]:
    text = ast.unparse(call.func)
    owner, _, name = text.rpartition(".")
    if name in FUNCTIONS.get(owner or "builtins", ()):
        return [text]
    if not isinstance(call.func, ast.Attribute) or owner in ("storage", *FUNCTIONS):
        return []
    one_argument = len(call.args) == 1 and not call.keywords
    moved = name == "replace" and one_argument
    return [f".{name}"] if name in METHODS or moved else []


@pytest.mark.parametrize("file", FILES, ids=_name)
def test_files_are_accessed_through_the_storage_module(file):
    allowed, _ = ELSEWHERE.get(_name(file), (set(), ""))
    assert calls(file.read_text()) == allowed


def test_every_exception_is_of_a_module():
    assert set(ELSEWHERE) <= set(map(_name, FILES))


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("open('x')", "open"),
        ("Path('x').open()", ".open"),
        ("(workdir / 'x').write_text('y')", ".write_text"),
        ("os.replace(a, b)", "os.replace"),
        ("os.path.exists(a)", "os.path.exists"),
        ("shutil.rmtree(a, ignore_errors=True)", "shutil.rmtree"),
        ("scratch.replace(path)", ".replace"),
        ("[n for n in path.glob('*')]", ".glob"),
        ("from os import path, replace", "os.replace"),
        ("with a() as b, c.open('a') as d: pass", ".open"),
    ],
)
def test_what_is_an_access(line, found):
    assert calls(line) == {found}


@pytest.mark.parametrize(
    "line", ["'a'.replace('a', 'b')", "dataclasses.replace(a, b=1)", "storage.read_json(path)"]
)
def test_what_is_none(line):
    assert calls(line) == set()
