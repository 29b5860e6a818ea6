"""Every experiment in configs/ trains a few steps on available real images."""

import numpy as np
import pytest
from marks import long

from resnet_flax.apply.experiment import train
from resnet_flax.apply.tables import check
from resnet_flax.config import flatten, load_config
from resnet_flax.errors import UserError
from resnet_flax.models import VARIANTS, create_model
from resnet_flax.training.checkpoint_files import read_meta


def _short(path, **changes):
    config = load_config(path)
    config.update_from_flattened_dict(
        {
            "steps": 3,
            "optim.warmup_steps": 0,
            "batch_size": 16,
            "data.eval_batch_size": 40,
            "data.workers": 0,
            "eval.every": 0,
            "checkpoint.every": 0,
            "log.every": 1,
            **changes,
        }
    )
    return config


@pytest.mark.parametrize(
    "variant", ["resnet20", long("plain20"), long("resnet110"), long("resnet1202")]
)
def test_cifar10(shared_data, tmp_path, variant):
    # If running statistics do not fit the weights, six hundred blocks overflow.
    gentle = {"optim.learning_rate": 1e-4, "model.norm_momentum": 0.0}
    config = _short(
        f"configs/cifar10.py:{variant}",
        **{
            "data.data_dir": str(shared_data / "tfds"),
            "data.train_split": "train[:2000]",
            "data.eval_split": "test[:80]",
            "steps_per_dispatch": 2,
            # At full depth, which is slow to compile; scanned, it is the same network.
            "model.scan": variant in ("resnet110", "resnet1202"),
            **(gentle if variant == "resnet1202" else {}),
        },
    )
    result = train(config, tmp_path)
    assert result.count == 80
    assert np.isfinite(result.loss)
    meta = read_meta(tmp_path / "checkpoints" / "3")
    assert meta["class_names"][3] == "cat"
    mean = np.array(meta["preprocessing"]["pixel_mean"])
    assert mean.shape == (32, 32, 3)
    assert (np.abs(mean.mean((0, 1)) - [125, 123, 114]) < 5).all()


@pytest.mark.long
@pytest.mark.parametrize(
    ("path", "network"),
    [
        ("configs/imagenet_paper.py:resnet50_v1", "stage_sizes=1,1,1,1"),
        ("configs/imagenet_paper.py:resnet34_a", "stage_sizes=1,1,1,1"),
        ("configs/imagenet.py:resnet50", "stage_sizes=1,1,1,1 zero_init=True"),
    ],
)
def test_imagenet(shared_data, tmp_path, path, network):
    config = _short(
        path,
        **{
            "data.source": f"folder:{shared_data / 'imagenette'}",
            "data.eval_split": "val",
            "data.size": 64,
            "data.jitter": (72, 120),
            "model.overrides": network,
            "model.bn_group_size": "2",
        },
    )
    result = train(config, tmp_path)
    assert result.count == 400
    assert np.isfinite(result.loss)
    meta = read_meta(tmp_path / "checkpoints" / "3")
    assert meta["class_names"][0] == "n01440764"
    assert bool(meta["preprocessing"]["pixel_mean"]) == ("paper" in path)


# He et al. 2015, section 3.4.
PAPER = {
    "optim.momentum": 0.9,
    "optim.nesterov": False,
    "optim.schedule": "piecewise",
    "optim.learning_rate": 0.1,
    "optim.drop": 0.1,
    "optim.weight_decay": 1e-4,
    "optim.decay": "all",
    "optim.label_smoothing": 0.0,
    "data.pixel_mean": True,
    "data.flip": True,
    "data.policy": "none",
    "data.mixup": 0.0,
    "data.cutmix": 0.0,
    "data.erase": 0.0,
    "model.dtype": "float32",
}
CIFAR = PAPER | {  # section 4.2
    "batch_size": 128,
    "steps": 64_000,
    "optim.boundaries": (32_000, 48_000),
    "data.pad": 4,
    "data.pca_lighting": 0.0,
    "data.crop": "none",
}
RECIPES = {
    "cifar10.py:resnet56": CIFAR | {"optim.warmup_steps": 0},
    "cifar10.py:plain20": CIFAR | {"optim.warmup_steps": 0, "model.name": "cifar_plain20"},
    "cifar10.py:resnet110": CIFAR | {"optim.warmup_steps": 400, "optim.warmup_rate": 0.01},
    "imagenet_paper.py:resnet152_v1": PAPER
    | {
        "batch_size": 256,
        "steps": 600_000,
        "model.bn_group_size": "32",
        "optim.boundaries": (150_000, 300_000, 450_000),
        "data.crop": "jitter",
        "data.jitter": (256, 480),
        "data.size": 224,
        "data.pca_lighting": 0.1,
    },
    # Goyal et al. 2017, section 5.1, at a batch of 1,024.
    "imagenet.py:resnet50": {
        "batch_size": 1024,
        "steps": round(90 * 1_281_167 / 1024),
        "optim.learning_rate": 0.4,
        "optim.momentum": 0.9,
        "optim.nesterov": True,
        "optim.schedule": "piecewise",
        "optim.boundaries": tuple(round(e * 1_281_167 / 1024) for e in (30, 60, 80)),
        "optim.warmup_steps": round(5 * 1_281_167 / 1024),
        "optim.weight_decay": 1e-4,
        "optim.decay": "kernels",
        "data.crop": "random_resized",
        "data.size": 224,
        "data.crop_area": (0.08, 1.0),
        "data.flip": True,
    },
}


@pytest.mark.parametrize("path", RECIPES)
def test_recipes_are_those_of_the_papers(path):
    config = flatten(check(load_config(f"configs/{path}")))
    assert {key: config.get(key) for key in RECIPES[path]} == RECIPES[path]


def test_every_variant_resolves():
    from configs import cifar10, imagenet_paper

    for module in (cifar10, imagenet_paper):
        for network in module.NETWORKS:
            config = check(module.get_config(network))
            create_model(config.model.name)
    for name in VARIANTS:
        if not name.startswith(("cifar", "wrn")):
            config = check(load_config(f"configs/imagenet.py:{name}"))
            assert config.model.name == name


@pytest.mark.parametrize(
    ("path", "near"),
    [("cifar10.py:resnet21", "resnet20"), ("imagenet_paper.py:resnet50", "resnet50_v1")],
)
def test_unknown_variants_are_explained(path, near):
    with pytest.raises(UserError, match=rf"has no variant .*did you mean .*{near}"):
        load_config(f"configs/{path}")
