"""Every named network: published counts, properties, and its scanned form."""

from pathlib import Path

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest
from marks import long
from variables import drawn

from resnet_flax import VARIANTS, UserError, create_model, parse_overrides
from resnet_flax.models.blocks import squeezed_features
from resnet_flax.models.counts import Counts, stored
from resnet_flax.models.scan import stack, unstack
from resnet_flax.models.summary import native_size, summarize

# Compiling takes the time here: 15 s for the initial values of an 18-layer network, and 1.3 s so.
QUICKLY = {"compiler_options": {"xla_backend_optimization_level": 0}}

# Parameters, and multiply-adds in units of 1e9 as printed, counted with torchvision and timm.
# (Lists that give plain-34 as 3.645 and ResNeXt-50 as 4.231 rounded 3.6445 and 4.2305 again; the
# integers are 3,644,493,824 and, hooks on torchvision's network agreeing, 4,230,479,872.)
COUNTS = {
    "plain18": (11_515_688, "1.795"),
    "resnet18_a": (11_515_688, "1.795"),
    "resnet18": (11_689_512, "1.814"),
    "resnet18_b": (11_689_512, "1.814"),
    "plain34": (21_623_848, "3.644"),
    "resnet34_a": (21_623_848, "3.644"),
    "resnet34": (21_797_672, "3.664"),
    "resnet34_b": (21_797_672, "3.664"),
    "resnet34_c": (22_716_840, "3.831"),
    "resnet50_v1": (25_557_032, "3.858"),
    "resnet50": (25_557_032, "4.089"),
    "resnet101_v1": (44_549_160, "7.570"),
    "resnet101": (44_549_160, "7.801"),
    "resnet152_v1": (60_192_808, "11.282"),
    "resnet152": (60_192_808, "11.514"),
    "resnetv2_50": (25_549_352, "4.089"),
    "resnetv2_101": (44_541_480, "7.801"),
    "resnetv2_152": (60_185_128, "11.514"),
    "seresnet18": (11_778_592, None),
    "seresnet34": (21_958_868, None),
    "seresnet50": (28_088_024, "4.092"),
    "seresnet101": (49_326_872, None),
    "seresnet152": (66_821_848, None),
    "resnext50_32x4d": (25_028_904, "4.230"),
    "resnext101_32x4d": (44_177_704, "7.970"),
    "resnext101_64x4d": (83_455_272, "15.460"),
    "resnext101_32x8d": (88_791_336, "16.414"),
    "seresnext50_32x4d": (27_559_896, "4.233"),
    "seresnext101_32x4d": (48_955_416, "7.975"),
    "resnet50d": (25_576_264, None),
    "resnet26": (15_995_176, None),
    "resnet26d": (16_014_408, None),
    "resnet200d": (64_693_064, None),
    "resnet50c": (25_576_264, None),
    "resnet101c": (44_568_392, None),
    "resnet152c": (60_212_040, None),
    "resnet50s": (25_680_808, None),
    "resnet101s": (44_672_936, None),
    "resnet152s": (60_316_584, None),
    "resnet50_gn": (25_557_032, None),
    "resnetv2_18d": (11_706_952, None),
    "resnetv2_34d": (21_815_112, None),
    "resnetv2_50d_gn": (25_568_584, None),
    "resnext50d_32x4d": (25_048_136, None),
    "resnext101_32x16d": (194_026_792, None),
    "resnext101_32x32d": (468_530_472, None),
    "seresnet152d": (66_841_080, None),
    "seresnext26d_32x4d": (16_809_512, None),
    "seresnext101_32x8d": (93_569_048, None),
    "seresnext101_64x4d": (88_232_984, None),
    "seresnext101d_32x8d": (93_588_280, None),
    "cifar_resnet20": (269_722, "0.0406"),
    "cifar_resnet32": (464_154, "0.0689"),
    "cifar_resnet44": (658_586, "0.0972"),
    "cifar_resnet56": (853_018, "0.1255"),
    "cifar_resnet110": (1_727_962, "0.2529"),
    "cifar_resnet1202": (19_421_274, "2.829"),
    "cifar_resnet20_b": (272_474, "0.04081"),  # chenyaofo/pytorch-cifar-models
    "cifar_resnet32_b": (466_906, "0.06912"),
    "cifar_resnet44_b": (661_338, "0.09744"),
    "cifar_resnet56_b": (855_770, "0.12575"),
    "resnet18_cifar": (11_173_962, None),  # kuangliu/pytorch-cifar
    "resnet34_cifar": (21_282_122, None),
    "resnet50_cifar": (23_520_842, None),
    "resnet101_cifar": (42_512_970, None),
    "resnet152_cifar": (58_156_618, None),
    "cifar_resnetv2_164": (1_703_258, "0.2445"),
    "cifar_resnetv2_1001": (10_327_706, "1.488"),
    "wrn28_10": (36_479_194, "5.243"),
    "wide_resnet50_2": (68_883_240, "11.398"),
    "wide_resnet101_2": (126_886_696, "22.753"),
}


