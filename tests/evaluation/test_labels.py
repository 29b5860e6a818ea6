"""Classes of data as outputs of a network: by name, by number, or refused."""

import re

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from variables import drawn

from resnet_flax import create_model
from resnet_flax.cli import main
from resnet_flax.data.preprocessing import Preprocessing
from resnet_flax.data.sources import ArraySource
from resnet_flax.errors import UserError
from resnet_flax.evaluation.labels import as_outputs
from resnet_flax.evaluation.pretrained import report
from resnet_flax.evaluation.result import Result
from resnet_flax.weights.loading import Pretrained, export

CIFAR = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
# As torchvision's classes of CIFAR-10 are often called, sorted.
SHORT = ("bird", "car", "cat", "deer", "dog", "frog", "horse", "plane", "ship", "truck")
NUMBERS = tuple(map(str, range(12)))
TEXT = tuple(sorted(NUMBERS))


def _source(*names):
    """One image of each class, with its label as the pixel."""
    labels = np.arange(len(names))
    return ArraySource(labels.astype(np.uint8)[:, None, None, None], labels, names)


def _outputs(theirs, names, classes, **how):
    """The output for each class of data."""
    found = as_outputs(_source(*theirs), names, classes, **how)
    assert len(found.class_names) == classes or found.class_names == theirs
    return [int(found[i]["label"]) for i in range(len(theirs))]


def test_labels_are_found_by_the_names_of_classes():
    images = np.zeros((4, 9, 11, 3), np.uint8)
    few = ArraySource(images, [0, 1, 1, 0], ("frog", "cat"))
    found = as_outputs(few, ("cat", "dog", "frog"), 3)
    assert [int(found[i]["label"]) for i in range(4)] == [2, 0, 0, 2]
    assert as_outputs(few, ("frog", "cat"), 2) is few
    assert as_outputs(few, ("dog", "cow"), 2, by_number=True) is few
    assert as_outputs(few, (), 2) is few
    with pytest.raises(UserError, match=r"1 of the data's 2 classes are not among .*\(frog; "):
        as_outputs(few, ("cat", "dog"), 2)
    with pytest.raises(UserError, match="the data has 2 classes, the network 3 outputs of unknown"):
        as_outputs(few, (), 3)
    with pytest.raises(UserError, match="the data has 2 classes, the network 3 outputs; give"):
        as_outputs(few, ("a", "b", "c"), 3, by_number=True)


@pytest.mark.parametrize("theirs", [NUMBERS, TEXT, ("7", "11", "3")])
@pytest.mark.parametrize("how", [{}, {"by_number": True}])
@pytest.mark.parametrize("names", [NUMBERS, TEXT, TEXT[::-1], ()])
def test_classes_named_by_numbers_are_matched_by_these(theirs, how, names):
    """TEXT as names is that of a checkpoint from when directories were sorted as text."""
    if not names and not how and len(theirs) < 12:
        with pytest.raises(UserError, match="or pass --by_number if their names are the numbers"):
            _outputs(theirs, names, 12, **how)
        return
    outputs = _outputs(theirs, names, 12, **how)
    assert [(names or NUMBERS)[output] for output in outputs] == list(theirs)


def test_numbers_are_the_outputs_of_a_network_with_other_names():
    """As ImageNetV2's directories are named 0 to 999."""
    names = tuple(f"n{i:08}" for i in range(12))
    with pytest.raises(UserError, match=r"12 of the data's 12 .*, pass --by_number if its numbers"):
        _outputs(NUMBERS, names, 12)
    assert _outputs(TEXT, names, 12, by_number=True) == [int(name) for name in TEXT]
    assert _outputs(("011", "3"), names, 12, by_number=True) == [11, 3]
    # And the other way round: the position of a name is its number.
    assert [TEXT[i] for i in _outputs(names, TEXT, 12, by_number=True)] == list(NUMBERS)
    for other in ((), names, NUMBERS):
        with pytest.raises(UserError, match=r"class 12 of the data has no output, .* 0 to 11; "):
            _outputs(tuple(map(str, range(1, 13))), other, 12, by_number=True)


def test_a_name_of_another_output_is_refused():
    with pytest.raises(UserError) as error:
        _outputs(SHORT, CIFAR, 10)
    assert "(car, plane; the network's: airplane, automobile, bird, ...)" in str(error.value)
    assert "--class_names" in str(error.value)
    assert "--by_number" not in str(error.value)  # as it would be refused
    expected = (
        "by number, class bird of the data would be output 0 (airplane), but bird is the name "
    )
    with pytest.raises(UserError, match=re.escape(f"{expected}of output 2; leave --by_number out")):
        _outputs(SHORT, CIFAR, 10, by_number=True)
    shown = ("plane", "car", *CIFAR[2:])
    assert _outputs(shown, CIFAR, 10, by_number=True) == list(range(10))
    assert _outputs(SHORT, shown, 10) == [2, 1, 3, 4, 5, 6, 7, 0, 8, 9]  # by --class_names


def test_names_in_another_unicode_form_are_the_same():
    assert _outputs(("cafe\u0301", "tea"), ("tea", "caf\u00e9"), 2) == [1, 0]


