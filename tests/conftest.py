"""Eight virtual CPU devices, checked shapes, and shared data."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

# Set before JAX is imported: sharding is tested without an accelerator. The cache is shared, as the
# tests and the programs that they start compile the same few things repeatedly.
CACHE = f"{tempfile.gettempdir()}/resnet_flax_tests_{os.getuid()}"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", CACHE)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
# Devices that share two busy cores may reach an all-reduce more than 40 s apart, after which XLA
# would abort the process.
DEVICES = (
    " --xla_force_host_platform_device_count=8"
    " --xla_cpu_collective_call_terminate_timeout_seconds=500"
)
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "").replace(DEVICES, "") + DEVICES
os.environ["JAX_PLATFORMS"] = "cpu"

from jaxtyping import install_import_hook  # noqa: E402

# Shapes in signatures are checked in the tests only: see pyproject.toml's test extra.
install_import_hook("resnet_flax", "beartype.beartype")

import jax  # noqa: E402
import ml_collections  # noqa: E402
import pytest  # noqa: E402
from experiments import short_run  # noqa: E402

pytest_plugins = ["quick"]
ROOT = Path(__file__).parent.parent


@pytest.fixture
def x64():
    """Float64: equivalences are asserted in it, see docs/decisions.md."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def soon_traced():
    """XLA's own convolution, which is traced fastest, for tests that do not depend on it."""
    from resnet_flax.ops import dispatch

    with dispatch.override(forward="conv"):
        yield


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory) -> str:
    """A TFDS directory with the prepared digits, once per session and worker."""
    from resnet_flax.data.sources import open_source

    directory = str(tmp_path_factory.mktemp("tfds"))
    open_source("tfds:digits", "train", directory)
    return directory


@pytest.fixture
def config(data_dir) -> ml_collections.ConfigDict:
    """A short run on digits."""
    return short_run(data_dir)


@pytest.fixture(scope="module")
def command(data_dir):
    """Starts `python train.py` on one device, as a user does; returns the process."""
    started = []

    def start(*flags: str, wrapper: tuple[str, ...] = ()) -> subprocess.Popen:
        script = [sys.executable, "train.py", f"--config.data.data_dir={data_dir}"]
        process = subprocess.Popen(
            [*wrapper, *script, *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "XLA_FLAGS": os.environ["XLA_FLAGS"].replace(DEVICES, "")},
            cwd=ROOT,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real images, which are not part of the repository."""
    data = Path(os.environ.get("RESNET_FLAX_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not data.is_dir():
        reason = f"{data} is missing: set RESNET_FLAX_TEST_DATA to the directory of the data"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return data


@pytest.fixture
def disk(tmp_path):
    """A disk of 4 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    yield disk
    subprocess.run(["umount", disk], check=True)