def _summary(name, **axes):
    model = create_model(name, **axes)
    side = native_size(model)
    return summarize(model, (side, side, 3))


@pytest.mark.parametrize("name", VARIANTS)
def test_parameters_multiply_adds_and_layers_are_the_published(name):
    summary = _summary(name)
    image = native_size(create_model(name))
    row = Counts(summary.parameters, summary.multiply_adds, summary.depth, image)
    assert stored().get(name) == row, "python -m resnet_flax.models.counts writes the table"
    parameters, printed = COUNTS.get(name, (summary.parameters, None))
    assert summary.parameters == parameters
    assert isinstance(summary.multiply_adds, int)
    if printed is not None:
        digits = len(printed.partition(".")[2])
        assert f"{summary.multiply_adds / 1e9:.{digits}f}" == printed
    number = int("".join(c if c.isdigit() else " " for c in name.replace("v2", "")).split()[0])
    # Three convolutions instead of one in a deep stem; a wide network's name counts the two
    # projections.
    extra = 2 if create_model(name).stem == "deep" else 0
    assert summary.depth == number + (-2 if name.startswith("wrn") else extra)


def test_every_count_is_of_a_variant():
    assert set(COUNTS) <= set(VARIANTS)


@pytest.mark.parametrize(
    ("name", "axes", "parameters", "printed"),
    [
        ("resnetv2_50", {"stem_norm": True}, 25_549_480, "4.089"),
        ("resnetv2_101", {"stem_norm": True}, 44_541_608, "7.801"),
        ("resnetv2_152", {"stem_norm": True}, 60_185_256, "11.514"),
        ("seresnet18", {"se_divisor": 8}, 11_779_624, "1.814"),
        ("cifar_resnetv2_164", {"stride_on": "3x3"}, 1_703_258, "0.248"),
        ("cifar_resnetv2_1001", {"stride_on": "3x3"}, 10_327_706, "1.491"),
    ],
)
def test_counts_along_the_axes(name, axes, parameters, printed):
    summary = _summary(name, **axes)
    assert summary.parameters == parameters
    assert f"{summary.multiply_adds / 1e9:.3f}" == printed


def test_counting_agrees_with_what_is_allocated():
    widths = {"stage_features": (8, 16, 32, 64), "width_per_group": 16}
    model = create_model("seresnext50_32x4d", stage_sizes=(1, 2, 1, 3), **widths)
    x = jnp.zeros((1, 64, 64, 3))
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), x, train=False))
    allocated = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    assert summarize(model, (64, 64, 3)).parameters == allocated


