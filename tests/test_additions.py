"""What users add from outside the package: every family at once, by commands and from Python."""

import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from resnet_flax import UserError, create_model, load
from resnet_flax.apply import tables
from resnet_flax.apply.experiment import make_run
from resnet_flax.cli import main
from resnet_flax.config import load_config
from resnet_flax.data.pipeline import eval_batches, train_batches
from resnet_flax.data.sources import SOURCES, Store
from resnet_flax.evaluation.metrics import METRICS, Metric
from resnet_flax.evaluation.result import Metrics
from resnet_flax.keys import Entry, Key
from resnet_flax.models.blocks import BLOCKS, ResidualBlock
from resnet_flax.models.layers import NORMS
from resnet_flax.tasks.classification import Classification
from resnet_flax.training.losses import LOSSES
from resnet_flax.training.optimizer import OPTIMIZERS, SCHEDULES, make_optimizer, make_schedule

SUPPORT = Path(__file__).parent / "support"
FILE = SUPPORT / "additions.py"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run by the command line, stopped nowhere; its workdir and its output."""
    workdir = tmp_path_factory.mktemp("additions") / "run"
    command = [sys.executable, "-m", "resnet_flax", "train", f"--config={FILE}"]
    done = subprocess.run(
        [*command, f"--workdir={workdir}"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return workdir, done.stdout


@pytest.fixture
def tables_as_they_were():
    """Additions of a test are taken out again."""
    all_tables = (BLOCKS, NORMS, OPTIMIZERS, SCHEDULES, LOSSES, METRICS, SOURCES)
    before = [dict(table) for table in all_tables]
    yield
    for table, entries in zip(all_tables, before, strict=True):
        table.clear()
        table.update(entries)


def _main(*arguments):
    done = subprocess.run(
        [sys.executable, "-m", "resnet_flax", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def test_a_run_of_what_a_user_added_learns_and_records_it(trained):
    workdir, said = trained
    result = json.loads((workdir / "result.json").read_text())
    assert result["count"] == 512
    assert result["errors"] < 0.2 * 512  # chance is half; the bars are easy
    assert 0.5 < result["mean_confidence"] <= 1
    assert "bars:made" in said
    config = json.loads((workdir / "config.json").read_text())
    assert (config["optim.lion_beta"], config["optim.focal_gamma"]) == (0.95, 2.0)
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert records[-1]["mean_confidence"] == result["mean_confidence"]
    rates = [r["learning_rate"] for r in records if r["split"] == "train"]
    np.testing.assert_allclose(rates[0], 0.01 / np.sqrt(10), rtol=1e-6)


def test_it_continues_and_its_keys_are_compared(trained):
    workdir, _ = trained
    status, said = _main("train", f"--config={FILE}", f"--workdir={workdir}")
    assert status == 0
    assert "is finished at step 40" in said
    status, said = _main(
        "train", f"--config={FILE}", f"--workdir={workdir}", "--config.optim.lion_beta=0.8"
    )
    assert status == 2
    assert "optim.lion_beta is 0.8 but was 0.95" in said


@pytest.mark.usefixtures("tables_as_they_were")
def test_its_network_is_loaded_where_its_block_is_known(trained):
    workdir, _ = trained
    BLOCKS.pop(("one", False), None)
    message = "block must be one of basic, bottleneck, not 'one'; if its block .* your own, import"
    with pytest.raises(UserError, match=message):
        load(workdir)
    load_config(str(FILE))
    assert load(workdir).class_names == ("vertical", "horizontal")


@pytest.mark.usefixtures("tables_as_they_were")
def test_it_is_evaluated_on_its_own_data_with_its_own_metric(trained, tmp_path):
    """By the command, in a program that has imported the file."""
    workdir, _ = trained
    load_config(str(FILE))
    for number, data in enumerate(([], ["--data=bars:made", "--split=test"])):
        out = tmp_path / f"{number}.json"
        assert main(["eval", str(workdir), *data, "--metrics=mean_confidence", f"--out={out}"]) == 0
        found, result = (json.loads(file.read_text()) for file in (out, workdir / "result.json"))
        error = found["top1_error"]
        assert (error["count"], error["errors"]) == (512, result["errors"])
        np.testing.assert_allclose(
            found["metrics"]["mean_confidence"], result["mean_confidence"], rtol=1e-5
        )


def _checked(config, setting):
    tables.override(config, [setting])
    return tables.check(config)


@pytest.mark.usefixtures("tables_as_they_were")
@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("optim.lion_beta=1.5", "optim.lion_beta must be at least 0 and less than 1, not 1.5"),
        ("optim.optimizer=lino", "must be one of sgd, lion, not 'lino'; did you mean lion?"),
        ("optim.loss=mse", "optim.loss must be one of cross_entropy, focal, not 'mse'"),
        ("eval.metrics=recall", "eval.metrics must be one of balanced_error, mean_confidence"),
        ("data.source=bar:x", "must be one of tfds, folder, bars, not 'bar:x'; did you"),
        ("model.overrides=norm=rsm", "norm in model.overrides must be one of batch, group, rms"),
        ("model.overrides=block=two", "must be one of basic, bottleneck, one, not 'two'"),
        ("model.overrides=block=one preactivation=true", "block='one' has no pre-activation"),
        ("model.overrides=dtype=float64", "model.overrides cannot set dtype"),
    ],
)
def test_values_that_do_not_fit_are_explained(setting, message):
    config = load_config(str(FILE))
    with pytest.raises(UserError) as raised:
        _checked(config, setting)
    assert message in str(raised.value)


@pytest.mark.usefixtures("tables_as_they_were")
def test_two_entries_cannot_declare_a_key_differently():
    LOSSES["other"] = Entry(lambda optim: None, {"optim.momentum": Key(0.5, "Another.")})
    with pytest.raises(UserError, match=r"optim\.momentum of 'other' is declared by another entry"):
        tables.keys()
    LOSSES["other"] = Entry(lambda optim: None, {"optim.learning_rate": Key(0.5, "Another.")})
    with pytest.raises(UserError, match=r"there is a config key optim\.learning_rate already"):
        tables.keys()


def _quadratic(optim):
    return lambda logits, targets: ((logits - jax.nn.one_hot(targets, 3)) ** 2).sum(1)


DECLARED = """
from resnet_flax.keys import POSITIVE, Entry, Key, Tables

