"""The order of calls by which a file survives a power failure."""

import errno
import os

import pytest

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
