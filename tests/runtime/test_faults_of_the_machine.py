"""Errors of Python and JAX that the machine causes are one sentence."""

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

import resnet_flax
from resnet_flax.cli import main
from resnet_flax.runtime import machine
from resnet_flax.runtime.provenance import provenance

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "there is not enough memory on this host; use fewer data.workers"),
        (
            MemoryError("Unable to allocate 7 TiB"),
            r"on this host \(Unable to allocate 7 TiB\); use",
        ),
        (
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nX"),
            r"not enough memory on the device \(Out of memory allocating 9 bytes.\); in training",
        ),
        (
            jax.errors.JaxRuntimeError("INTERNAL: Error dispatching: Out of memory allocating 9"),
            r"not enough memory on the device \(INTERNAL: Error dispatching: Out of memory alloc",
        ),
        (OSError(errno.ENOSPC, "No space left on device"), "a file cannot be used: No space left"),
        (PermissionError(errno.EACCES, "Permission denied", "/x/y"), "/x/y cannot be used: Perm"),
    ],
)
def test_a_fault_of_the_machine_is_a_sentence(error, said):
    (sentence,) = str(machine.explained(error)).splitlines()
    assert re.search(said, sentence)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("out of memory"),
        AssertionError(),
        jax.errors.JaxRuntimeError("INVALID_ARGUMENT: shapes"),
        OSError(errno.EINVAL, "Invalid argument"),
        ValueError("a bug"),
    ],
)
def test_other_errors_keep_their_traceback(error):
    assert machine.explained(error) is None


# JAX raises an error of this type without a word where JAX_PLATFORMS=cuda and no plugin is there.
@pytest.mark.parametrize(
    "error",
    [
        AssertionError(),
        RuntimeError("Unable to initialize backend 'cuda': ... (set JAX_PLATFORMS='' to choose)"),
    ],
)
def test_a_device_that_is_not_there_is_named(monkeypatch, capsys, tmp_path, error):
    def none():
        raise error

    monkeypatch.setattr(jax, "devices", none)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    assert (
        main(["reproduce", "run", "degradation_digits", "--dry_run", f"--workdir={tmp_path}"]) == 2
    )
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: JAX finds no device for JAX_PLATFORMS=cuda")
    assert "unset JAX_PLATFORMS to use what there is, or" in line
    assert "set JAX_PLATFORMS=''" not in line


@pytest.mark.long
@pytest.mark.parametrize("verb", ["train", "sweep --seeds=0"])
def test_a_platform_that_is_not_known_is_one_sentence(tmp_path, verb):
    done = subprocess.run(
        [sys.executable, "-m", "resnet_flax", *verb.split(), f"--workdir={tmp_path / 'run'}"],
        env={**os.environ, "JAX_PLATFORMS": "nowhere"},
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2
    assert line.startswith("error: JAX finds no device for JAX_PLATFORMS=nowhere (Unable to init")


def test_closed_streams_are_opened_before_a_file_gets_their_numbers(tmp_path):
    code = (
        "import os, sys\n"
        "from resnet_flax.runtime import terminal\n"
        "terminal.open_closed()\n"
        f"with open({str(tmp_path / 'file')!r}, 'w') as file:\n"
        "    print(file.fileno() > 2, [os.path.sameopenfile(n, os.open(os.devnull, 0)) for n in"
        " (0, 1, 2)], None in (sys.stdin, sys.stdout, sys.stderr), file=file)\n"
        "    print('lost')\n"
    )
    command = f'"{sys.executable}" -c "$1" <&- >&- 2>&-'
    assert subprocess.run(["sh", "-c", command, "sh", code], cwd=ROOT).returncode == 0
    assert (tmp_path / "file").read_text() == "True [True, True, True] False\n"


@pytest.mark.parametrize(
    ("redirected", "status", "said"),
    [
        (">&-", 0, ""),
        (
            ">/dev/full",
            2,
            "error: standard output, or a file, cannot be used: No space left on device\n",
        ),
    ],
)
def test_standard_output_that_takes_nothing(redirected, status, said):
    command = f'"{sys.executable}" -m resnet_flax models {redirected}'
    done = subprocess.run(["sh", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (status, said)


def test_help_is_not_printed_to_standard_error_instead():
    command = f'"{sys.executable}" -m resnet_flax --help >&-'
    done = subprocess.run(["sh", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_result_names_the_version_of_the_package(monkeypatch):
    monkeypatch.setattr("resnet_flax.runtime.provenance._git", lambda *_: "")  # as in a wheel
    found = provenance()
    assert (found["commit"], found["versions"]["resnet_flax"]) == ("", resnet_flax.__version__)
