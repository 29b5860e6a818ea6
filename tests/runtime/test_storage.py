"""The order of calls by which a file survives a power failure."""

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from resnet_flax.errors import UserError
from resnet_flax.runtime import storage


@pytest.fixture
def calls(monkeypatch):
    """What is synced, renamed and removed, in order, as ("sync", path) and so on."""
    seen, renamed = [], {}

    def fsync(descriptor, call=os.fsync):
        call(descriptor)
        seen.append(("sync", os.readlink(f"/proc/self/fd/{descriptor}")))

    def replace(old, new, call=os.replace):
        call(old, new)
        seen.append(("rename", str(new)))
        renamed[str(new)] = str(old)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    return seen


def test_a_file_is_whole_before_it_has_its_name_and_that_is_synced(tmp_path, calls):
    path = tmp_path / "a" / "b" / "file.json"
    storage.write_json(path, {"x": 1})
    assert calls == [
        ("sync", str(tmp_path)),
        ("sync", str(tmp_path / "a")),
        ("sync", str(tmp_path / "a" / "b" / ".file.json.new")),
        ("rename", str(path)),
        ("sync", str(tmp_path / "a" / "b")),
    ]
    assert storage.read_json(path) == {"x": 1}


def test_a_write_that_fails_leaves_the_old_file_alone(tmp_path, monkeypatch):
    path = tmp_path / "file"
    storage.write(path, "old")

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        storage.write(path, "new")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_file_that_another_library_saves_is_written_the_same_way(tmp_path, calls):
    path = tmp_path / "file"
    storage.write_by(path, lambda new: new.write_text("whole"))
    assert calls == [
        ("sync", str(tmp_path / ".file.new")),
        ("rename", str(path)),
        ("sync", str(tmp_path)),
    ]

    def fail(new):
        new.write_text("half")
        raise ValueError

    with pytest.raises(ValueError, match=r"^$"):
        storage.write_by(path, fail)
    assert path.read_text() == "whole"
    assert storage.names(tmp_path) == ["file"]


def test_what_is_in_a_directory(tmp_path):
    (tmp_path / "b" / "deep").mkdir(parents=True)
    for name in ("a", "b/c", "b/deep/d"):
        (tmp_path / name).write_text("x")
    assert storage.names(tmp_path) == ["a", "b"]
    assert storage.files_below(tmp_path) == ["a", "b/c", "b/deep/d"]
    for missing in (tmp_path / "none", tmp_path / "a"):
        assert storage.names(missing) == []
    storage.remove(tmp_path / "a")
    storage.remove(tmp_path / "b")
    storage.remove(tmp_path / "b")
    assert storage.names(tmp_path) == []


def test_a_probe_leaves_nothing_behind(tmp_path):
    storage.probe_file(tmp_path / "a" / "b" / "file")
    assert storage.names(tmp_path) == []
    storage.probe_directory(tmp_path / "c")
    assert storage.files_below(tmp_path) == []
    (tmp_path / "file").write_text("old")
    storage.probe_file(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "old"
    with pytest.raises(OSError, match=r"directory"):
        storage.probe_file(tmp_path / "file" / "below")


def test_a_probe_does_not_disturb_a_process_that_writes_that_file(tmp_path, monkeypatch):
    (tmp_path / ".file.new").write_text("another process writes this")
    storage.probe_file(tmp_path / "file")
    assert (tmp_path / ".file.new").read_text() == "another process writes this"
    open_, seen = Path.open, []

    def see(path, *how):
        seen.append((path.name, storage.is_directory(tmp_path / "a")))
        return open_(path, *how)

    monkeypatch.setattr(Path, "open", see)
    storage.probe_file(tmp_path / "a" / "b" / "file")
    assert seen == [(".file.new", False)]  # it must not remove what another one has just made
    (tmp_path / "nowhere").symlink_to(tmp_path / "missing")
    with pytest.raises(OSError, match=r"nowhere"):
        storage.probe_file(tmp_path / "nowhere" / "file")
    with pytest.raises(OSError, match=r"name too long"):
        storage.probe_file(tmp_path / f"{'x' * 250}.json")


def test_processes_that_probe_the_same_file_do_not_disturb_each_other(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        paths = [tmp_path / "a" / str(i // 8) / "file" for i in range(400)]
        list(pool.map(storage.probe_file, paths))
        list(pool.map(storage.probe_directory, [tmp_path] * 100))
    assert storage.files_below(tmp_path) == []


def test_a_tree_is_synced_from_its_files_upwards(tmp_path, calls):
    (tmp_path / "a" / "b").mkdir(parents=True)
    for name in ("top", "a/middle", "a/b/deep"):
        (tmp_path / name).write_text("x")
    storage.sync_tree(tmp_path)
    assert [path.removeprefix(str(tmp_path)) for _, path in calls] == [
        "/a/b/deep",
        "/a/b",
        "/a/middle",
        "/a",
        "/top",
        "",
    ]


def test_a_file_system_that_cannot_sync_directories_will_do(tmp_path, monkeypatch):
    def refuse(descriptor, call=os.fsync):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        call(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    storage.write(tmp_path / "file", "x")

    def broken(_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="Input/output"):
        storage.sync_directory(tmp_path)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("runs/a", "runs/a"),
        ("~/runs", "/home/someone/runs"),
        ("file:///data/my%20runs", "/data/my runs"),
        ("file://localhost/data", "/data"),
        ("FILE:/data", "/data"),
        (Path("file:///data"), "/data"),
        ("file:///~/a", "/~/a"),
        ("file:name", "file:name"),
        ("file:", "file:"),
        ("/data/12:30/a%20b", "/data/12:30/a%20b"),
        (Path("gst/x"), "gst/x"),
    ],
)
def test_paths_are_resolved(monkeypatch, given, expected):
    monkeypatch.setenv("HOME", "/home/someone")
    assert storage.local(given) == Path(expected)


@pytest.mark.parametrize("given", ["gs://a/b", "S3://a", Path("gs://a/b"), "https://a.b/c.pth"])
def test_addresses_are_refused(given):
    with pytest.raises(UserError, match=r"\w+:// is not supported, in .*; give a path on a disk"):
        storage.local(given)


@pytest.mark.parametrize("given", ["file://otherhost/data", "file://data", "FILE://data:80/x"])
def test_files_on_another_host_are_refused(given):
    with pytest.raises(UserError, match=r"is on another host, \w+(:80)?; give a path on a disk or"):
        storage.local(given)


@pytest.mark.parametrize("content", [b"[1, 2]", b"7", b'"x"', b"\xff\0", b"", b"[" * 100_000, b"{"])
def test_a_json_file_of_another_kind_is_as_none(tmp_path, content):
    path = tmp_path / "file.json"
    path.write_bytes(content)
    assert storage.read_json(path) is None
    assert storage.read_json(path, list) is None


def test_a_list_in_a_json_file_is_read_where_one_is_expected(tmp_path):
    path = tmp_path / "file.json"
    storage.write_json(path, [{"a": 1}])
    assert storage.read_json(path, list) == [{"a": 1}]
    assert storage.read_json(path) is None
