"""The residual network: one module whose attributes define the whole family."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.errors import InvalidRngError
from jaxtyping import Array, Float

from resnet_flax import renamed
from resnet_flax.errors import UserError
from resnet_flax.models.blocks import BLOCKS, SqueezeExcitation
from resnet_flax.models.conv_norm import norm_act
from resnet_flax.models.layers import NORMS, Conv
from resnet_flax.models.scan import scan_in_groups
from resnet_flax.models.stem import Stem
from resnet_flax.ops import is_symbolic

Dtype = Any

# As in torch's nn.Linear: uniform within +-1 / sqrt(features).
head_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class ResNet(nn.Module):
    """A residual network: stem, stages of blocks, mean over positions, linear head.

    Parameters are named `stem/conv1/kernel`, `stage1_block1/conv1/kernel`,
    `stage1_block1/norm1/scale`, `stage2_block1/shortcut/conv/kernel`, `stage1_block1/se/reduce`,
    `norm/scale` (pre-activation only) and `head/kernel`: weight import, decay masks and checkpoints
    rely on these names. With `scan` the second and later blocks of stage 1 are stacked in
    `stage1_blocks`; see `scan`.

    Attributes:
      stage_sizes: number of blocks of each stage.
      stage_features: width of each stage; a bottleneck's output is four times as wide.
      stem_features: channels of the stem.
      block: 'basic' (two 3x3), 'bottleneck' (1x1, 3x3, 1x1), or another name in `BLOCKS`.
      shortcut: 'A', 'B', 'C' (He et al. 2015, section 3.3) or 'none', a plain network.
      stride_on: the bottleneck's convolution with the stride: '1x1' as in the paper, or '3x3'
        ("v1.5", torchvision and most others).
      preactivation: use the blocks of He et al. 2016.
      groups: of the 3x3 convolution (ResNeXt's cardinality).
      width_per_group: channels per group where the width is 64 (ResNeXt's d; 128 for twice as
        wide).
      se_ratio: channels over squeezed channels of squeeze-and-excitation; 0 for none.
      se_divisor: squeezed channels are rounded to a multiple of this, 8 in timm.
      stem: 'cifar' (one 3x3), 'imagenet' (7x7 and max pooling) or 'deep' (three 3x3 and max
        pooling).
      stem_norm: normalise and activate after the stem's last convolution.
      stem_bias: the stem's convolutions have a bias, as in the Caffe model of ResNet-50.
      stem_pool: 'padded', or 'ceil' as in Caffe, see `ops.max_pool`.
      avg_down: projections stride by average pooling (ResNet-D).
      norm: 'batch', 'group' or another name in `NORMS`.
      zero_init: initialise blocks to the identity (Goyal et al. 2017, section 5.1).
      output_stride: largest total stride; strides beyond it are replaced by dilation.
      scan: run identical blocks in a loop over stacked parameters; the compilation time then does
        not depend on the depth. `capture_intermediates` returns nothing from inside the loop.
      remat: save only the input of each group of this many blocks for the backward pass and
        recompute the rest; 0 saves everything, 1 each block's input. For n identical blocks, about
        sqrt(n) needs the least memory. On XLA's CPU backend it only has an effect with `scan`.
      num_classes: outputs of the head; 0 leaves the head out, and the network returns the features
        that would be its input, as in timm.
      ghost_batches: number of groups of examples that batch normalisation treats separately.
      norm_momentum: fraction of the running statistics that a step keeps.
      norm_unbiased: update running variances with unbiased ones, as in torch.
      implementation: 'auto', the fastest known one of each operation on each kind of device; or
        'xla', JAX's own operations with JAX's own derivatives, for transformations and exporters
        that cannot take the others. Parameters are the same, and results equal up to rounding.
      dtype: type of the computation; logits always have `param_dtype`.
      param_dtype: type of parameters, statistics and logits.
    """

    stage_sizes: tuple[int, ...]
    stage_features: tuple[int, ...] = (64, 128, 256, 512)
    stem_features: int = 64
    block: str = "basic"
    shortcut: str = "B"
    stride_on: str = "3x3"
    preactivation: bool = False
    groups: int = 1
    width_per_group: int = 64
    se_ratio: int = 0
    se_divisor: int = 1
    stem: str = "imagenet"
    stem_norm: bool = True
    stem_bias: bool = False
    stem_pool: str = "padded"
    avg_down: bool = False
    norm: str = "batch"
    zero_init: bool = False
    output_stride: int = 32
    scan: bool = False
    remat: int = 0
    num_classes: int = 1000
    ghost_batches: int = 1
    norm_momentum: float = 0.9
    norm_unbiased: bool = False
    implementation: str = "auto"
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    @renamed.arguments(features="return_features", window="pool_window")
    def __call__(
        self,
        x: Float[Array, "b h w c"],
        *,
        train: bool,
        return_features: bool = False,
        pool_window: int = 0,
    ) -> Float[Array, "b *positions outputs"] | dict[str, Array]:
        """Logits `[b, classes]`, without a head features `[b, features]`, or all feature maps.

        Args:
          x: normalised images.
          train: normalise by the batch's statistics and update the running ones (the caller makes
            `batch_stats` mutable); otherwise normalise by the running ones.
          return_features: return a dict of the stages' maps `c2`, `c3`, ..., `pooled` and, with a
            head, `logits`.
          pool_window: 0 averages over the complete last map. Otherwise the network is fully
            convolutional: average pooling with this window and stride 1, then the head, gives
            outputs `[b, h, w, classes or features]`, one for each position of the window.

        Raises:
          UserError: the images are smaller than the network's stride, or have a number of channels
            that does not fit the parameters.
        """
        self._check_images(x)
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        conv = partial(Conv, **types, implementation=self.implementation)
        norm = partial(NORMS[self.norm](self), **types)
        maps: dict[str, Array] = {}
        stem_conv = partial(conv, use_bias=self.stem_bias)
        stem = partial(Stem, self.stem, self.stem_features, self.stem_norm, self.stem_pool)
        x = stem(stem_conv, norm, self.implementation, name="stem")(x, train)
        for stage, size in enumerate(self.stage_sizes, start=1):
            first, rest = self._blocks(stage, conv, norm)
            x = self._unrolled(first, stage, [1], x, train)
            if self.scan and size > 1:
                x = self._scanned(rest, f"stage{stage}_blocks", size - 1, x, train)
            else:
                x = self._unrolled(rest, stage, range(2, size + 1), x, train)
            maps[f"c{stage + 1}"] = x
        if self.preactivation:
            x = norm_act(norm(name="norm"), x, train)
        x = x.astype(self.param_dtype)
        pooled = _averages(x, pool_window) if pool_window else x.mean((1, 2))
        maps["pooled"] = pooled
        if self.num_classes:
            head = nn.Dense(
                self.num_classes, name="head", kernel_init=head_init, param_dtype=self.param_dtype
            )
            maps["logits"] = head(pooled)
        return maps if return_features else maps["logits" if self.num_classes else "pooled"]

    @property
    def stride(self) -> int:
        """Pixels of the image from one position of the last map to the next."""
        return strides_of(self)[-1][2]

    def _check_images(self, x: Array) -> None:
        if x.ndim != 4:
            raise UserError(
                f"images must be [batch, height, width, channels], not of shape {list(x.shape)}"
            )
        # A symbolic side is for `jax.export`'s caller to bound.
        if any(not is_symbolic([side]) and side < self.stride for side in x.shape[1:3]):
            small = ", or use a network for small images (stem='cifar')"
            hint = "" if self.stem == "cifar" else small
            raise UserError(
                f"images of {x.shape[1]} x {x.shape[2]} are smaller than the network's stride of "
                f"{self.stride}; give larger ones{hint}"
            )
        params = self.variables.get("params", {})
        if params:
            channels = params["stem"]["conv1"]["kernel"].shape[2]
            if channels != x.shape[-1]:
                raise UserError(
                    f"the images have {x.shape[-1]} channels, but the network's parameters are "
                    f"for {channels}"
                )

    def _blocks(self, stage: int, conv: Any, norm: Any) -> tuple[Any, Any]:
        """Functions that make the stage's first block, and its others."""
        strides, dilation, _ = strides_of(self)[stage - 1]
        # The first block of a stage whose stride was replaced by dilation still has the old
        # dilation.
        before = strides_of(self)[stage - 2][1] if stage > 1 else 1
        width = self.stage_features[stage - 1]
        make_se = None
        if self.se_ratio:
            make_se = partial(
                SqueezeExcitation,
                self.se_ratio,
                self.se_divisor,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                implementation=self.implementation,
            )

        pool = self.avg_down and (strides > 1 or dilation > 1)
        block = partial(
            BLOCKS[self.block, self.preactivation],
            width,
            dilation=dilation,
            shortcut=self.shortcut,
            zero_init=self.zero_init,
            groups=self.groups,
            width_per_group=self.width_per_group,
            stride_on=self.stride_on,
            make_se=make_se,
            conv=conv,
            norm=norm,
        )
        return (
            partial(block, strides=strides, first_dilation=before, avg_down=pool),
            partial(block, strides=1, first_dilation=dilation, avg_down=False),
        )

    def _unrolled(self, make: Any, stage: int, numbers: Any, x: Array, train: bool) -> Array:
        def several(parent: nn.Module, x: Array, numbers: Any) -> Array:
            for number in numbers:
                x = make(name=f"stage{stage}_block{number}", parent=parent)(x, train)
            return x

        if not self.remat:
            return several(self, x, numbers)
        for i in range(0, len(numbers), self.remat):
            group = numbers[i : i + self.remat]
            x = nn.remat(lambda parent, x, group=group: several(parent, x, group))(self, x)
        return x

    def _scanned(self, make: Any, name: str, length: int, x: Array, train: bool) -> Array:
        if self.is_initializing():
            loop = nn.scan(
                lambda block, x, _: (block(x, train), None),
                variable_axes={"params": 0, "batch_stats": 0},
                split_rngs={"params": True},
                length=length,
            )
            return loop(make(name=name), x, None)[0]
        # Not nn.scan, which cannot rematerialise groups of blocks.
        block = make(parent=None)
        updated = "batch_stats" if self.is_mutable_collection("batch_stats") else ()
        stacked = {c: tree[name] for c, tree in self.variables.items() if name in tree}
        depths = {len(leaf) for leaf in jax.tree.leaves(stacked)}
        if depths != {length}:
            raise UserError(
                f"the network has {length} blocks stacked in {name}, the variables "
                f"{', '.join(map(str, sorted(depths))) or 'none'}; give variables of the same "
                "stage_sizes, stacked by models.scan.stack"
            )

        def one(x: Array, variables: Any) -> Any:
            try:
                return block.apply(variables, x, train, mutable=updated)
            except InvalidRngError as error:
                raise UserError(
                    f"the block {self.block!r} draws random numbers, such as for dropout, which a "
                    "loop over stacked blocks cannot; give scan=False (model.scan=False)"
                ) from error

        x, states = scan_in_groups(one, x, stacked, length, self.remat)
        for collection, tree in states.items():
            self.put_variable(collection, name, tree)
        return x


def strides_of(model: ResNet) -> list[tuple[int, int, int]]:
    """For each stage: the stride of its first block, its dilation, its map's total stride."""
    total = 1 if model.stem == "cifar" else 4
    dilation, stages = 1, []
    for stage in range(len(model.stage_sizes)):
        strides = 1 if stage == 0 else 2
        if total * strides > model.output_stride:
            dilation, strides = dilation * strides, 1
        total *= strides
        stages.append((strides, dilation, total))
    return stages


def _averages(x: Array, side: int) -> Array:
    """Means over all windows of a side; flax's `avg_pool` needs the promotion of types."""
    sums = nn.pooling.pool(x, 0.0, jax.lax.add, (side, side), (1, 1), "VALID")
    return sums / float(side * side)