# The kinds of block, stem, shortcut and norm that the variants are made of, small.
SMALL = {
    "resnet18": {"stage_sizes": (1, 2, 1, 3)},
    "resnet34_c": {"stage_sizes": (2, 1, 1, 1)},
    "resnet50": {"stage_sizes": (1, 2, 1, 3)},
    "resnet50_v1": {"stage_sizes": (1, 1, 2, 1)},
    "resnetv2_50": {"stage_sizes": (2, 1, 1, 3)},
    "resnext50_32x4d": {"stage_sizes": (2, 1, 1, 1), "groups": 4, "width_per_group": 32},
    "seresnet50": {"stage_sizes": (2, 1, 1, 1)},
    "resnet50d": {"stage_sizes": (2, 1, 1, 1)},
    "cifar_resnet20": {},
    "cifar_plain20": {},
    "cifar_resnetv2_164": {"stage_sizes": (3, 2, 1)},
    "wrn28_10": {"stage_sizes": (2, 2, 1)},
}


def _small(name, **axes):
    axes = {"stage_sizes": create_model(name).stage_sizes} | SMALL[name] | axes
    width = (8, 16, 32, 64)[: len(axes["stage_sizes"])]
    features = {"stage_features": width, "stem_features": 8, "num_classes": 5}
    return create_model(name, **features | axes)


def _gradient(model, variables, x):
    def loss(params):
        logits, updated = model.apply(
            {**variables, "params": params}, x, train=True, mutable=["batch_stats"]
        )
        return jnp.square(logits - jnp.arange(5)).mean(), updated.get("batch_stats", {})

    return jax.jit(jax.value_and_grad(loss, has_aux=True), **QUICKLY)(variables["params"])


def _narrow(name, **axes):
    """The variant with all of its blocks, at a small width."""
    model = create_model(name)
    width = (8, 16, 32, 64)[: len(model.stage_sizes)]
    narrow = {"stage_features": width, "stem_features": 8, "num_classes": 5, "scan": True}
    if model.groups > 1:
        narrow |= {"groups": 4, "width_per_group": 8 * model.width_per_group}
    return create_model(name, **narrow, **axes)


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.long) for n in VARIANTS])
def test_every_parameter_gets_a_gradient(name):
    _assert_gradients(_narrow(name))


def test_every_parameter_of_the_deepest_gets_a_gradient():
    _assert_gradients(_narrow("cifar_resnetv2_1001"))


def _assert_gradients(model):
    side = 8 if model.stem == "cifar" else 32
    x = jax.random.normal(jax.random.key(1), (4, side, side, 3))
    init = jax.jit(lambda: model.init(jax.random.key(0), x, train=False), **QUICKLY)
    variables = init()
    _, gradients = _gradient(model, variables, x)
    assert jax.tree.structure(gradients) == jax.tree.structure(variables["params"])
    without = []
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        blocks = gradient if "_blocks/" in name else gradient[None]
        if not np.abs(blocks).max(axis=tuple(range(1, blocks.ndim))).min() > 0:
            without.append(name)
    assert without == []
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))


def _equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from _equations(inner)


@pytest.mark.parametrize("name", SMALL)
def test_strided_operators_pad_both_sides_alike(name):
    """On even sides 'SAME' would pad one pixel more after than before."""
    model = _small(name)
    x = jnp.ones((1, 32, 32, 3))
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), x, train=False))
    jaxpr = jax.make_jaxpr(lambda v, x: model.apply(v, x, train=False))(variables, x)
    strided = 0
    for equation in _equations(jaxpr.jaxpr):
        p = equation.params
        if max(p.get("window_strides", (1,))) > 1:
            strided += 1
            assert all(before == after for before, after in p["padding"]), equation
    # Stem and pooling, if any, and stages with a stride.
    assert strided >= len(model.stage_sizes) - 1


