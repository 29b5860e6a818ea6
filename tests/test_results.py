"""What README and results/ claim agrees with itself and with the configs that stand here."""

import json
import statistics
from pathlib import Path

import pytest

from resnet_flax.config import default_config, flatten, load_config, resolve

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("name", "path", "seeds", "mean", "highest"),
    [
        ("digits_resnet20", "digits_resnet20.py", 5, 2.5, 3.5),
        ("cifar10_resnet20_quick", "cifar10.py:resnet20_quick", 2, 16.0, 17.0),
    ],
)
def test_a_result_is_of_the_config_that_stands_here_and_good_enough(
    name, path, seeds, mean, highest
):
    result = json.loads((ROOT / "results" / f"{name}.json").read_text())
    config = resolve(load_config(f"configs/{path}"))
    measured = default_config()  # a key that is newer than the result has its default there
    for key, value in flatten(result["config"]).items():
        measured.update_from_flattened_dict({key: value})
    assert flatten(measured) == flatten(config)
    errors = list(result["error_percent"].values())
    assert len(errors) == result["n"] == seeds
    assert round(statistics.mean(errors), 4) == result["mean"] <= mean
    assert round(statistics.stdev(errors), 4) == result["std"]
    assert max(errors) == result["max"] <= highest
    claim = f"{result['mean']:.2f} ± {result['std']:.2f} %"
    assert claim in (ROOT / "README.md").read_text()


@pytest.mark.parametrize(("depth", "errors"), [(20, 827), (56, 661)])
def test_published_weights_make_their_published_errors(depth, errors):
    result = json.loads((ROOT / "results" / f"published_cifar_resnet{depth}.json").read_text())
    top1 = result["top1_error"]
    assert abs(top1["errors"] - errors) <= 2
    assert top1["count"] == 10_000
    assert f"{100 * top1['rate']:.2f} %" in (ROOT / "README.md").read_text()
