"""Named implementations, and their choice by the device that a program is lowered for."""

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

from jax import lax

from resnet_flax.errors import UserError

T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True)
class ByDevice(Generic[T]):
    """A value for each kind of device."""

    cpu: T
    gpu: T
    tpu: T

    def map(self, function: Callable[[T], U]) -> "ByDevice[U]":
        """Applies a function to each value; once if values are the same."""
        made = {chosen: function(chosen) for chosen in (self.cpu, self.gpu, self.tpu)}
        return ByDevice(made[self.cpu], made[self.gpu], made[self.tpu])

    def any(self, test: Callable[[T], bool]) -> bool:
        """Whether the test is true for some device."""
        return test(self.cpu) or test(self.gpu) or test(self.tpu)


def everywhere(value: T) -> ByDevice[T]:
    """The same value for each kind of device."""
    return ByDevice(value, value, value)


class ConvImplementation(NamedTuple):
    """The implementations of a convolution, its gradient to the input and that to the kernel.

    Attributes:
      forward: 'conv' XLA's own convolution; 'dot' a matrix product, for 1x1; 'tap_matmul' a matrix
        product for each position of the kernel; 'space_to_depth', for a stride, a convolution
        without stride, after each square of positions that it steps over is folded into the
        channels of one; 'width_to_channels' several columns folded into the channels of one;
        'winograd' Winograd's algorithm, for 3x3 without stride, dilation and groups.
      input_gradient: 'native' what JAX derives; 'canonical' a convolution in NHWC and HWIO; 'dot',
        'tap_matmul' as above; 'polyphase' for a stride, a convolution for each residue of the
        input's positions, without the zeros of a dilated gradient; 'width_to_channels', 'winograd'.
      kernel_gradient: 'native', 'canonical', 'dot', 'tap_matmul', 'space_to_depth',
        'width_to_channels', 'winograd'; 'row_im2col' a matrix product for each row of the kernel;
        'float32' as 'canonical', with 16-bit operands cast to float32.
    """

    forward: str = "conv"
    input_gradient: str = "native"
    kernel_gradient: str = "native"


class BatchNormImplementation(NamedTuple):
    """How batch normalisation is computed.

    Attributes:
      statistics: 'two_pass' the mean, then the mean squared difference from it; 'one_pass' both in
        one read of the map, relative to the running mean.
      fusion: how the compiler fuses: 'free' without constraints, 'guided' so that XLA's GPU
        compiler writes no maps other than the activations and the gradients. Where a gradient is
        infinite and the ReLU's input not positive, 'free' gives 0 and 'guided' NaN.
      conv_bn_1x1: with a 1x1 convolution before it: 'unfused' one after the other; 'fused' computes
        the statistics and gradients from the convolution's input, see `fused_1x1`.
      conv_bn_3x3: with a 3x3 convolution before it: 'unfused'; 'triton' our own kernels, which also
        compute the convolution if it keeps size and channels, see `gpu_kernels`.
    """

    statistics: str = "two_pass"
    fusion: str = "free"
    conv_bn_1x1: str = "unfused"
    conv_bn_3x3: str = "unfused"


class PoolImplementation(NamedTuple):
    """How max pooling and its gradient are computed.

    Attributes:
      pooling: 'native' reduces windows, and searches each for the gradient; 'separable' one axis
        after the other, with comparisons only; 'indexed' saves the position of each window's
        maximum, in a byte, for the gradient.
    """

    pooling: str = "native"


IMPLEMENTATIONS = {
    "forward": ("conv", "dot", "tap_matmul", "space_to_depth", "width_to_channels", "winograd"),
    "input_gradient": (
        "native",
        "canonical",
        "dot",
        "tap_matmul",
        "polyphase",
        "width_to_channels",
        "winograd",
    ),
    "kernel_gradient": (
        *("native", "canonical", "float32", "dot", "tap_matmul"),
        *("row_im2col", "space_to_depth", "width_to_channels", "winograd"),
    ),
    "statistics": ("two_pass", "one_pass"),
    "fusion": ("free", "guided"),
    "conv_bn_1x1": ("unfused", "fused"),
    "conv_bn_3x3": ("unfused", "triton"),
    "pooling": ("native", "separable", "indexed"),
}

# XLA's option to use oneDNN, Intel's library, for convolutions and products on x86.
ONEDNN = "xla_cpu_experimental_onednn_custom_call"


class Target(NamedTuple):
    """What is known about the target of a program, beyond the kind of device.

    Attributes:
      onednn: on a CPU, oneDNN computes convolutions and products.
      single_gpu: the program runs on one GPU, of a kind that `gpu_kernels` were measured on.
    """

    onednn: bool = False
    single_gpu: bool = False


_target: ContextVar[Target] = ContextVar("target", default=Target())  # noqa: B039  immutable
_overrides: ContextVar[dict[str, str]] = ContextVar("overrides")


def overridden(chosen: Any) -> Any:
    """The chosen implementations, replaced by those that `override` names."""
    asked = {name: it for name, it in _overrides.get({}).items() if name in chosen._fields}
    return chosen._replace(**asked)


@contextmanager
def target(*, onednn: bool = False, single_gpu: bool = False) -> Iterator[None]:
    """A context for tracing a program for such a `Target`; whoever compiles it enters it."""
    token = _target.set(Target(onednn, single_gpu))
    try:
        yield
    finally:
        _target.reset(token)


def current_target() -> Target:
    """The current target; oneDNN is also on if XLA_FLAGS turns it on for all programs."""
    found = _target.get()
    everything = f"{ONEDNN}=true" in os.environ.get("XLA_FLAGS", "")
    return found._replace(onednn=True) if everything else found


@functools.cache
def has_triton() -> bool:
    """Whether this JAX has Pallas' Triton backend, which later versions may remove."""
    try:
        from jax.experimental.pallas import triton
    except ImportError:
        return False
    return hasattr(triton, "CompilerParams")


@contextmanager
def override(**implementations: str) -> Iterator[None]:
    """Uses the named implementations on every device while programs are traced here.

    For tests and measurements.

    Args:
      implementations: names by fields of `ConvImplementation`,
        `BatchNormImplementation` and `PoolImplementation`. One that does not apply (a 3x3
        convolution as 'dot', 'fused' with groups) is ignored.

    Raises:
      UserError: there is no such implementation.
    """
    for part, name in implementations.items():
        if name not in IMPLEMENTATIONS.get(part, ()):
            known = ", ".join(f"{key}={'|'.join(all_)}" for key, all_ in IMPLEMENTATIONS.items())
            raise UserError(f"there is no implementation {part}={name}; there are {known}")
    token = _overrides.set({**_overrides.get({}), **implementations})
    try:
        yield
    finally:
        _overrides.reset(token)


def call(functions: ByDevice[Any], *operands: Any) -> Any:
    """Calls the function for the device that the program is lowered for.

    The others are traced, but cost nothing in the program.
    """
    if functions.cpu is functions.gpu is functions.tpu:
        return functions.cpu(*operands)
    gpu = {} if functions.gpu is functions.tpu else {"cuda": functions.gpu, "rocm": functions.gpu}
    return lax.platform_dependent(*operands, cpu=functions.cpu, default=functions.tpu, **gpu)