def test_same_is_named_nowhere():
    for file in (Path(__file__).parent.parent.parent / "resnet_flax").rglob("*.py"):
        assert '"SAME"' not in file.read_text(), file


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("name", "sizes", "remat"),
    [
        long("resnet50", (1, 2, 1, 4), 0),
        ("cifar_resnet20", (1, 3), 1),
        ("cifar_resnetv2_164", (2, 4), 2),
        long("resnet50", (1, 2, 1, 4), 1),
        long("resnet50", (1, 2, 1, 4), 2),
        long("cifar_resnet20", (4, 1, 3), 0),
        long("cifar_resnet20", (4, 1, 3), 2),
        long("cifar_resnetv2_164", (2, 4, 1), 0),
        long("cifar_resnetv2_164", (2, 4, 1), 1),
    ],
)
def test_scanned_and_unrolled_are_the_same_function(name, sizes, remat):
    types = {"stage_sizes": sizes, "dtype": jnp.float64, "param_dtype": jnp.float64}
    unrolled, scanned = _small(name, **types), _small(name, scan=True, remat=remat, **types)
    side = 8 if unrolled.stem == "cifar" else 32
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, side, side, 3)))
    variables = drawn(unrolled, x)
    stacked = stack(variables)
    shapes = jax.eval_shape(lambda: scanned.init(jax.random.key(0), x, train=False))
    assert jax.tree.map(jnp.shape, stacked) == jax.tree.map(jnp.shape, shapes)
    jax.tree.map(np.testing.assert_array_equal, unstack(stacked), variables)

    (loss, stats), gradients = _gradient(unrolled, variables, x)
    (scanned_loss, scanned_stats), scanned_gradients = _gradient(scanned, stacked, x)
    assert abs(scanned_loss - loss) < 1e-12 * abs(loss)
    ours = unstack({"params": scanned_gradients, "batch_stats": scanned_stats})
    _near(ours, {"params": gradients, "batch_stats": stats})


@pytest.mark.usefixtures("x64")
def test_rematerialised_blocks_are_the_same_function():
    types = {"stage_sizes": (1, 4), "dtype": jnp.float64, "param_dtype": jnp.float64}
    kept, again = _small("cifar_resnet20", **types), _small("cifar_resnet20", remat=2, **types)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 8, 8, 3)))
    variables = jax.jit(lambda: kept.init(jax.random.key(0), x, train=False))()
    jax.tree.map(
        np.testing.assert_array_equal,
        variables,
        jax.jit(lambda: again.init(jax.random.key(0), x, train=False))(),
    )
    _near(_gradient(again, variables, x), _gradient(kept, variables, x))

    # Two checkpoints for the first blocks; a group of 2 and one of 1 for the three others of stage
    # 2. Scanned, the first of these is the body of a loop.
    def checkpoints(model, variables):
        forward = jax.make_jaxpr(lambda v: model.apply(v, x, train=False))(variables)
        found = [e for e in _equations(forward.jaxpr) if e.primitive.name == "remat2"]
        return len(found)

    assert checkpoints(kept, variables) == 0
    assert checkpoints(again, variables) == 4
    scanned = _small("cifar_resnet20", scan=True, remat=2, **types)
    assert checkpoints(scanned, stack(variables)) == 4
    assert checkpoints(scanned.clone(remat=0), stack(variables)) == 0


def test_stacks_are_in_the_order_of_the_blocks_and_no_two_begin_alike():
    model = _small("cifar_resnet20", stage_sizes=(13,))
    shapes = jax.eval_shape(
        lambda: model.init(jax.random.key(0), jnp.ones((1, 8, 8, 3)), train=False)
    )
    numbered = {
        c: {
            name: jax.tree.map(lambda a, n=name: np.full(a.shape, int(n.split("block")[1])), block)
            for name, block in tree.items()
            if "block" in name
        }
        for c, tree in shapes.items()
    }
    kernel = stack(numbered)["params"]["stage1_blocks"]["conv1"]["kernel"]
    assert kernel[:, 0, 0, 0, 0].tolist() == list(range(2, 14))
    jax.tree.map(np.testing.assert_array_equal, unstack(stack(numbered)), numbered)

    scanned = model.clone(scan=True)
    variables = jax.jit(
        lambda: scanned.init(jax.random.key(0), jnp.ones((1, 8, 8, 3)), train=False)
    )()
    kernels = variables["params"]["stage1_blocks"]["conv2"]["kernel"].reshape(12, -1)
    assert len({float(k[0]) for k in kernels}) == 12
    # Each is initialised like a single block, not like the stack.
    np.testing.assert_allclose(kernels.std(1), np.sqrt(2 / (9 * 8)), rtol=0.15)


