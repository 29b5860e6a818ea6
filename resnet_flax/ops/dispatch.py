"""Implementations by name, and the one that a program gets on the device that it is lowered for."""

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


class ConvImplementation(NamedTuple):
    """Ways to compute a convolution, its gradient to the input and its gradient to the kernel.

    Attributes:
      forward: 'conv' XLA's own convolution; 'dot' a matrix product, for 1x1; 'tap_matmul' a matrix
        product for each position of the kernel; 'space_to_depth', for a stride, a convolution
        without one, each square of positions that it steps over taken for one with more channels;
        'width_to_channels' several columns of few channels for one of more; 'winograd' Winograd's
        filtering, for 3x3 without stride, dilation and groups.
      input_gradient: 'native' what JAX derives; 'canonical' a convolution in NHWC and HWIO; 'dot',
        'tap_matmul' as above; 'polyphase' for a stride, a convolution for each residue of the
        input's positions, without the zeros that a spread-out gradient has; 'width_to_channels',
        'winograd'.
      kernel_gradient: 'native', 'canonical', 'dot', 'tap_matmul', 'space_to_depth',
        'width_to_channels', 'winograd'; 'row_im2col' a matrix product for each row of the kernel;
        'float32' as 'canonical', with 16 bits taken in 32.
    """

    forward: str = "conv"
    input_gradient: str = "native"
    kernel_gradient: str = "native"


class BatchNormImplementation(NamedTuple):
    """How batch normalisation is computed.

    Attributes:
      statistics: 'two_pass' the mean, then squares about it; 'one_pass' both at once, about the
        running mean, which reads the map once.
      fusion: what the compiler makes one kernel of: 'free' as it likes, 'guided' so that XLA's GPU
        compiler writes no map but the activations and the gradients. Where a gradient is infinite
        and ReLU closed, 'free' makes zero of it and 'guided' no number.
      conv_bn_1x1: with a 1x1 convolution before it: 'unfused' one after the other; 'fused' its
        statistics and gradients from the convolution's input, see `fused_1x1`.
      conv_bn_3x3: with a 3x3 convolution before it: 'unfused'; 'triton' by kernels of our own,
        which compute the convolution too where it keeps size and channels, see `gpu_kernels`.
    """

    statistics: str = "two_pass"
    fusion: str = "free"
    conv_bn_1x1: str = "unfused"
    conv_bn_3x3: str = "unfused"


class PoolImplementation(NamedTuple):
    """How max pooling and its gradient are computed.

    Attributes:
      pooling: 'native' windows, and in the gradient a search of each; 'separable' along one axis
        after the other, by comparisons alone; 'indexed' notes which position of a window is the
        largest, a byte each, for the gradient.
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

# XLA's option by which its x86 backend convolves and multiplies by oneDNN, Intel's library.
ONEDNN = "xla_cpu_experimental_onednn_custom_call"


class Target(NamedTuple):
    """What is known of where a program will run, beyond the kind of device.

    Attributes:
      onednn: on a CPU, convolutions and products are oneDNN's.
      single_gpu: all of it runs on one GPU that `gpu_kernels` were measured on.
    """

    onednn: bool = False
    single_gpu: bool = False


_target: ContextVar[Target] = ContextVar("target", default=Target())  # noqa: B039  immutable
_overrides: ContextVar[dict[str, str]] = ContextVar("overrides")


def overridden(chosen: Any) -> Any:
    """The implementations that were chosen, but for those that `override` names."""
    asked = {name: it for name, it in _overrides.get({}).items() if name in chosen._fields}
    return chosen._replace(**asked)


@contextmanager
def target(*, onednn: bool = False, single_gpu: bool = False) -> Iterator[None]:
    """What is traced here is for such a target, see `Target`; entered by what compiles it."""
    token = _target.set(Target(onednn, single_gpu))
    try:
        yield
    finally:
        _target.reset(token)


def current_target() -> Target:
    """The target of what is traced here; for oneDNN where XLA_FLAGS says that all is."""
    found = _target.get()
    everything = f"{ONEDNN}=true" in os.environ.get("XLA_FLAGS", "")
    return found._replace(onednn=True) if everything else found


@functools.cache
def has_triton() -> bool:
    """Whether this JAX holds Pallas' Triton backend, which is to go one day."""
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
      implementations: by what they compute: fields of `ConvImplementation`,
        `BatchNormImplementation` and `PoolImplementation`. Where one does not apply (a 3x3
        convolution as 'dot', 'fused' with groups) the choice stays.

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
    """The function for the device that the program is lowered for, called.

    The others are traced, and cost nothing in the program.
    """
    if functions.cpu is functions.gpu is functions.tpu:
        return functions.cpu(*operands)
    gpu = {} if functions.gpu is functions.tpu else {"cuda": functions.gpu, "rocm": functions.gpu}
    return lax.platform_dependent(*operands, cpu=functions.cpu, default=functions.tpu, **gpu)
