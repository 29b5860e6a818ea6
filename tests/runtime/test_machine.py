"""What commands use of the machine: huge pages, and the compilation cache."""

import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from resnet_flax.runtime import allocator

ROOT = Path(__file__).parent.parent.parent


def _environment(tmp_path, **settings):
    without = (
        "GLIBC_TUNABLES",
        "LD_PRELOAD",
        allocator.THRESHOLD,
        "JAX_COMPILATION_CACHE_DIR",
        "JAX_ENABLE_COMPILATION_CACHE",
    )
    kept = {name: value for name, value in os.environ.items() if name not in without}
    return {**kept, "XDG_CACHE_HOME": str(tmp_path / "cache"), **settings}


def _run(command, **environment):
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="glibc and the kernel's switch are Linux's")
@pytest.mark.parametrize(
    ("switch", "before", "expected"),
    [
        ("always [madvise] never", None, "glibc.malloc.hugetlb=1"),
        ("always [madvise] never", "glibc.a=2", "glibc.a=2:glibc.malloc.hugetlb=1"),
        ("always [madvise] never", "glibc.malloc.hugetlb=0", "glibc.malloc.hugetlb=0"),
        ("[always] madvise never", None, None),
        ("always madvise [never]", None, None),
    ],
)
def test_a_program_starts_anew_with_huge_pages_once(tmp_path, switch, before, expected):
    (tmp_path / "enabled").write_text(switch)
    program = tmp_path / "program.py"
    program.write_text(
        "import os, sys, pathlib\n"
        f"started = pathlib.Path({str(tmp_path / 'started')!r})\n"
        "started.write_text(started.read_text() + '.' if started.exists() else '.')\n"
        "from resnet_flax.runtime import allocator\n"
        f"allocator.THP = pathlib.Path({str(tmp_path / 'enabled')!r})\n"
        "allocator.reexec()\n"
        "print(repr((os.environ.get('GLIBC_TUNABLES'), sys.argv[1:], os.getpid())))\n"
    )
    environment = _environment(tmp_path, **({"GLIBC_TUNABLES": before} if before else {}))
    process = subprocess.Popen(
        [sys.executable, "-X", "utf8", str(program), "a b", "--c"],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    printed, _ = process.communicate()
    # The same process, so its parent still finds it.
    assert printed == f"{(expected, ['a b', '--c'], process.pid)!r}\n"
    assert len((tmp_path / "started").read_text()) == (2 if expected != before else 1)


TBB = any(found.name == "tbb" for found in metadata.distributions())
THERE = (sys.platform, platform.machine()) == ("linux", "x86_64") and (TBB or os.environ.get("CI"))


@pytest.mark.skipif(not THERE, reason="needs the extra 'cpu' on Linux and x86-64")
@pytest.mark.parametrize(
    ("device", "platforms", "kept"),
    [("null", "", True), ("nvidia0", "", False), ("nvidia0", "cpu", True), ("accel0", "", False)],
)
def test_training_on_a_cpu_keeps_its_large_buffers(tmp_path, device, platforms, kept):
    (tmp_path / device).touch()
    (tmp_path / "enabled").write_text("always madvise [never]")
    program = tmp_path / "program.py"
    program.write_text(
        "import os, pathlib\n"
        "from resnet_flax.runtime import allocator\n"
        f"allocator.DEVICES = pathlib.Path({str(tmp_path)!r})\n"
        f"allocator.THP = pathlib.Path({str(tmp_path / 'enabled')!r})\n"
        "allocator.reexec(keep=True)\n"
        "import numpy as np\n"
        "def take():\n"
        "    for size in (2_500_000, 10_000_000):\n"
        "        np.ones(size)\n"
        "take()\n"
        "def faults():\n"
        "    return int(pathlib.Path('/proc/self/stat').read_text().split()[9])\n"
        "before = faults()\n"
        "for _ in range(10):\n"
        "    take()\n"
        "maps = pathlib.Path('/proc/self/maps').read_text()\n"
        "print('tbbmalloc_proxy' in maps, faults() - before < 1000, os.environ.get('LD_PRELOAD'))\n"
    )
    printed = _run(
        [sys.executable, str(program)], **_environment(tmp_path, JAX_PLATFORMS=platforms)
    )
    assert printed == f"{kept} {kept} None\n"


@pytest.mark.skipif(not THERE, reason="needs the extra 'cpu' on Linux and x86-64")
def test_what_the_environment_says_is_left(tmp_path, monkeypatch):
    (tmp_path / "enabled").write_text("always [madvise] never")
    monkeypatch.setattr(allocator, "THP", tmp_path / "enabled")
    monkeypatch.setattr(allocator, "DEVICES", tmp_path)
    for name in ("GLIBC_TUNABLES", "LD_PRELOAD", allocator.THRESHOLD):
        monkeypatch.delenv(name, raising=False)
    pages = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    assert allocator.settings(keep=False) == pages
    kept = allocator.settings(keep=True)
    assert set(kept) == {"GLIBC_TUNABLES", "LD_PRELOAD", allocator.THRESHOLD}
    monkeypatch.setenv("LD_PRELOAD", "/opt/of_the_site.so")
    assert allocator.settings(keep=True) == pages
    monkeypatch.delenv("LD_PRELOAD")
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=0")
    assert allocator.settings(keep=True) == {}
    monkeypatch.delenv("GLIBC_TUNABLES")
    # It re-executes only once, whether the loader used the library or not.
    monkeypatch.setenv(allocator.THRESHOLD, kept[allocator.THRESHOLD])
    assert allocator.settings(keep=True) == {}


@pytest.mark.skipif(sys.platform != "linux", reason="glibc and the kernel's switch are Linux's")
def test_who_runs_the_program_from_another_is_not_started_anew(tmp_path):
    (tmp_path / "enabled").write_text("always [madvise] never")
    (tmp_path / "inner.py").write_text(
        "from resnet_flax.runtime import allocator\n"
        "import os, pathlib\n"
        f"allocator.THP = pathlib.Path({str(tmp_path / 'enabled')!r})\n"
        "allocator.reexec()\n"
        "print(os.environ.get('GLIBC_TUNABLES'))\n"
    )
    outer = tmp_path / "outer.py"
    outer.write_text(
        "import runpy, sys\n"
        "print('outer')\n"
        f"sys.argv = [{str(tmp_path / 'inner.py')!r}, '--workdir=here']\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    printed = _run([sys.executable, str(outer)], **_environment(tmp_path))
    assert printed.split() == ["outer", "None"]


def test_what_is_compiled_is_kept_where_nothing_else_is_said(tmp_path):
    program = (
        "import jax, json\n"
        "from resnet_flax.runtime import compilation_cache\n"
        "compilation_cache.enable()\n"
        "print(json.dumps([jax.config.jax_compilation_cache_dir,\n"
        "    jax.config.jax_compilation_cache_max_size]))\n"
    )
    command = [sys.executable, "-c", program]
    place, most = json.loads(_run(command, **_environment(tmp_path)))
    assert most == 4 * 2**30
    assert Path(place).parent == tmp_path / "cache" / "resnet_flax" / "compiled"
    assert Path(place).is_dir()
    other = _environment(tmp_path, JAX_COMPILATION_CACHE_DIR=str(tmp_path / "mine"))
    assert json.loads(_run(command, **other))[0] == str(tmp_path / "mine")
    smaller = _environment(tmp_path, JAX_COMPILATION_CACHE_MAX_SIZE="1000")
    assert json.loads(_run(command, **smaller)) == [place, 1000]
    off = _environment(tmp_path, JAX_ENABLE_COMPILATION_CACHE="false")
    assert json.loads(_run(command, **off))[0] is None
    (tmp_path / "file").write_text("")
    unwritable = _environment(tmp_path, XDG_CACHE_HOME=str(tmp_path / "file"))
    assert json.loads(_run(command, **unwritable))[0] is None


@pytest.mark.long
def test_a_second_run_compiles_nothing_again(tmp_path, data_dir):
    command = [sys.executable, "train.py", f"--config.data.data_dir={data_dir}"]
    command += ["--config.steps=2", "--config.optim.boundaries=1", "--config.optim.warmup_steps=0"]
    environment = _environment(tmp_path)
    read = []
    for name in ("first", "second"):
        _run([*command, f"--workdir={tmp_path / name}"], **environment)
        times = (tmp_path / "cache").glob("**/*-atime")  # JAX records when it used an entry
        read.append({path.name: path.read_bytes() for path in times})
    assert len(read[0]) >= 2  # the training step and the evaluation
    # A program whose compilation time is near the threshold may be cached by one run only.
    again = [name for name in read[0] if read[0][name] != read[1].get(name)]
    assert {"jit_train_step", "jit_eval_step"} <= {name.split("-")[0] for name in again}
    new = {name.split("-")[0] for name in read[1].keys() - read[0].keys()}
    assert not new & {"jit_train_step", "jit_eval_step", "jit_init_state"}
