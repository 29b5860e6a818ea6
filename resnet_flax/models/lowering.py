"""How convolutions, poolings and normalisations are computed: decided here, by device and shape.

Parameters and results are the same whichever way (tests/models/test_lowering.py); time and memory
are not. The choice falls when a program is lowered, so that compiling ahead for another device is
right too (whether a CPU's is for oneDNN and a GPU's for it alone, when it is traced).
docs/decisions.md says what was measured.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
from jax import lax

from resnet_flax import compiler
from resnet_flax.errors import UserError

T = TypeVar("T")
U = TypeVar("U")
Pair = tuple[int, int]
Padding = tuple[Pair, Pair]


@dataclass(frozen=True)
class ByDevice(Generic[T]):
    """Something for each kind of device."""

    cpu: T
    gpu: T
    tpu: T

    def map(self, function: Callable[[T], U]) -> "ByDevice[U]":
        """What the function makes of each; once of what is the same."""
        made = {chosen: function(chosen) for chosen in (self.cpu, self.gpu, self.tpu)}
        return ByDevice(made[self.cpu], made[self.gpu], made[self.tpu])

    def any(self, test: Callable[[T], bool]) -> bool:
        """Whether it is so on some device."""
        return test(self.cpu) or test(self.gpu) or test(self.tpu)


class Geometry(NamedTuple):
    """Of a convolution, see `conv.conv2d`."""

    strides: Pair = (1, 1)
    padding: Padding = ((0, 0), (0, 0))
    dilation: Pair = (1, 1)
    groups: int = 1


class Convolution(NamedTuple):
    """Ways to compute a convolution, its gradient to the input and its gradient to the kernel.

    Attributes:
      forward: 'conv' XLA's own convolution; 'dot' a matrix product, for 1x1; 'taps' a matrix
        product for each position of the kernel; 'space_to_depth', for a stride, a convolution
        without one, each square of positions that it steps over taken for one with more channels;
        'columns' several columns of few channels for one of more; 'winograd' minimal filtering,
        for 3x3 without stride, dilation and groups.
      input_gradient: 'native' what JAX derives; 'canonical' a convolution in NHWC and HWIO;
        'dot', 'taps' as above; 'phases' for a stride, a convolution for each residue of the
        input's positions, without the zeros that a spread-out gradient has; 'columns',
        'winograd'.
      kernel_gradient: 'native', 'canonical', 'dot', 'taps', 'space_to_depth', 'columns',
        'winograd'; 'rows' a matrix product for each row of the kernel; 'widened' as 'canonical',
        16 bits in 32.
    """

    forward: str = "conv"
    input_gradient: str = "native"
    kernel_gradient: str = "native"


class Normalisation(NamedTuple):
    """How batch normalisation is computed.

    Attributes:
      statistics: 'two_pass' the mean, then squares about it; 'one_pass' both at once, about the
        running mean, which reads the map once.
      fusion: what the compiler makes one kernel of: 'free' as it likes, 'guided' so that XLA's GPU
        compiler writes no map but the activations and the gradients. Where a gradient is infinite
        and ReLU closed, 'free' makes zero of it and 'guided' no number.
      behind_1x1: with a 1x1 convolution before it: 'apart' one after the other; 'joined' its
        statistics and gradients from the convolution's input, see `pointwise`.
      behind_3x3: with a 3x3 convolution before it: 'apart'; 'kernels' by kernels of our own, which
        compute the convolution too where it keeps size and channels, see `kernels`.
    """

    statistics: str = "two_pass"
    fusion: str = "free"
    behind_1x1: str = "apart"
    behind_3x3: str = "apart"


class Pooling(NamedTuple):
    """How max pooling and its gradient are computed.

    Attributes:
      pooling: 'native' windows, and in the gradient a search of each; 'separable' along one axis
        after the other, by comparisons alone; 'indexed' notes which position of a window is the
        largest, a byte each, for the gradient.
    """

    pooling: str = "native"


WAYS = {
    "forward": ("conv", "dot", "taps", "space_to_depth", "columns", "winograd"),
    "input_gradient": ("native", "canonical", "dot", "taps", "phases", "columns", "winograd"),
    "kernel_gradient": (
        *("native", "canonical", "widened", "dot", "taps"),
        *("rows", "space_to_depth", "columns", "winograd"),
    ),
    "statistics": ("two_pass", "one_pass"),
    "fusion": ("free", "guided"),
    "behind_1x1": ("apart", "joined"),
    "behind_3x3": ("apart", "kernels"),
    "pooling": ("native", "separable", "indexed"),
}

_forced: ContextVar[dict[str, str]] = ContextVar("forced")


def convolution(
    x: Sequence[int], kernel: Sequence[int], geometry: Geometry, dtype: Any = np.float32
) -> ByDevice[Convolution]:
    """How to convolve.

    Args:
      x: shape of the input, NHWC.
      kernel: shape of the kernel, HWIO.
      geometry: the rest.
      dtype: of the computation.
    """
    cpu = _convolution_on_cpu(x, kernel, geometry)
    if compiler.traced_for_onednn():
        cpu = _convolution_by_onednn(cpu, kernel, geometry, np.dtype(dtype).itemsize == 2)
    chosen = ByDevice(cpu, _convolution_on_gpu(kernel, geometry), Convolution())
    return chosen.map(lambda ways: _applicable(ways, kernel, geometry))


def _convolution_on_gpu(kernel: Sequence[int], geometry: Geometry) -> Convolution:
    # A convolution would have its kernel transposed, in float32 and in bfloat16, by kernels that
    # take longer than the products. cuDNN fills three channels up to eight in copies of its own,
    # and takes several times as long for few channels as their maps take to read and write.
    if is_pointwise(kernel, geometry):
        return Convolution("dot", "dot", "dot")
    if _space_to_depth_applies(kernel, geometry):
        return Convolution("space_to_depth", "native", "space_to_depth")
    if _columns_apply(kernel, geometry) and math.prod(kernel[2:]) <= 16 * 16:
        return Convolution("columns", "columns", "columns")
    return Convolution()


def _convolution_on_cpu(x: Sequence[int], kernel: Sequence[int], geometry: Geometry) -> Convolution:
    height, width, channels, features = kernel
    if is_pointwise(kernel, geometry):
        return Convolution("dot", "dot", "dot")
    # In a loop (a scan over blocks, gradient accumulation, several steps to a dispatch) XLA's CPU
    # backend runs a convolution that is not canonical 8 to 40 times slower.
    forward, input_gradient, kernel_gradient = "conv", "canonical", "canonical"
    if channels <= 4 and geometry.groups == 1:
        kernel_gradient = "rows"
    if not (_dense(geometry) and (height, width) == (3, 3)):
        return Convolution(forward, input_gradient, kernel_gradient)
    rows, columns = output_size(x, kernel, geometry)
    strided = geometry.strides != (1, 1)
    if strided:
        input_gradient = "phases"
    if channels * features >= (16 * 32 if strided else 256 * 256):
        kernel_gradient = "taps"
    if channels * features >= 256 * 256 and rows * columns <= 64:
        forward, input_gradient = "taps", "taps"
    if _winograd_pays(kernel, geometry, (rows, columns)):
        if min(channels, features) >= 64:
            forward, input_gradient = "winograd", "winograd"
        if min(channels, features) >= 16:
            kernel_gradient = "winograd"
    return Convolution(forward, input_gradient, kernel_gradient)


def _convolution_by_onednn(
    chosen: Convolution, kernel: Sequence[int], geometry: Geometry, half: bool
) -> Convolution:
    """What is best instead where XLA's convolutions are oneDNN's, in 16 bits on their own units."""
    if chosen.forward == "dot":
        return chosen
    fewest, strided = min(kernel[2:]), geometry.strides != (1, 1)
    if chosen.kernel_gradient == "canonical":
        # As a convolution its kernel would be as large as a map and its channels the batch: in
        # bfloat16, with two or four of them, oneDNN's result is wrong (JAX 0.12).
        rather = "rows" if geometry.groups == 1 else "widened"  # the same in 32 bits
        chosen = chosen._replace(kernel_gradient=rather)
    if not _dense(geometry):
        return chosen
    minimal = chosen.forward == "winograd"
    if half or fewest < 128 or strided:
        chosen = chosen._replace(forward="conv")
    if minimal and fewest < 128:
        chosen = chosen._replace(input_gradient="canonical")
    if half:
        chosen = chosen._replace(input_gradient="phases" if strided else "canonical")
    if half and (strided or fewest >= 128):
        chosen = chosen._replace(kernel_gradient="rows")
    return chosen


def _winograd_pays(kernel: Sequence[int], geometry: Geometry, output: Pair) -> bool:
    """By what is to be computed for one image, so that rounding does not depend on the batch."""
    rows, columns = output
    positions = rows * columns
    products = 36 * -(-rows // 4) * -(-columns // 4)
    return (
        _winograd_applies(kernel, geometry)
        and products <= 6 * positions  # of a convolution's 9; small odd maps fill tiles with zeros
        and math.prod(kernel) * positions >= 1e6  # below that its longer compilation is dearer
        and positions <= 64 * 64  # its maps have 2.25 times the elements; not measured beyond
    )


def is_pointwise(kernel: Sequence[int], geometry: Geometry) -> bool:
    """Whether a convolution is a matrix product at (some of) the positions."""
    unpadded = geometry.padding == ((0, 0), (0, 0))
    return tuple(kernel[:2]) == (1, 1) and unpadded and geometry.groups == 1


def output_size(x: Sequence[int], kernel: Sequence[int], geometry: Geometry) -> Pair:
    """Height and width of what a convolution makes."""
    height, width = (
        (n + low + high - (k - 1) * d - 1) // s + 1
        for n, k, s, (low, high), d in zip(
            x[1:3], kernel[:2], geometry.strides, geometry.padding, geometry.dilation, strict=True
        )
    )
    return height, width


def _winograd_applies(kernel: Sequence[int], geometry: Geometry) -> bool:
    return tuple(kernel[:2]) == (3, 3) and geometry.strides == (1, 1) and _dense(geometry)


def _dense(geometry: Geometry) -> bool:
    return geometry.groups == 1 and geometry.dilation == (1, 1)


def _space_to_depth_applies(kernel: Sequence[int], geometry: Geometry) -> bool:
    return _dense(geometry) and geometry.strides != (1, 1) and kernel[2] <= 4


def columns_in_one(columns: int, features: int) -> int:
    """How many columns of a map a convolution takes for one, up to 64 channels of its output."""
    return math.gcd(columns, max(1, 64 // features))


def _columns_apply(kernel: Sequence[int], geometry: Geometry) -> bool:
    reach = kernel[1] // 2
    along = kernel[1] % 2 == 1 and geometry.padding[1] == (reach, reach)
    return along and geometry.strides == (1, 1) and _dense(geometry)


def _applicable(chosen: Convolution, kernel: Sequence[int], geometry: Geometry) -> Convolution:
    """What is chosen, or forced where that is possible."""
    possible = {
        "dot": is_pointwise(kernel, geometry),
        "taps": geometry.groups == 1,
        "rows": geometry.groups == 1,
        "phases": _dense(geometry),
        "space_to_depth": _space_to_depth_applies(kernel, geometry),
        "columns": _columns_apply(kernel, geometry),
        "winograd": _winograd_applies(kernel, geometry),
    }
    wanted = _wanted(chosen)._asdict()
    return chosen._replace(**{part: way for part, way in wanted.items() if possible.get(way, True)})


def normalisation(behind: "Behind | None" = None, groups: int = 1) -> ByDevice[Normalisation]:
    """How to normalise.

    Args:
      behind: what convolution, if any.
      groups: of examples that are normalised by themselves.
    """
    plain, on_gpu = Normalisation(), Normalisation("one_pass", "guided")
    if behind is not None and _joining_pays(behind):
        on_gpu = on_gpu._replace(behind_1x1="joined")
    if behind is not None and _kernels_pay(behind):
        on_gpu = on_gpu._replace(behind_3x3="kernels")
    chosen = ByDevice(plain, on_gpu, plain).map(_wanted)
    if behind is None or groups > 1 or not behind.pointwise:
        chosen = chosen.map(lambda way: way._replace(behind_1x1="apart"))
    if behind is None or groups > 1 or not _kernels_apply(behind):
        chosen = chosen.map(lambda way: way._replace(behind_3x3="apart"))
    return chosen


class Behind(NamedTuple):
    """A convolution that a normalisation stands behind.

    Attributes:
      positions: of its output, in one image.
      kernel: shape of its kernel, HWIO.
      geometry: the rest.
      dtype: of the computation.
      batch: images.
      parameters: their type.
    """

    positions: int
    kernel: Sequence[int]
    geometry: Geometry
    dtype: Any
    batch: int = 1
    parameters: Any = np.float32

    @property
    def pointwise(self) -> bool:
        """Whether it is a matrix product at (some of) the positions."""
        return is_pointwise(self.kernel, self.geometry)

    def may_join(self) -> bool:
        """Whether the two are one operation on some device."""
        plain = Normalisation()
        return normalisation(self).any(
            lambda way: (way.behind_1x1, way.behind_3x3) != (plain.behind_1x1, plain.behind_3x3)
        )


def _joining_pays(behind: Behind) -> bool:
    channels, features = behind.kernel[2:]
    return (
        behind.pointwise
        and features >= 4 * channels
        # Products of channels by channels by features must be few beside those of positions.
        and 4 * behind.positions >= channels
        # A GPU rounds products of float32 to TF32, and the output's mean is not the rounded one's.
        and np.dtype(behind.dtype).itemsize == 2
    )


def _kernels_apply(behind: Behind) -> bool:
    return (
        tuple(behind.kernel[:2]) == (3, 3)
        and behind.geometry.padding == ((1, 1), (1, 1))
        and _dense(behind.geometry)
        and behind.kernel[3] in (16, 32, 64)
        and behind.positions % 64 == 0  # that programs have equal shares
    )


def _kernels_pay(behind: Behind) -> bool:
    return (
        compiler.traced_for_one_gpu()  # of several each would be sent the whole batch
        and _kernels_apply(behind)
        # 32x32 of 16 channels, 16x16 of 32, 8x8 of 64: others were not measured, and beyond that or
        # this batch a program takes several turns, for which shared memory does not suffice.
        and behind.positions * behind.kernel[3] ** 2 <= 2**18
        and behind.batch <= 256
        and np.dtype(behind.dtype).name == "bfloat16"
        and np.dtype(behind.parameters).name == "float32"
        and compiler.has_triton()
    )


def pooling() -> ByDevice[Pooling]:
    """How to pool."""
    separable = Pooling("separable")
    return ByDevice(separable, Pooling("indexed"), Pooling("native")).map(_wanted)


def _wanted(chosen: Any) -> Any:
    """What is chosen, or forced."""
    asked = {name: way for name, way in _forced.get({}).items() if name in chosen._fields}
    return chosen._replace(**asked)


@contextmanager
def forced(**ways: str) -> Iterator[None]:
    """Computes the named ways on every device while programs are traced here; for measurements.

    Args:
      ways: fields of `Convolution`, `Normalisation` and `Pooling`. Where one does not apply (a
        3x3 convolution as 'dot', 'joined' with groups) the choice stays.

    Raises:
      UserError: no such way.
    """
    for part, way in ways.items():
        if way not in WAYS.get(part, ()):
            known = ", ".join(f"{part}={'|'.join(ways)}" for part, ways in WAYS.items())
            raise UserError(f"no lowering is called {part}={way}; there are {known}")
    token = _forced.set({**_forced.get({}), **ways})
    try:
        yield
    finally:
        _forced.reset(token)


def call(functions: ByDevice[Any], *operands: Any) -> Any:
    """The function for the device that the program is lowered for, called.

    The others are traced, and cost nothing in the program.
    """
    if functions.cpu is functions.gpu is functions.tpu:
        return functions.cpu(*operands)
    gpu = {} if functions.gpu is functions.tpu else {"cuda": functions.gpu, "rocm": functions.gpu}
    return lax.platform_dependent(*operands, cpu=functions.cpu, default=functions.tpu, **gpu)
