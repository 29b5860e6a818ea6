"""docs/reproduce.md's ImageNet commands from photographs to tables, with few images and steps."""

import json

import pytest

from resnet_flax.cli import main

# What differs from the real runs: the data, its amount, and the number of steps.
SMALL = (
    *("--config.data.eval_split=val", "--config.data.workers=0", "--config.steps=2"),
    *("--config.batch_size=32", "--config.optim.boundaries=1", "--config.log.tensorboard=false"),
    *("--config.data.size=64", "--config.data.jitter=(72,96)"),
    "--config.model.overrides=stage_sizes=(1,1,1,1) stage_features=(8,8,16,16) stem_features=8",
)


@pytest.fixture(scope="module")
def photographs(shared_data, tmp_path_factory):
    """Four original ImageNet photographs, one per class, for training and for validation."""
    root = tmp_path_factory.mktemp("imagenet")
    folders = sorted((shared_data / "imagenet_sample/train").iterdir())
    for split in ("train", "val"):
        for folder in folders[::100]:
            (root / split / folder.name).mkdir(parents=True)
            for number in range(9 if split == "train" else 1):
                for image in folder.iterdir():
                    (root / split / folder.name / f"{number}_{image.name}").symlink_to(image)
    return root


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.mark.long
@pytest.mark.parametrize(
    ("target", "only", "columns", "protocol"),
    [
        ("table2", "plain-18,ResNet-18 A", {"top-1"}, "ten_crop"),
        ("table3", "ResNet-34 C,ResNet-50", {"top-1", "top-5"}, "ten_crop"),
        ("table4", "ResNet-34 C,ResNet-50", {"top-1", "top-5"}, "multiscale"),
        ("table5", "ResNet (ILSVRC'15)", {"top-5"}, "multiscale"),
        ("figure4", "plain-18,ResNet-18", {"top-1"}, "center"),
    ],
)
def test_imagenet_targets_are_rehearsed(
    photographs, workdir, capsys, target, only, columns, protocol
):
    out, figure = workdir / f"{target}.json", workdir / f"{target}.png"
    # Table 4 uses the runs of table 3, figure 4 those of table 2.
    where = {"table4": "table3", "figure4": "table2"}.get(target, target)
    command = [
        *("reproduce", "run", target, f"--only={only}", f"--workdir={workdir / where}"),
        *(f"--out={out}", f"--config.data.source=folder:{photographs}", *SMALL),
    ]
    assert main([*command, *[f"--figure={figure}"] * (target == "figure4")]) == 0
    printed = capsys.readouterr().out
    assert "CHANGED" in printed
    # Another target's training is reused if the same worker ran it before.
    assert "all finished" not in printed or where != target
    for run in json.loads(out.read_text()):
        assert set(run["error"]) == columns
        assert all(0 <= error <= 100 for error in run["error"].values())
        assert run["protocol"] == protocol
    assert figure.exists() == (target == "figure4")


@pytest.mark.long
def test_the_usual_recipe_is_rehearsed(shared_data, workdir, capsys):
    """configs/imagenet.py on imagenette, evaluated in the middle and at several scales."""
    where = workdir / "usual"
    train = [
        *("train", "--config=configs/imagenet.py:resnet18", f"--workdir={where}"),
        f"--config.data.source=folder:{shared_data / 'imagenette'}",
        *("--config.data.eval_split=val", "--config.data.workers=0", "--config.steps=2"),
        *("--config.batch_size=32", "--config.optim.warmup_steps=1", "--config.data.size=64"),
        *("--config.optim.boundaries=1", "--config.log.tensorboard=false"),
        SMALL[-1] + " zero_init=True",
    ]
    assert main(train) == 0
    capsys.readouterr()
    assert main(["eval", str(where), "--protocol=multiscale", "--scales=64"]) == 0
    assert "of 400" in capsys.readouterr().out
