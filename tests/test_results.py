"""README, docs/ and results/ are consistent with each other and with the configs."""

import importlib
import json
import re
import statistics
from pathlib import Path

import numpy as np
import pytest

from resnet_flax.apply.tables import check, default_config
from resnet_flax.config import flatten, load_config
from resnet_flax.paper.table import of_row
from resnet_flax.paper.targets import TARGETS
from resnet_flax.renamed import saved_config

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
TABLES = (ROOT / "docs" / "results.md").read_text()
SPEED = (ROOT / "docs" / "speed.md").read_text()


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
    config = check(load_config(f"configs/{path}"))
    measured = default_config()  # keys newer than the result have their defaults
    for key, value in saved_config(flatten(result["config"])).items():
        measured.update_from_flattened_dict({key: value})
    assert flatten(check(measured)) == flatten(config)
    errors = list(result["error_percent"].values())
    assert len(errors) == result["n"] == seeds
    assert round(statistics.mean(errors), 4) == result["mean"] <= mean
    assert round(statistics.stdev(errors), 4) == result["std"]
    assert max(errors) == result["max"] <= highest
    claim = f"{result['mean']:.2f} ± {result['std']:.2f} %"
    assert claim in TABLES


@pytest.mark.parametrize(("depth", "errors"), [(20, 827), (56, 661)])
def test_published_weights_make_their_published_errors(depth, errors):
    result = json.loads((ROOT / "results" / f"published_cifar_resnet{depth}.json").read_text())
    top1 = result["top1_error"]
    assert abs(top1["errors"] - errors) <= 2
    assert top1["count"] == 10_000
    assert f"{100 * top1['rate']:.2f} %" in TABLES
    if depth == 56:
        assert f"[{100 * top1['rate']:.2f} %](results/published_cifar_resnet56.json)" in README


@pytest.mark.parametrize(
    ("name", "at_most"),
    [
        ("published_cifar_resnet20_flips", 7.6),
        ("published_cifar_resnet56_flips", 6.1),
        ("published_cifar_ensemble", 6.3),
        ("published_cifar_resnet20_multiscale", 12.0),
    ],
)
def test_protocols_on_published_weights_say_what_the_page_says(name, at_most):
    result = json.loads((ROOT / "results" / f"{name}.json").read_text())
    assert result["top1_error"]["count"] == 10_000
    error = 100 * result["top1_error"]["rate"]
    assert error < at_most
    assert f"{error:.2f} %" in TABLES


def test_deeper_published_networks_respond_less():
    runs = json.loads((ROOT / "results" / "figure7_published.json").read_text())
    median = {run["row"]: statistics.median(run["responses"]) for run in runs}
    assert median["ResNet-56"] < median["ResNet-20"]
    claim = f"median {median['ResNet-20']:.2f} (ResNet-20), {median['ResNet-56']:.2f} (ResNet-56)"
    assert claim in TABLES


def test_tpu_s_compiler_reduces_no_large_gradient_whole_under_fsdp():
    rows = json.loads((ROOT / "results" / "tpu_ahead_of_time.json").read_text())
    found = {(row["topology"], row["mesh"]["fsdp"]): row for row in rows}
    assert set(found) == {("v5e:2x4", 1), ("v5e:2x4", 8), ("v5e:16x16", 1), ("v5e:16x16", 8)}
    for (_, fsdp), row in found.items():
        held, moved = row["bytes_per_chip"]["arguments"], row["collectives"]
        largest = 3 * 3 * 512 * 512  # elements of a kernel
        if fsdp == 1:
            assert moved["all-reduce"]["largest"] == largest
            assert moved["all-reduce"]["bytes"] > 2 * row["parameters"]
        else:
            assert moved["all-reduce"]["largest"] <= largest / fsdp
            assert held < 0.25 * found["v5e:2x4", 1]["bytes_per_chip"]["arguments"]
    scaling = (ROOT / "docs" / "scaling.md").read_text()
    for row in rows:
        assert f"{row['bytes_per_chip']['scratch'] / 1e9:.2f} GB" in scaling


def test_depth_makes_plain_networks_worse_and_residual_ones_not():
    for name, seeds in (("degradation_digits", 3), ("degradation_cifar10", 1)):
        runs = json.loads((ROOT / "results" / f"{name}.json").read_text())
        assert all(run["changed"] == [] for run in runs)
        errors = {
            row.name: [run["error"]["top-1"] for run in of_row(runs, row)]
            for row in TARGETS[name].rows
        }
        assert min(errors["plain-56"]) > 2 * max(errors["plain-20"])
        for row, of_seeds in errors.items():
            assert len(of_seeds) == seeds
            spread = f" ± {statistics.stdev(of_seeds):.2f}" if seeds > 1 else ""
            error = f"{statistics.mean(of_seeds):.2f}{spread} %"
            assert f"{row} {error}" in TABLES
            if name == "degradation_digits" and row.endswith("-56"):
                assert f"{'plain' if 'plain' in row else 'residual'}: {error}" in README
        assert max(errors["ResNet-56"]) < 1.5 * max(errors["plain-20"])


@pytest.mark.parametrize("name", ["figure7_digits", "figure7_cifar10"])
def test_responses_of_small_networks_are_what_the_page_says(name):
    runs = json.loads((ROOT / "results" / f"{name}.json").read_text())
    for row in TARGETS[name].rows:
        medians = [f"{statistics.median(run['responses']):.2f}" for run in of_row(runs, row)]
        assert f"{row.name} {' '.join(medians)}" in TABLES


