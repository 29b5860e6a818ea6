"""A mismatch of weights and a network is explained by its pattern, with counts and examples."""

import pytest

from resnet_flax.weights.mismatch import explain, stage_sizes


def _network(sizes=(2, 1), width=4, convs=2, kernel=3):
    """Shapes of a small network by torch's names."""
    shapes = {"conv1.weight": (width, 3, 7, 7), "bn1.weight": (width,), "bn1.bias": (width,)}
    for stage, size in enumerate(sizes, start=1):
        for block in range(size):
            for conv in range(1, convs + 1):
                prefix = f"layer{stage}.{block}"
                shapes[f"{prefix}.conv{conv}.weight"] = (width, width + 1, kernel, kernel)
                shapes[f"{prefix}.bn{conv}.weight"] = (width,)
    return {**shapes, "fc.weight": (10, width), "fc.bias": (10,)}


def _renamed(old, new, shapes=None):
    return {name.replace(old, new): s for name, s in (shapes or _network()).items()}


OHWI = {n: (s[0], s[2], s[3], s[1]) if len(s) == 4 else s for n, s in _network().items()}
HWIO = {n: (s[2], s[3], s[1], s[0]) if len(s) == 4 else s for n, s in _network().items()}


@pytest.mark.parametrize(
    ("given", "pattern"),
    [
        (_network((2, 3)), "its stages have 2, 3 blocks, those of the network 2, 1"),
        (_network((2, 1, 1)), "its stages have 2, 1, 1 blocks, those of the network 2, 1"),
        (_network(convs=3), "its blocks have 3 convolutions, those of the network 2"),
        (_network(width=8), "its layers have other widths, such as bn1.weight 8 and not 4"),
        ({f"tower.{n}": s for n, s in _network().items()}, "its names have tower in addition"),
        (_renamed("layer", "group"), "layerN of the network is called groupN in it"),
        (_renamed("fc.", "last_linear."), "fc of the network is called last_linear in it"),
        (
            HWIO,
            "the axes of 7 convolutions are in the order HWIO, as in Keras, Ten",
        ),
        (OHWI, "the axes of 7 convolutions are in the order OHWI, as in TensorFlow Lite and MLX"),
        (
            _renamed("bn", "norm", HWIO),
            "bnN of the network is called normN in it; the axes of",
        ),
    ],
)
def test_the_pattern_comes_first(given, pattern):
    assert explain(given, _network()).startswith(f"{pattern}")


def test_counts_have_three_examples_each():
    wanted = _network((2, 2))
    del wanted["bn1.bias"]
    assert explain(_network(kernel=5), wanted) == (
        "its stages have 2, 1 blocks, those of the network 2, 2; "
        "4 missing (layer2.1.conv1.weight, layer2.1.bn1.weight, layer2.1.conv2.weight and 1 more); "
        "1 unexpected (bn1.bias); "
        "6 of another shape (layer1.0.conv1.weight [4, 5, 5, 5], not [4, 5, 3, 3], "
        "layer1.0.conv2.weight [4, 5, 5, 5], not [4, 5, 3, 3], "
        "layer1.1.conv1.weight [4, 5, 5, 5], not [4, 5, 3, 3] and 3 more)"
    )


def test_nothing_is_said_of_what_fits_and_no_pattern_where_there_is_none():
    assert explain(_network(), _network()) == ""
    found = explain({"a.b": (1,), "c": (2,)}, {"d.e": (1,), "f": (3,)})
    assert found == "2 missing (d.e, f); 2 unexpected (a.b, c)"


def test_very_many_names_take_little_time():
    """Pairs are compared, so their number is limited."""
    given = {f"a{i}.b{i % 7}.weight": (3,) for i in range(20_000)}
    wanted = {f"c{i}.b{i % 7}.weight": (3,) for i in range(20_000)}
    assert explain(given, wanted).startswith("cN of the network is called aN in it; 20000 missing")


def test_blocks_are_counted_in_all_names():
    assert stage_sizes(_network((3, 2))) == (3, 2)
    assert stage_sizes(["stages.0.blocks.1.conv1.weight", "stages.0.blocks.0.x"]) == (2,)
    assert stage_sizes(["params/stage1_block1/conv1/kernel", "params/stage1_block2/x"]) == (2,)
