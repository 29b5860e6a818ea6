"""A disk that can be full and can lose power; for faults.py."""

import contextlib
import shutil
import subprocess
import time
from pathlib import Path

SIZE = "48M"


class Disk:
    """A directory, on an ext4 image where mounting is allowed, otherwise a plain one.

    Use it as a context; leaving it unmounts and removes it.

    Args:
      root: an existing directory for the image.
      mounted: whether to mount an image.

    Attributes:
      place: the directory.
      mounted: whether it is on an image.
    """

    def __init__(self, root: Path, mounted: bool) -> None:
        self._image, self.place, self.mounted = root / "image", root / "disk", mounted

    def __enter__(self) -> "Disk":
        self.place.mkdir()
        if self.mounted:
            subprocess.run(["truncate", "-s", SIZE, self._image], check=True)
            subprocess.run(["mkfs.ext4", "-q", "-m", "0", self._image], check=True)
            self._mount()
        return self

    def __exit__(self, *_: object) -> None:
        if self.mounted:
            self._unmount()
            self._image.unlink()
        shutil.rmtree(self.place)

    def copy(self) -> bytes:
        """The image's bytes now, without what the kernel had not written to it yet."""
        while True:  # until the kernel has written nothing during the copy
            found = self._image.read_bytes()
            if self._image.read_bytes() == found:
                return found

    def become(self, image: bytes) -> None:
        """Mounts a copy instead, as after a power failure at that time."""
        self._unmount()
        self._image.unlink()  # still in use until the kernel has let go of it
        self._image.write_bytes(image)
        self._mount()

    def fill(self, left: int) -> None:
        """Fills the disk up to a number of bytes."""
        with contextlib.suppress(OSError), self._filler.open("wb", 0) as file:
            free = shutil.disk_usage(self.place).free
            while free > left:
                free -= file.write(b"x" * min(65536, max(1, free - left)))

    def empty(self) -> None:
        """Undoes `fill`."""
        self._filler.unlink(missing_ok=True)

    @property
    def _filler(self) -> Path:
        return self.place / "filler"

    def _mount(self) -> None:
        subprocess.run(["mount", "-o", "loop", self._image, self.place], check=True)

    def _unmount(self) -> None:
        if subprocess.run(["umount", self.place], capture_output=True).returncode:
            subprocess.run(["umount", "-l", self.place], check=True)


def mounting(root: Path) -> str:
    """Why disk images cannot be mounted here; empty if they can.

    Args:
      root: an existing directory to try it in.
    """
    if shutil.which("mkfs.ext4") is None:
        return "mkfs.ext4 is not installed"
    place = root / "tried"
    place.mkdir()
    try:
        with Disk(place, mounted=True):
            return ""
    except (OSError, subprocess.CalledProcessError):
        return "mounting a disk image needs root and loop devices"
    finally:
        shutil.rmtree(place, ignore_errors=True)


@contextlib.contextmanager
def read_only(directory: Path):
    """A context in which nothing can be created, renamed or removed in a directory."""
    subprocess.run(["mount", "--bind", directory, directory], check=True)
    try:
        remount = ["mount", "-o", "remount,bind,ro", directory]
        # Not while a file in it is open for writing.
        for _ in range(1000):
            if subprocess.run(remount, capture_output=True).returncode == 0:
                break
            time.sleep(0.01)
        else:
            subprocess.run(remount, check=True)
        yield
    finally:
        subprocess.run(["umount", "-l", directory], check=True)
