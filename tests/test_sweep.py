"""Several seeds, of which some diverge."""

import json
from types import SimpleNamespace

import pytest

from resnet_flax.cli import main
from resnet_flax.training.divergence import diverged


@pytest.fixture
def trained(monkeypatch):
    """Trains nothing: seeds below 10 have 0.02 more errors each, the others diverge."""
    seeds = []

    def run(config, workdir, stop):
        seeds.append(config.seed)
        assert workdir.name == f"seed{config.seed}"
        if config.seed >= 10:
            raise diverged(6, "loss nan", "start again")
        return SimpleNamespace(error=0.02 * config.seed, loss=1.0)

    monkeypatch.setattr("resnet_flax.sweep.run_experiment", run)
    return seeds


@pytest.mark.parametrize(
    ("seeds", "n", "printed", "said"),
    [
        ("1,3", 2, "test error: 4.00 ± 2.83 % (n = 2, highest 6.00)", ""),
        (
            "10,1,11,3",
            2,
            "test error: 4.00 ± 2.83 % (n = 2, highest 6.00, without seeds 10 and 11, which diver",
            "error: training diverged with seeds 10 and 11; see above for the step and the remedy",
        ),
        ("10", 0, "", "error: training diverged with seed 10; see above"),
    ],
)
def test_the_mean_is_that_of_the_seeds_that_finish(
    trained, tmp_path, capsys, seeds, n, printed, said
):
    out = tmp_path / "out.json"
    command = ["sweep", f"--seeds={seeds}", f"--workdir={tmp_path / 'runs'}", f"--out={out}"]
    assert main(command) == (2 if said else 0)
    assert trained == [int(seed) for seed in seeds.split(",")]
    shown = capsys.readouterr()
    assert printed in shown.out
    assert said in shown.err
    assert shown.err.count("\n") == bool(said)
    result = json.loads(out.read_text())
    assert result["n"] == len(result["error_percent"]) == n
    assert list(result["diverged"]) == [seed for seed in seeds.split(",") if int(seed) >= 10]
    for seed, reason in result["diverged"].items():
        assert "training diverged at step 6 (loss nan)" in reason
        assert f"warning: seed {seed}: training diverged at step 6" in shown.out
    assert (result["mean"] is None) == (n == 0)