def test_speed_is_what_the_docs_say(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    ratio = importlib.import_module("train_step").ratio
    rows = json.loads((ROOT / "results" / "train_step.json").read_text())
    for row in rows:
        assert re.fullmatch("[0-9a-f]{40}", row["commit"])
        line = f"| {row['network']}, {row['what']}, batch {row['batch']} |"
        for name, side in row["sides"].items():
            if "error" in side:
                line += " failed |"
                continue
            line += f" {statistics.median(side['images_per_second']):,.1f}"
            if name != "ours":
                over = side["ours_by_this"]
                line += f" ({ratio(over)}, {min(over):.2f} to {max(over):.2f})"
            line += " |"
        assert line in SPEED


def test_a_gpu_trains_as_fast_as_was_aimed_for():
    rows = json.loads((ROOT / "results" / "train_step.json").read_text())
    gpu = [row for row in rows if "H200" in row["device"]]
    newest = {(row["network"], row["what"]): row["sides"] for row in gpu}
    resnet50 = newest["resnet50", "train"]
    over_torch = resnet50["torch_compile:default"]["ours_by_this"]
    assert min(over_torch) > 1.2
    rate = statistics.median(resnet50["ours"]["images_per_second"])
    assert rate > 7940  # MLPerf 4.0's, per GPU
    times = f"{statistics.median(over_torch):.2f} times `torch.compile`"
    assert f"[{rate:,.0f}](results/train_step.json); {times}" in README
    rate = statistics.median(newest["cifar_resnet20", "resident"]["ours"]["images_per_second"])
    seconds = 64_000 * 128 / rate
    assert seconds < 60
    assert f"[{seconds:.1f} s](results/train_step.json)" in README
    assert f"64,000 steps of ResNet-20 take {seconds:.1f} s" in SPEED


def test_a_cpu_trains_as_fast_as_torch():
    rows = json.loads((ROOT / "results" / "train_step.json").read_text())
    ratios = [
        statistics.median(row["sides"]["torch_last"]["ours_by_this"])
        for row in rows
        if (row["network"], row["what"], row["dtype"]) == ("resnet50", "train", "float32")
        and "cpu" in row["device"]
    ]
    assert len(ratios) == 3  # processors
    times = f"{min(ratios):.2f} to {max(ratios):.2f} times"
    assert f"[{times}](results/train_step.json) its rate, on three processors" in README


def test_what_was_run_of_table_6_is_what_the_pages_say():
    runs = json.loads((ROOT / "results" / "table6.json").read_text())
    (row,) = [row for row in TARGETS["table6"].rows if row.name == "ResNet-20"]
    (run,) = of_row(runs, row)
    assert run["changed"] == ["model.dtype=bfloat16"]
    assert run["curve"]["test"][-1] == [64_000, run["error"]["top-1"]]
    assert run["error"]["top-1"] < 9.5
    error = f"{run['error']['top-1']:.2f} %"
    assert f"| {error} (852 of 10,000; seed 0, n = 1) |" in TABLES
    assert f"[{error}](results/table6.json) (seed 0, n = 1)" in README


def test_a_start_from_the_cache_takes_seconds():
    seconds = json.loads((ROOT / "results" / "start.json").read_text())["seconds"]
    assert max(seconds["digits_warm"]) < 10
    assert max(seconds["resnet152_compiles"]) < 60
    for values in seconds.values():
        assert ", ".join(map(str, values)) in SPEED


def test_rematerialisation_halves_what_a_chip_holds():
    rows = json.loads((ROOT / "results" / "tpu_memory.json").read_text())
    scratch = {tuple(row["settings"]): row["bytes_per_chip"]["scratch"] for row in rows}
    assert {row["batch_size"] for row in rows} == {8 * 256}
    assert scratch["model.remat=1",] < scratch[()] / 2
    assert all(f"{size / 1e9:.2f} GB" in SPEED for size in scratch.values())


def test_a_gpu_s_program_is_what_the_docs_say():
    rows = json.loads((ROOT / "results" / "gpu_ahead_of_time.json").read_text())
    scratch = {
        tuple(row["settings"]): row["scratch_bytes"] for row in rows if row["network"] == "resnet50"
    }
    assert scratch["model.remat=1",] < 0.55 * scratch[()]
    assert scratch[()] < 8e9  # 10.8 if outputs of widening convolutions were saved
    assert all(f"{size / 1e9:.2f} GB" in SPEED for size in scratch.values())
    assert all(re.fullmatch("[0-9a-f]{40}", row["commit"]) for row in rows)
    # ReLU's masks and maps in float32 would add half as much.
    (plain,) = [row for row in rows if row["network"] == "resnet50" and not row["settings"]]
    assert plain["moved_bytes"] < 90e9


@pytest.mark.parametrize("axis", ["depth", "batch", "pixels"])
def test_cost_grows_in_a_straight_line(axis):
    rows = json.loads((ROOT / "results" / "growth.json").read_text())
    points = [(row["at"], statistics.median(row["seconds"])) for row in rows if row["axis"] == axis]
    at, seconds = zip(*sorted(points), strict=True)

    def misses(costs):
        """The largest relative distance of a cost from the straight line that fits best."""
        line = np.polyfit(at, costs, 1, w=1 / np.array(costs))
        return np.abs(np.polyval(line, at) / np.array(costs) - 1).max()

    assert misses(seconds) < 0.15 < misses([x**1.5 for x in at])
