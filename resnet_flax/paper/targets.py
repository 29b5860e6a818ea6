"""Tables and figures of He et al. 2015, "Deep Residual Learning for Image Recognition", as data.

Error rates in percent, as the paper prints them.
"""

import dataclasses
from collections.abc import Mapping

from resnet_flax.errors import UserError, closest


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of a table, or one network of a figure.

    Attributes:
      name: as the paper calls it.
      paper: its numbers by column; empty if it has none.
      config: of the training; empty for a row that is only for comparison.
      members: of an ensemble, as configs and seeds.
      weights: published weights, instead of a config.
      data: the data set on whose test split the weights are evaluated.
      settings: config keys that differ, as on the command line.
      said: what the paper says besides or instead of a number.
    """

    name: str
    paper: Mapping[str, float] = dataclasses.field(default_factory=dict)
    config: str = ""
    members: tuple[tuple[str, int], ...] = ()
    weights: str = ""
    data: str = ""
    settings: tuple[str, ...] = ()
    said: str = ""


@dataclasses.dataclass(frozen=True)
class Target:
    """A table or figure.

    Attributes:
      title: what it shows.
      rows: its lines.
      columns: of the numbers.
      protocol: of evaluation, see `evaluation.multi_view`.
      draws: kind of figure, 'curves', 'responses' or empty.
      note: for the reader.
    """

    title: str
    rows: tuple[Row, ...]
    columns: tuple[str, ...] = ("top-1",)
    protocol: str = "center"
    draws: str = ""
    note: str = ""


def _both(top1: float, top5: float) -> dict[str, float]:
    return {"top-1": top1, "top-5": top5}


def _imagenet(name: str, variant: str, *figures: float) -> Row:
    paper = dict(zip(("top-1", "top-5"), figures, strict=False))
    return Row(name, paper, f"configs/imagenet_paper.py:{variant}")


def _cifar(kind: str, depth: int, error: float | None = None, said: str = "") -> Row:
    name = f"{'ResNet' if kind == 'resnet' else 'plain'}-{depth}"
    paper = {} if error is None else {"top-1": error}
    return Row(name, paper, f"configs/cifar10.py:{kind}{depth}", said=said)


def _small(kind: str, depth: int, data: str) -> Row:
    name = f"{'ResNet' if kind == 'resnet' else 'plain'}-{depth}"
    if data == "cifar10":
        return Row(name, config=f"configs/cifar10.py:{kind}{depth}_brief")
    settings = (f"model.name=cifar_{kind}{depth}",)
    return Row(name, config="configs/digits_resnet20.py", settings=settings)


_PLAIN = tuple(_cifar("plain", depth) for depth in (20, 32, 44, 56))
_RESNETS = (
    _cifar("resnet", 20, 8.75),
    _cifar("resnet", 32, 7.51),
    _cifar("resnet", 44, 7.17),
    _cifar("resnet", 56, 6.97),
    _cifar("resnet", 110, 6.61, "6.61 ± 0.16 (n = 5), best 6.43"),
    _cifar("resnet", 1202, 7.93),
)
_PLAIN_110 = _cifar("plain", 110, said="above 60")
_SMALL = (("plain", 20), ("plain", 56), ("resnet", 20), ("resnet", 56))
_SIX = (
    *(("configs/imagenet_paper.py:resnet34_b", 0), ("configs/imagenet_paper.py:resnet34_c", 0)),
    *(("configs/imagenet_paper.py:resnet50_v1", 0), ("configs/imagenet_paper.py:resnet101_v1", 0)),
    *(
        ("configs/imagenet_paper.py:resnet152_v1", 0),
        ("configs/imagenet_paper.py:resnet152_v1", 1),
    ),
)

TARGETS = {
    "table2": Target(
        "ImageNet validation, ten crops: plain and residual",
        (
            _imagenet("plain-18", "plain18", 27.94),
            _imagenet("plain-34", "plain34", 28.54),
            _imagenet("ResNet-18 A", "resnet18_a", 27.88),
            _imagenet("ResNet-34 A", "resnet34_a", 25.03),
        ),
        protocol="ten_crop",
    ),
    "table3": Target(
        "ImageNet validation, ten crops",
        (
            Row("VGG-16", _both(28.07, 9.33)),
            Row("GoogLeNet", {"top-5": 9.15}),
            Row("PReLU-net", _both(24.27, 7.38)),
            _imagenet("plain-34", "plain34", 28.54, 10.02),
            _imagenet("ResNet-34 A", "resnet34_a", 25.03, 7.76),
            _imagenet("ResNet-34 B", "resnet34_b", 24.52, 7.46),
            _imagenet("ResNet-34 C", "resnet34_c", 24.19, 7.40),
            _imagenet("ResNet-50", "resnet50_v1", 22.85, 6.71),
            _imagenet("ResNet-101", "resnet101_v1", 21.75, 6.05),
            _imagenet("ResNet-152", "resnet152_v1", 21.43, 5.71),
        ),
        columns=("top-1", "top-5"),
        protocol="ten_crop",
    ),
    "table4": Target(
        "ImageNet validation, single models, multi-scale",
        (
            Row("VGG (ILSVRC'14)", {"top-5": 8.43}, said="on the test set"),
            Row("GoogLeNet (ILSVRC'14)", {"top-5": 7.89}),
            Row("VGG (v5)", _both(24.4, 7.1)),
            Row("PReLU-net", _both(21.59, 5.71)),
            Row("BN-inception", _both(21.99, 5.81)),
            _imagenet("ResNet-34 B", "resnet34_b", 21.84, 5.71),
            _imagenet("ResNet-34 C", "resnet34_c", 21.53, 5.60),
            _imagenet("ResNet-50", "resnet50_v1", 20.74, 5.25),
            _imagenet("ResNet-101", "resnet101_v1", 19.87, 4.60),
            _imagenet("ResNet-152", "resnet152_v1", 19.38, 4.49),
        ),
        columns=("top-1", "top-5"),
        protocol="multiscale",
    ),
    "table5": Target(
        "ImageNet, ensembles, multi-scale",
        (
            Row("VGG (ILSVRC'14)", {"top-5": 7.32}),
            Row("GoogLeNet (ILSVRC'14)", {"top-5": 6.66}),
            Row("VGG (v5)", {"top-5": 6.8}),
            Row("PReLU-net", {"top-5": 4.94}),
            Row("BN-inception", {"top-5": 4.82}),
            Row("ResNet (ILSVRC'15)", {"top-5": 3.57}, members=_SIX),
        ),
        columns=("top-5",),
        protocol="multiscale",
        note="The paper's are on the test set, whose labels are not public; ours is on validation. "
        "It names two of its six networks, both of 152 layers; ours are 34 B, 34 C, 50, 101 and "
        "152 twice.",
    ),
    "table6": Target(
        "CIFAR-10 test",
        (
            Row("Maxout", {"top-1": 9.38}),
            Row("NIN", {"top-1": 8.81}),
            Row("DSN", {"top-1": 8.22}),
            Row("FitNet, 19 layers", {"top-1": 8.39}),
            Row("Highway, 19 layers", {"top-1": 7.54}, said="best; 7.72 ± 0.16"),
            Row("Highway, 32 layers", {"top-1": 8.80}),
            *_RESNETS,
            *_PLAIN,
            _PLAIN_110,
        ),
        draws="curves",
        note="The paper reports one run of each network but ResNet-110.",
    ),
    "figure1": Target(
        "CIFAR-10: plain networks of 20 and 56 layers",
        (_PLAIN[0], _PLAIN[3]),
        draws="curves",
    ),
    "figure4": Target(
        "ImageNet: plain and residual networks, 18 and 34 layers",
        (
            _imagenet("plain-18", "plain18"),
            _imagenet("plain-34", "plain34"),
            _imagenet("ResNet-18", "resnet18_a"),
            _imagenet("ResNet-34", "resnet34_a"),
        ),
        draws="curves",
    ),
    "figure6": Target(
        "CIFAR-10: plain and residual networks, up to 1202 layers",
        (*_PLAIN, *_RESNETS, _PLAIN_110),
        draws="curves",
    ),
    "figure7": Target(
        "CIFAR-10: standard deviation of layer responses",
        (_PLAIN[0], _PLAIN[3], _RESNETS[0], _RESNETS[3], _RESNETS[4]),
        draws="responses",
    ),
    "figure7_published": Target(
        "Layer responses of published CIFAR-10 weights (akamaster)",
        tuple(
            Row(
                f"ResNet-{depth}",
                {"top-1": error},
                weights=f"cifar_resnet{depth}.akamaster_cifar10",
                data="tfds:cifar10",
            )
            for depth, error in ((20, 8.75), (56, 6.97))
        ),
        draws="responses",
    ),
    "figure7_digits": Target(
        "Layer responses of the networks of degradation_digits",
        tuple(_small(kind, depth, "digits") for kind, depth in _SMALL),
        draws="responses",
    ),
    "figure7_cifar10": Target(
        "Layer responses of the networks of degradation_cifar10",
        tuple(_small(kind, depth, "cifar10") for kind, depth in _SMALL),
        draws="responses",
    ),
    "degradation_digits": Target(
        "Digits: plain and residual networks (not in the paper)",
        tuple(_small(kind, depth, "digits") for kind, depth in _SMALL),
        draws="curves",
        note="60 epochs of 1,437 images, for a machine without an accelerator.",
    ),
    "degradation_cifar10": Target(
        "CIFAR-10, two epochs: plain and residual (not in the paper)",
        tuple(_small(kind, depth, "cifar10") for kind, depth in _SMALL),
        draws="curves",
        note="Two epochs on a one-cycle schedule, not the paper's 164, for a machine without an "
        "accelerator.",
    ),
}


def find(name: str) -> Target:
    """The target with this name.

    Raises:
      UserError: there is none.
    """
    if name not in TARGETS:
        known = ", ".join(TARGETS)
        raise UserError(f"there is no target {name!r}{closest(name, TARGETS)} (known: {known})")
    return TARGETS[name]