def of(make, *keys):
    return Entry(make, dict(keys))

for entry in (
    max,
    of(max, ("optim.x", 1.0)),
    of(max, ("x", Key(1.0, "X."))),
    of(max, ("optim.x", Key(None, "X."))),
    of(max, ("optim.x", Key(0.0, "X.", POSITIVE))),
    of(max, ("optim.x", Key(0.0, "X.", abs))),
):
    try:
        Tables({"optim.loss": {"own": entry}}).keys()
    except ValueError as error:
        print(error)
"""


def test_entries_that_are_none_are_explained():
    """In a process without the checks of types by which tests run."""
    said = subprocess.run([sys.executable, "-c", DECLARED], capture_output=True, text=True).stdout
    for line, expected in zip(
        said.splitlines(),
        (
            "'own', which optim.loss could choose, is a builtin_function_or_method and not a "
            "resnet_flax.keys.Entry; write Entry(...) around it",
            "'optim.x' of 'own' is declared by 1.0; write Key(default, meaning)",
            "'x' of 'own' must be of the form GROUP.NAME, such as 'optim.beta'",
            "has the default None; it must be a bool, int, float, str or tuple",
            "the default of the config key 'optim.x' of 'own' must be more than 0, not 0.0",
            "a rule is a function and what it asks for in words",
        ),
        strict=True,
    ):
        assert expected in line


class Uncalled(ResidualBlock):
    """A block without __call__."""


class Unnormed(nn.Module):
    """A normalization without the arguments of one."""

    @nn.compact
    def __call__(self, x):
        return x


@pytest.mark.usefixtures("tables_as_they_were")
@pytest.mark.parametrize(
    ("table", "name", "entry", "message"),
    [
        (BLOCKS, ("own", False), nn.Dense, "it must be a class that is derived from resnet_flax"),
        (BLOCKS, ("own", False), Uncalled, "and has __call__"),
        (BLOCKS, "own", Uncalled, "BLOCKS has the entry 'own'; a block is named by its `block`"),
        (NORMS, "own", nn.LayerNorm, "the normalization 'own' does not fit"),
        (NORMS, "own", lambda network: nn.LayerNorm, "the normalization 'own' does not fit"),
        (NORMS, "own", lambda network: Unnormed, "the normalization 'own' does not fit"),
        (NORMS, "own", lambda network: None, "the normalization 'own' does not fit"),
    ],
)
def test_parts_of_networks_that_are_none_are_explained(table, name, entry, message):
    table[name] = entry
    part = "block" if table is BLOCKS else "norm"
    with pytest.raises(UserError) as raised:
        create_model("cifar_resnet8", **{part: "own"})
    assert message in str(raised.value)


class Dropping(ResidualBlock):
    """A block with dropout."""

    @nn.compact
    def __call__(self, x, train):
        x = self.conv(self.features, (1, 1), name="conv")(x)
        return nn.Dropout(0.5, deterministic=not train)(x)


@pytest.mark.usefixtures("tables_as_they_were")
def test_random_numbers_in_a_loop_over_blocks_are_explained():
    BLOCKS["own", False] = Dropping
    sizes = {"stage_sizes": (3,), "stage_features": (4,), "stem_features": 4}
    x, rngs = jnp.ones((2, 8, 8, 3)), {"dropout": jax.random.key(0)}
    for scan in (False, True):
        model = create_model("cifar_resnet8", block="own", scan=scan, **sizes)
        variables = model.init(jax.random.key(0), x, train=False)

        def train(model=model, variables=variables):
            return model.apply(variables, x, train=True, rngs=rngs, mutable=["batch_stats"])

        if scan:
            with pytest.raises(UserError, match=r"'own' draws random numbers, .* give scan=False"):
                train()
        else:
            train()


def _loss(loss):
    model = create_model(
        *("cifar_resnet8",), stage_sizes=(1,), stage_features=(4,), stem_features=4, num_classes=3
    )
    task = Classification(model, max, max, loss, Metrics(3))
    batch = {
        "image": jnp.ones((4, 8, 8, 3)),
        "target": jnp.zeros(4, int),
        "label": jnp.zeros(4, int),
        "mask": jnp.ones(4, bool),
    }

    def of(key):
        variables = model.init(key, batch["image"], train=False)
        return task.loss_fn(variables["params"], variables["batch_stats"], batch, key, 0)[0]

    return jax.eval_shape(of, jax.random.key(0))


@pytest.mark.parametrize(
    ("loss", "was"),
    [
        (lambda logits, targets: logits[:, :1], r"float32 \[4, 1\]"),  # would broadcast
        (lambda logits, targets: logits.mean(), r"float32 \[\]"),
        (lambda logits, targets: logits.argmax(1), r"int32 \[4\]"),  # would have no gradient
        (lambda logits, targets: None, "a NoneType"),
    ],
)
def test_a_loss_of_another_shape_is_explained(loss, was):
    assert _loss(lambda logits, targets: logits[:, 0]).shape == ()
    with pytest.raises(UserError, match=rf"the loss of logits \[4, 3\] is {was}; a loss must"):
        _loss(loss)


@pytest.mark.usefixtures("tables_as_they_were")
def test_optimizers_and_schedules_that_are_none_are_explained():
    config = load_config(str(FILE))
    OPTIMIZERS["own"] = Entry(lambda optim, schedule: schedule)
    SCHEDULES["own"] = Entry(lambda optim, steps: 0.1)
    config.optim.optimizer = config.optim.schedule = "own"
    with pytest.raises(UserError, match=r"the schedule 'own' makes 0\.1; it must make a function"):
        make_schedule(config.optim, 10)
    with pytest.raises(UserError, match=r"the optimizer 'own' makes .* an optax transformation"):
        make_optimizer(config.optim, lambda step: 0.1)


class Sum(Metric):
    """A metric whose value is what `value` makes of the sum of losses."""

    def __init__(self, value, of_example=lambda loss: loss.sum()):
        self.value, self.of_example = value, of_example

    def of_batch(self, outputs):
        return {"sum": self.of_example(outputs.loss)}

    def compute(self, state):
        return self.value(state["sum"])


def _measured(metric, name="own"):
    measures = Metrics(3, more={name: metric})
    states = measures.add(measures.zeros(), jnp.eye(3), jnp.arange(3), jnp.ones(3, bool))
    return measures.result(states, 3, 3).more[name]


def test_a_metric_is_a_number_several_or_none():
    assert _measured(Sum(lambda total: total * 0 + 1)) == 1  # of NumPy
    assert _measured(Sum(lambda total: np.full(2, 1.5))) == [1.5, 1.5]
    assert _measured(Sum(lambda total: None)) is None


class Incomplete(Metric):
    """A metric without compute."""

    def of_batch(self, outputs):
        return {"sum": outputs.loss.sum()}


@pytest.mark.parametrize(
    ("metric", "name", "message"),
    [
        (Incomplete(), "own", "the metric 'own' is not complete: METRICS['own'] must be an object"),
        (Incomplete, "own", "the metric 'own' is not complete"),
        (Sum(float), "loss", "a metric cannot be called 'loss', which results have already"),
        (Sum(lambda total: float("nan")), "own", "'own' is nan; compute must return a finite"),
        (Sum(lambda total: object()), "own", "compute must return a finite number, a list"),
        (Sum(np.mean, lambda loss: loss), "own", "of_batch must return arrays whose shapes do not"),
    ],
)
def test_metrics_that_are_none_are_explained(metric, name, message):
    with pytest.raises(UserError) as raised:
        _measured(metric, name)
    assert message in str(raised.value)


class Own:
    """A user's data source, with what a case changes."""

    class_names: tuple = ("a", "b")

    def __init__(self, label=0, image=None, **changes):
        self.example = {"image": np.zeros((8, 8, 3), np.uint8) if image is None else image}
        self.example |= {} if label is None else {"label": label}
        for name, value in changes.items():
            setattr(self, name, value)

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return self.example