def test_initial_weights_are_he_s_and_torch_s():
    """He et al. 2015b with fan-out (as in the released code); the head as in torch's nn.Linear."""
    model = create_model("resnet50", stage_sizes=(1, 1, 1, 1))
    x = jnp.ones((1, 32, 32, 3))

    @jax.jit
    def params():  # those that are checked
        everything = model.init(jax.random.key(0), x, train=False)["params"]
        return {name: everything[name] for name in ("stage2_block1", "stage4_block1", "head")}

    params = params()
    for block, conv, fan_out in (
        ("stage2_block1", "conv1", 128),
        ("stage2_block1", "conv2", 9 * 128),
        ("stage4_block1", "conv3", 2048),
    ):
        kernel = params[block][conv]["kernel"]
        assert kernel.std() == pytest.approx(np.sqrt(2 / fan_out), rel=0.02)
        assert np.abs(kernel).max() > 3.5 * kernel.std()  # normal, not truncated
    head = params["head"]["kernel"]
    assert head.max() == pytest.approx(1 / np.sqrt(2048), rel=1e-3)
    assert head.std() == pytest.approx(1 / np.sqrt(3 * 2048), rel=0.02)


def test_the_norm_s_axes_reach_it():
    x = jax.random.normal(jax.random.key(1), (8, 8, 8, 3))
    several = ({}, {"norm_momentum": 0.5}, {"norm_unbiased": True}, {"ghost_batches": 4})
    models = [_small("cifar_resnet20", stage_sizes=(1,), **axes) for axes in several]
    variables = drawn(models[0], x)

    @jax.jit
    def statistics():
        updated = [m.apply(variables, x, train=True, mutable=["batch_stats"])[1] for m in models]
        return [each["batch_stats"]["stem"]["norm1"] for each in updated]

    usual, faster, unbiased, grouped = statistics()
    np.testing.assert_allclose(faster["mean"], 5 * usual["mean"], rtol=1e-5)
    n = 8 * 8 * 8
    np.testing.assert_allclose(unbiased["var"] - 0.9, (usual["var"] - 0.9) * n / (n - 1), rtol=1e-3)
    assert (grouped["var"] != usual["var"]).any()


@pytest.mark.parametrize(
    ("features", "multiple", "squeezed"),
    [(64, 1, 4), (72, 1, 5), (64, 8, 8), (144, 8, 8), (192, 8, 16), (2048, 8, 128), (8, 1, 1)],
)
def test_squeezed_channels_are_rounded_to_the_nearest_multiple(features, multiple, squeezed):
    assert squeezed_features(features, 16, multiple) == squeezed


def _near(ours, theirs):
    def near(a, b):
        assert np.linalg.norm(a - b) <= 1e-10 * np.linalg.norm(b)

    jax.tree.map(near, ours, theirs)


@pytest.mark.parametrize("name", ["resnet18", long("resnet50"), long("resnet50d"), "seresnet50"])
def test_a_block_starts_as_the_identity_with_zero_init(name):
    model = _small(name, zero_init=True, stage_sizes=(3, 1))
    x = jax.random.normal(jax.random.key(1), (2, 32, 32, 3))
    variables = jax.jit(lambda: model.init(jax.random.key(0), x, train=False))()
    # Blocks 2 and 3 of stage 1 change nothing: without them the maps are the same.
    short = model.clone(stage_sizes=(1, 1))
    kept = {
        collection: {k: v for k, v in tree.items() if k not in ("stage1_block2", "stage1_block3")}
        for collection, tree in variables.items()
    }
    long_maps, short_maps = jax.jit(
        lambda *both: [
            net.apply(v, x, train=False, return_features=True)
            for net, v in zip((model, short), both, strict=True)
        ]
    )(variables, kept)
    np.testing.assert_array_equal(long_maps["c2"], short_maps["c2"])
    for name, block in variables["params"].items():
        if name.startswith("stage"):
            *norms, last = sorted(part for part in block if part.startswith("norm"))
            assert not block[last]["scale"].any()
            assert all((block[norm]["scale"] == 1).all() for norm in norms)
    np.testing.assert_array_equal(long_maps["logits"], short_maps["logits"])


