"""Published weights: their names, sources, and preprocessing. Importing it imports no JAX."""

import dataclasses
import hashlib
import os
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resnet_flax.errors import UserError, closest, first_line
from resnet_flax.weights.recipes import HALVED, RECIPES

if TYPE_CHECKING:  # its import is slow
    from resnet_flax.data.preprocessing import Preprocessing

HALF = (0.5, 0.5, 0.5)

# The name of each file has the beginning of its SHA-256.
_AKAMASTER = {
    20: "12fca82f",
    32: "d509ac18",
    44: "014dd654",
    56: "4bfd9763",
    110: "1d1ed7c2",
    1202: "f3b1deed",
}

# CIFAR-10's class names in TFDS, in the order of the labels.
CIFAR10 = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)


@dataclasses.dataclass(frozen=True)
class Published:
    """Published weights.

    Attributes:
      variant: the network's name.
      images: the images that they were made for, as arguments of `Preprocessing`; has `size`.
      classes: number of outputs.
      address: of the file.
      repository: on the Hugging Face hub, if they are downloaded from there.
      sha256: beginning of the file's digest, if known; such a file is downloaded from its address.
        Files with neither must be downloaded by hand.
      axes: attributes of the network that differ from the variant's.
    """

    variant: str
    images: Mapping[str, Any]
    classes: int
    address: str
    repository: str = ""
    sha256: str = ""
    axes: tuple[tuple[str, Any], ...] = ()

    @property
    def preprocessing(self) -> "Preprocessing":
        """The preprocessing that they were made for."""
        from resnet_flax.data.preprocessing import Preprocessing

        return Preprocessing(**self.images)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the outputs, as in TFDS."""
        if self.classes == 10:
            return CIFAR10
        import tensorflow_datasets as tfds

        return tuple(tfds.builder("imagenet2012").info.features["label"].names)


def _timm(
    variant: str, recipe: str, size: int, crop_fraction: float, interpolation: str
) -> Published:
    repository = f"timm/{variant}.{recipe}"
    halved = recipe in HALVED or f"{variant}.{recipe}" in HALVED
    images = {"size": size, "crop_fraction": crop_fraction, "interpolation": interpolation}
    return Published(
        variant,
        images | ({"mean": HALF, "std": HALF} if halved else {}),
        1000,
        f"https://huggingface.co/{repository}/resolve/main/model.safetensors",
        repository,
    )


def _akamaster(depth: int, digest: str) -> Published:
    return Published(
        f"cifar_resnet{depth}",
        {"size": 0},
        10,
        "https://github.com/akamaster/pytorch_resnet_cifar10/raw/master/pretrained_models/"
        f"resnet{depth}-{digest}.th",
        sha256=digest,
    )


def _caffe(depth: int) -> Published:
    # Mean of https://github.com/KaimingHe/deep-residual-networks, its channels turned to RGB.
    mean = tuple(level / 255 for level in (123.151630838, 115.902882574, 103.062623801))
    axes = {"stem_pool": "ceil", **({"stem_bias": True} if depth == 50 else {})}
    return Published(
        f"resnet{depth}_v1",
        {"size": 224, "mean": mean, "std": (1 / 255,)},
        1000,
        f"https://github.com/KaimingHe/deep-residual-networks (ResNet-{depth}-model.caffemodel)",
        axes=tuple(axes.items()),
    )


CATALOG: dict[str, Published] = {
    **{
        f"{variant}.{recipe}": _timm(variant, recipe, size, crop_fraction, interpolation)
        for recipe, size, crop_fraction, interpolation, variants in RECIPES
        for variant in variants.split()
    },
    **{f"resnet{depth}_v1.caffe_in1k": _caffe(depth) for depth in (50, 101, 152)},
    **{f"cifar_resnet{d}.akamaster_cifar10": _akamaster(d, sha) for d, sha in _AKAMASTER.items()},
}


def cache() -> Path:
    """The directory of files that were downloaded by hand, under their published names."""
    default = Path.home() / ".cache" / "resnet_flax"
    return Path(os.environ.get("RESNET_FLAX_WEIGHTS") or default)


def recognize(sha256: str) -> str:
    """The published name of a file, by its digest; empty if unknown."""
    known = (n for n, p in CATALOG.items() if p.sha256 and sha256.startswith(p.sha256))
    return next(known, "")


def fetch(name: str) -> Path:
    """The file of published weights, from `cache()` or downloaded once.

    Raises:
      UserError: there is no such name; or it cannot be downloaded, and the message says which file
        to download by hand and where to put it.
    """
    if name not in CATALOG:
        raise UserError(f"there are no published weights {name!r}{closest(name, CATALOG)}")
    published = CATALOG[name]
    suffix = Path(published.address.rstrip(")")).suffix
    at_hand = cache() / f"{name}{suffix}"
    if at_hand.is_file():
        _check(at_hand, published)
        return at_hand
    reason = "have to be downloaded by hand"
    try:
        if published.repository:
            return _from_hub(published.repository)
        if published.sha256:
            return _download(published, at_hand)
    except UserError:
        raise
    except Exception as error:  # errors of many types: network, hub, disk
        reason = f"cannot be downloaded ({first_line(error)})"
    raise UserError(
        f"the weights {name} are not on this machine and {reason}; get {published.address} and "
        f"put it at {at_hand}"
    )


def _download(published: Published, target: Path) -> Path:
    """Downloads a file from its address; renames it once it is complete and verified."""
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_name(f"{target.name}.{os.getpid()}")
    try:
        with urllib.request.urlopen(published.address, timeout=30) as answer:
            scratch.write_bytes(answer.read())
        _check(scratch, published)
        return scratch.replace(target)
    finally:
        scratch.unlink(missing_ok=True)


def _from_hub(repository: str) -> Path:
    """A file from the hub: from the hub's cache, else by one request without retries."""
    import huggingface_hub as hub

    kept = hub.try_to_load_from_cache(repository, "model.safetensors")
    if isinstance(kept, str):
        return Path(kept)
    _reach(repository)
    return Path(hub.hf_hub_download(repository, "model.safetensors"))


def _reach(repository: str) -> None:
    """Raises immediately, not after half a minute of retries, if there is no network."""
    import socket
    from urllib.parse import urlsplit

    import huggingface_hub as hub

    if hub.constants.HF_HUB_OFFLINE:
        raise ConnectionError("HF_HUB_OFFLINE is set")
    proxied = any(os.environ.get(n) for n in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY"))
    if not proxied:
        address = urlsplit(hub.constants.ENDPOINT)
        port = address.port or (443 if address.scheme == "https" else 80)
        try:
            socket.create_connection((address.hostname, port), timeout=10).close()
        except OSError as error:
            raise ConnectionError(f"{address.hostname} cannot be reached: {error}") from error


def _check(path: Path, published: Published) -> None:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if not digest.startswith(published.sha256):
        raise UserError(
            f"{path} is not the published file: its SHA-256 begins with {digest[:8]}, not "
            f"{published.sha256}; download {published.address} again"
        )