@pytest.mark.usefixtures("tables_as_they_were")
@pytest.mark.parametrize(
    ("source", "message"),
    [
        (None, "own:x is not a data source: its NoneType has no class_names and no __len__"),
        (Own(class_names=()), "class_names of own:x must be a tuple of strings, one for each"),
        (Own(class_names="ab"), "class_names of own:x must be a tuple of strings"),
        (Own(example=(1, 2)), "examples must be dicts with 'image' and 'label', not a tuple"),
        (Own(None), "examples must be dicts with 'image' and 'label', not a dict of 'image'"),
        (Own(2), "an example has the label 2; labels must be whole numbers from 0 to 1"),
        (Own(-1), "an example has the label -1; labels must be"),
        (Own(0.5), "an example has the label 0.5; labels must be"),
        (Own(image=np.ones((8, 8, 3))), "an image is float64 [8, 8, 3]; images must be Pillow"),
        (Own(fingerprint=lambda: "v1"), "fingerprint of Own must return a dict of JSON, such as"),
    ],
)
def test_data_sources_that_are_none_are_explained(source, message):
    SOURCES["own"] = Store(lambda where, split, class_names: source)
    config = tables.default_config()
    config.data.source, config.batch_size = "own:x", 8
    with pytest.raises(UserError) as raised:
        make_run(tables.check(config))
    assert message in str(raised.value)


