"""A user's own block, norm, optimizer, schedule, loss, metric and data source, and their config.

This file stands outside the package and edits nothing of it; docs/architecture.md shows the parts.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from resnet_flax import default_config
from resnet_flax.data import ArraySource
from resnet_flax.data.sources import SOURCES, Store
from resnet_flax.evaluation.metrics import METRICS, Metric
from resnet_flax.keys import COUNT, FRACTION, POSITIVE, Entry, Key
from resnet_flax.models.blocks import BLOCKS, ResidualBlock
from resnet_flax.models.conv_norm import conv_norm
from resnet_flax.models.layers import NORMS
from resnet_flax.training.losses import LOSSES
from resnet_flax.training.optimizer import OPTIMIZERS, SCHEDULES


class OneConvolution(ResidualBlock):
    """A block of a single 3x3 convolution."""

    @nn.compact
    def __call__(self, x, train):
        conv = self.conv(self.features, (3, 3), strides=self.strides, name="conv1")
        y = conv_norm(conv, self.norm(name="norm1"), x, train)
        return nn.relu(y + self._added(x, train, self.norm))


BLOCKS["one", False] = OneConvolution


class RMSNorm(nn.Module):
    """Each position divided by the root of its mean square over channels."""

    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32
    scale_init: nn.initializers.Initializer = nn.initializers.ones

    @nn.compact
    def __call__(self, x, train, activate=False, residual=None):
        scale = self.param("scale", self.scale_init, x.shape[-1:], self.param_dtype)
        y = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6) * scale
        y = y if residual is None else y + residual
        return (nn.relu(y) if activate else y).astype(self.dtype)


NORMS["rms"] = lambda network: RMSNorm


OPTIMIZERS["lion"] = Entry(
    lambda optim, schedule: optax.lion(schedule, b1=optim.lion_beta),
    {"optim.lion_beta": Key(0.9, "Decay of Lion's update.", FRACTION)},
)

SCHEDULES["sqrt"] = Entry(lambda optim, steps: lambda t: optim.learning_rate / jnp.sqrt(1 + t))


def focal(optim):
    def loss(logits, targets):
        log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[:, None], 1)[:, 0]
        return -((1 - jnp.exp(log_p)) ** optim.focal_gamma) * log_p

    return loss


LOSSES["focal"] = Entry(
    focal, {"optim.focal_gamma": Key(2.0, "Exponent of the focal loss.", POSITIVE)}
)


class MeanConfidence(Metric):
    """The mean of the largest probability."""

    def of_batch(self, outputs):
        return {"sum": outputs.confidence.sum(), "count": outputs.counted.sum()}

    def compute(self, state):
        return float(state["sum"] / state["count"])


METRICS["mean_confidence"] = MeanConfidence()


def bars(where, split, class_names, bars_count):
    """Horizontal and vertical bars in noise, as arrays."""
    del where, class_names
    rng = np.random.default_rng(("train", "test").index(split))
    images = rng.integers(0, 100, (bars_count, 8, 8, 1), np.uint8)
    labels = rng.integers(0, 2, bars_count)
    for image, label in zip(images, labels, strict=True):
        (image if label else image.swapaxes(0, 1))[rng.integers(8)] = 255
    return ArraySource(images, labels, ("vertical", "horizontal"))


SOURCES["bars"] = Store(
    bars,
    {"data.bars_count": Key(256, "Number of images of a split.", COUNT)},
    splits=lambda where, **options: ("train", "test"),
)


def get_config():
    config = default_config()
    config.steps, config.batch_size = 40, 64
    config.model.name = "cifar_resnet8"
    config.model.overrides = (
        "block=one norm=rms shortcut=B stage_sizes=1,1 stage_features=8,16 stem_features=8"
    )
    config.data.source = "bars:made"
    config.data.bars_count = 512
    config.optim.optimizer = "lion"
    config.optim.lion_beta = 0.95
    config.optim.schedule = "sqrt"
    config.optim.learning_rate = 0.01
    config.optim.loss = "focal"
    config.eval.metrics = "mean_confidence balanced_error"
    config.checkpoint.every = 20
    config.log.every = 10
    config.log.tensorboard = False
    return config
