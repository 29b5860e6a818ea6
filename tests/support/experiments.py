"""A short run on digits."""

from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
# Five layers, one of them with a stride: little to trace and to compile.
TINY = "stage_sizes=1,1 stage_features=8,16 stem_features=8"


def short_run(data_dir: str):
    """Its config."""
    from resnet_flax.config import load_config

    config = load_config(str(ROOT / "configs" / "digits_resnet20.py"))
    config.data.data_dir = data_dir
    config.data.eval_batch_size = 128  # 360 test images: the last batch has 104
    config.model.name = "cifar_resnet8"
    config.model.overrides = TINY
    config.steps = 12
    config.optim.warmup_steps = 4
    config.eval.every = 4
    config.checkpoint.every = 4
    config.log.every = 2
    config.log.tensorboard = False
    return config


def final_digests(workdir: Path):
    """The step and the digests of the last checkpoint's leaves: equal if every bit is."""
    from resnet_flax.training.checkpoint import Checkpoints
    from resnet_flax.training.checkpoint_files import read_meta

    step = Checkpoints(workdir / "checkpoints", keep=1).steps()[0]
    return step, read_meta(workdir / "checkpoints" / str(step))["digests"]