def test_labels_are_checked_in_each_batch():
    """A data set is only sampled before a training."""
    source = Own(5)
    for batches in (
        eval_batches(source, batch_size=4),
        train_batches(source, seed=0, batch_size=4),
    ):
        with pytest.raises(UserError, match="an example has the label 5"), batches as given:
            next(given)


@pytest.mark.usefixtures("tables_as_they_were")
def test_networks_of_added_blocks_and_norms_are_networks_as_others():
    load_config(str(FILE))
    model = create_model("cifar_resnet8", block="one", norm="rms", shortcut="C", num_classes=3)
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    variables = model.init(jax.random.key(1), x, train=False)
    assert set(variables) == {"params"}  # RMSNorm has no running statistics
    assert set(variables["params"]["stage2_block1"]) == {"conv1", "norm1", "shortcut"}
    gradient = jax.grad(lambda p: model.apply({"params": p}, x, train=True).sum())(
        variables["params"]
    )
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))


def test_the_diffs_of_the_documentation_are_lines_of_this_addition():
    """docs/architecture.md shows each as a diff; the file that is run has the same code."""
    text = (Path(__file__).parent.parent / "docs" / "architecture.md").read_text()
    code = re.sub(r"\s", "", FILE.read_text()).replace(",)", ")").replace(",}", "}")
    blocks = re.findall(r"```diff\n(.*?)```", text, re.S)
    assert len(blocks) == 6
    for block in blocks:
        for line in block.splitlines():
            wanted = re.sub(r"\s", "", line.removeprefix("+")).removesuffix(",")
            assert wanted in code or wanted == "...", line