def test_a_name_of_two_outputs_is_of_neither_but_both_are_reported():
    names = ("crane", "tench", "crane")
    assert _outputs(names, names, 3) == [0, 1, 2]
    assert _outputs(("tench",), names, 3) == [1]
    with pytest.raises(UserError, match="several outputs of the name crane"):
        _outputs(("tench", "crane"), names, 3)
    rates = report(Result(6, 0.5, 0.0, 1.0, 0.1, (1, 2, 3), (1, 0, 2)), names)["classes"]
    assert {name: rate["count"] for name, rate in rates.items()} == {
        "crane (0)": 1,
        "tench": 2,
        "crane (2)": 3,
    }


@pytest.mark.parametrize(
    ("theirs", "names", "by_number", "expected"),
    [
        (NUMBERS, NUMBERS, False, None),
        (
            *(NUMBERS, (), False),
            "0 is output 0, 1 is output 1, 2 is output 2 and 9 more; sorted as text, as torchvision"
            " does, output 2 is 10, not 2; if the outputs are in another order, pass --class_names",
        ),
        (
            *(("a1", "a10", "a2"), (), False),
            "a1 is output 0, a10 is output 1, a2 is output 2; sorted by the numbers in them, as "
            "timm does, output 1 is a2, not a10; if the outputs are",
        ),
        (
            *(("Bengal", "Sphynx", "beagle"), (), False),
            "output 2; sorted by the numbers in them, as timm does, output 0 is beagle, not Bengal",
        ),
        (CIFAR, (), False, "bird is output 2 and 7 more; if the outputs are in another order, "),
        (
            *(("ant", "bee"), ("x", "y"), True),
            "classes are matched by number: ant is output 0 (x), bee is output 1 (y)",
        ),
        (("5", "3"), (), True, "classes are matched by number: 5 is output 5, 3 is output 3"),
    ],
)
def test_what_is_not_matched_by_name_is_said(theirs, names, by_number, expected):
    said = []
    classes = len(names or theirs) if not by_number or names else 6
    as_outputs(_source(*theirs), names, classes, by_number=by_number, say=said.append)
    assert len(said) == (expected is not None)
    assert not said or expected in said[0]


@pytest.fixture
def numbered(tmp_path):
    """A folder with classes 0 to 11, whose images have 20 times that as pixels."""
    for label in range(12):
        (tmp_path / "val" / str(label)).mkdir(parents=True)
        image = Image.fromarray(np.full((8, 8, 3), 20 * label, np.uint8))
        image.save(tmp_path / "val" / str(label) / "0.png")
    return tmp_path


@pytest.fixture
def evaluate(numbered, monkeypatch, capsys):
    """Runs `eval` up to the computation; returns labels by true numbers, and what it said."""
    seen = {}

    def stop(networks, source, **settings):
        examples = [source[i] for i in range(len(source))]
        seen.update((e["image"].getpixel((0, 0))[0] // 20, int(e["label"])) for e in examples)
        raise UserError("enough")

    monkeypatch.setattr("resnet_flax.evaluation.pretrained.evaluate_pretrained", stop)

    def run(weights, *flags):
        seen.clear()
        assert main(["eval", str(weights), f"--data=folder:{numbered}", *flags]) == 2
        said = capsys.readouterr()
        assert bool(seen) == ("error: enough" in said.err)
        return dict(seen), said.out + said.err

    return run


def _weights(path, names):
    model = create_model("cifar_resnet8", num_classes=12)
    variables = drawn(model, jnp.zeros((1, 8, 8, 3)))
    export(Pretrained(model, variables, Preprocessing(0), names, "drawn"), path)
    return path


def test_eval_of_weights_without_names(numbered, evaluate):
    weights = _weights(numbered / "w.safetensors", ())
    for flags in ((), ("--by_number",)):
        labels, said = evaluate(weights, *flags)
        assert labels == dict(enumerate(range(12)))
        assert "classes are matched by number: 0 is output 0," in said
    file = numbered / "names.txt"
    file.write_text("\n".join(TEXT) + "\n")  # as of weights that torchvision's loader was used for
    labels, said = evaluate(weights, f"--class_names={file}")
    assert labels == {int(name): output for output, name in enumerate(TEXT)}
    assert "matched by number" not in said
    file.write_text("0\n1\n")
    assert "--class_names has 2 names, but " in evaluate(weights, f"--class_names={file}")[1]
    file.write_text("0\n\n1\n")
    assert "line 2 of " in evaluate(weights, f"--class_names={file}")[1]
    file.write_bytes(b"\xff")
    assert "is not UTF-8 text" in evaluate(weights, f"--class_names={file}")[1]


def test_eval_of_weights_whose_names_are_in_the_order_of_text(numbered, evaluate):
    """As those of checkpoints from when directories named by numbers were sorted as text."""
    weights = _weights(numbered / "w.safetensors", TEXT)
    for flags in ((), ("--by_number",)):
        labels, said = evaluate(weights, *flags)
        assert labels == {int(name): output for output, name in enumerate(TEXT)}
    nameless = _weights(numbered / "nameless.safetensors", ())
    labels, said = evaluate(weights, f"--ensemble={nameless}")
    assert f"{nameless} has no names of classes: its outputs are taken for the other's" in said
    other = _weights(numbered / "other.safetensors", NUMBERS)
    assert "have different classes; give an ensemble" in evaluate(weights, f"--ensemble={other}")[1]


def test_weights_with_names_that_break_lines_are_refused(numbered, evaluate):
    weights = _weights(numbered / "w.safetensors", ("\x1b[2J", *NUMBERS[1:]))
    _, said = evaluate(weights)
    assert "names of classes with line breaks or control characters" in said