@pytest.mark.parametrize(
    ("stride", "sides"), [(32, (16, 8, 4, 2)), (16, (16, 8, 4, 4)), (8, (16, 8, 8, 8))]
)
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_dilation_keeps_the_map_and_the_parameters(name, stride, sides):
    model = _small(name, output_stride=stride)
    assert model.stride == stride
    features = summarize(model, (64, 64, 3)).features
    assert tuple(features[f"c{i}"][0] for i in (2, 3, 4, 5)) == sides
    assert (
        summarize(model, (64, 64, 3)).parameters == summarize(_small(name), (64, 64, 3)).parameters
    )


def test_odd_sizes_round_up_as_torch_does():
    for name in ("resnet18", "resnet50", "resnet50d"):
        features = summarize(_small(name), (65, 97, 3)).features
        assert [features[f"c{i}"][:2] for i in (2, 3, 4, 5)] == [(17, 25), (9, 13), (5, 7), (3, 4)]


def test_group_normalisation_needs_no_statistics():
    model = _small("resnet50", norm="group", stage_sizes=(1, 1))
    x = jax.random.normal(jax.random.key(1), (2, 32, 32, 3))
    variables = drawn(model, x)
    assert set(variables) == {"params"}
    train, evaluate = jax.jit(
        lambda v: [
            model.apply(v, x, train=train, mutable=["batch_stats"])[0] for train in (True, False)
        ]
    )(variables)
    np.testing.assert_array_equal(train, evaluate)


@pytest.mark.parametrize(
    ("name", "axes", "message"),
    [
        ("resnet51", {}, r"no model called 'resnet51'; did you mean resnet"),
        ("resnet50", {"stem": "big"}, "stem must be one of cifar, imagenet, deep, not 'big'"),
        ("resnet50", {"output_stride": 4}, "output_stride must be one of 8, 16, 32, not 4"),
        ("resnet18", {"groups": 32}, "groups and width_per_group need block='bottleneck'"),
        ("resnetv2_50", {"zero_init": True}, "zero_init needs blocks that end in a normalisation"),
        ("resnetv2_50", {"shortcut": "none"}, "preactivation needs a shortcut"),
        ("resnet50d", {"shortcut": "A"}, "avg_down needs projections"),
        ("resnet50", {"stage_sizes": (1, 2)}, "must have the same number of entries"),
        ("cifar_resnet20", {"stem_features": 32}, "shortcut='A' only adds channels"),
        ("plain18", {"se_ratio": 16}, "se_ratio needs a shortcut, not"),
        ("resnet50", {"stage_sizes": 3}, "stage_sizes must be whole numbers from 1, one per stage"),
        ("resnet50", {"groups": 0}, "groups must be a whole number from 1, not 0"),
        ("resnet50", {"groups": True}, "groups must be a whole number from 1, not True"),
        ("resnet50", {"stem": ["deep"]}, "stem must be one of cifar, imagenet, deep, not"),
        ("resnet50", {"dtype": "banana"}, "dtype must be a floating-point type such as .*'banana'"),
        ("resnet50", {"dtype": "int32"}, "dtype must be a floating-point type such as .*'int32'"),
        ("resnet50", {"param_dtype": None}, "param_dtype must be a floating-point type"),
        (
            "resnet50",
            {"name": "x"},
            r"resnet50 has no attribute called 'name'.* \(known: .*, stem, .*, zero_init",
        ),
        ("resnet50d", {"stem_features": 63}, "stem='deep' needs an even stem_features, not 63"),
        ("plain18", {"zero_init": True}, "zero_init needs a shortcut"),
        ("resnet50", {"se_ratio": "yes"}, "se_ratio must be a whole number from 0, not 'yes'"),
        ("resnet50", {"zero_init": 1}, "zero_init must be true or false, not 1"),
        (
            "resnet50",
            {"norm_momentum": 1.5},
            "norm_momentum must be at least 0 and less than 1",
        ),
        ("resnext50_32x4d", {"stage_features": (8, 16, 32, 64)}, "have no channels"),
    ],
)
def test_axes_that_make_no_network_are_explained(name, axes, message):
    with pytest.raises(UserError, match=message):
        create_model(name, **axes)


def test_axes_may_be_lists_and_numbers_of_numpy():
    model = create_model("resnet50", stage_sizes=[3, 4, np.int64(6), 3], num_classes=np.int32(7))
    assert model == create_model("resnet50", stage_sizes=(3, 4, 6, 3), num_classes=7)
    hash(model)


def test_a_deep_stem_without_its_last_norm_is_not_linear():
    model = _small("resnetv2_50", stem="deep")
    x = jnp.ones((1, 32, 32, 3))
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), x, train=False))
    assert set(shapes["params"]["stem"]) == {"conv1", "conv2", "conv3", "norm1", "norm2"}


def test_stacks_of_another_depth_are_refused():
    x = jnp.ones((1, 8, 8, 3))
    model = _small("cifar_resnet20", scan=True, stage_sizes=(3, 1))
    variables = drawn(model, x)
    for remat in (0, 2):
        deeper = model.clone(stage_sizes=(5, 1), remat=remat)
        with pytest.raises(UserError, match=r"has 4 blocks stacked in stage1_blocks, .* 2; give"):
            deeper.apply(variables, x, train=False)
    with pytest.raises(UserError, match=r"the variables none; give variables of the same"):
        model.apply(unstack(variables), x, train=False)


def test_a_rematerialised_network_can_be_tabulated():
    table = _small("cifar_resnet20", remat=2).tabulate(
        jax.random.key(0), jnp.ones((1, 8, 8, 3)), train=False, console_kwargs={"width": 200}
    )
    assert "stage1_block2" in table


def test_axes_are_read_from_words():
    words = "shortcut=C stride_on=1x1 stem_norm=false zero_init=True se_ratio=16 stage_sizes=1,2"
    assert parse_overrides(words) == {
        "shortcut": "C",
        "stride_on": "1x1",
        "stem_norm": False,
        "zero_init": True,
        "se_ratio": 16,
        "stage_sizes": (1, 2),
    }
    assert parse_overrides(" ") == {}
    with pytest.raises(UserError, match="shortcut is given twice in"):
        parse_overrides("shortcut=A shortcut=C")
    assert parse_overrides("stem={[]}") == {"stem": "{[]}"}
    with pytest.raises(UserError, match="written name=value with spaces between, not 'deep'"):
        parse_overrides("stem=deep deep")


def test_images_that_do_not_fit_are_explained():
    model = _small("resnet18")
    with pytest.raises(UserError, match=r"must be \[batch, .*not of shape \[32, 32, 3\]"):
        model._check_images(jnp.ones((32, 32, 3)))
    with pytest.raises(UserError, match=r"images of 16 x 40 are smaller than .* stride of 32"):
        model.init(jax.random.key(0), jnp.ones((1, 16, 40, 3)), train=False)
    x = jnp.ones((1, 32, 32, 3))
    variables = drawn(model, x)
    with pytest.raises(UserError, match=r"images have 1 channels, but .* for 3"):
        model.apply(variables, x[..., :1], train=False)
