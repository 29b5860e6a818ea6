"""The config keys that every experiment has, with their default, type, range and meaning.

Optimizers, schedules, losses and data sources add keys of their own, see `apply.tables`.
"""

from resnet_flax.errors import UserError
from resnet_flax.keys import (
    CHANNELS,
    COUNT,
    FRACTION,
    NOT_NEGATIVE,
    PIXELS,
    POSITIVE,
    PROBABILITY,
    SEED,
    SHARE,
    SIDES,
    STEPS,
    Key,
    Tables,
    one_of,
)

# What model.overrides can set; the other fields of resnet_flax.ResNet have keys of their own.
NETWORK_FIELDS = (
    *("stage_sizes", "stage_features", "stem_features", "block", "shortcut", "stride_on"),
    *("preactivation", "groups", "width_per_group", "se_ratio", "se_divisor"),
    *("stem", "stem_norm", "stem_bias", "stem_pool", "avg_down"),
    *("norm", "norm_unbiased", "zero_init", "output_stride", "implementation"),
)

_DEVICES = (lambda value: value > 0 or value == -1, "a number of devices, or -1")
_RANGE = (
    lambda value: len(value) == 2 and 0 < value[0] <= value[1],
    "two numbers more than 0, the first not more than the second",
)
_SCALES = (lambda value: min(value, default=0) > 0, "one or more numbers, each more than 0")
_NUMBERS = (lambda value: len(value) > 0, "one or more numbers")
_SPAN = (
    lambda value: (
        value in ("global", "device") or (value.isdecimal() and len(value) < 10 and int(value) > 0)
    ),
    "global, device or a number of examples",
)

SCHEMA: dict[str, Key] = {
    "seed": Key(0, "Seed of the initialization, the data order and the augmentation.", SEED),
    "init": Key(
        "",
        "Weights to start from: a published name, a weights file or a workdir; empty for random "
        "ones.",
    ),
    "steps": Key(1000, "Training steps in all.", COUNT, True),
    "batch_size": Key(128, "Training examples in each step, over all devices.", POSITIVE),
    "accumulation": Key(
        1, "Microbatches of a batch, whose gradients are computed one after another.", POSITIVE
    ),
    "steps_per_dispatch": Key(
        1, "Steps per dispatch to the device; more than 1 needs data.resident.", COUNT, True
    ),
    "model.name": Key("cifar_resnet20", "Name of the network; resnet-flax models lists them."),
    "model.overrides": Key(
        "",
        "Changes to the network in one string, such as 'shortcut=C stem=deep'. Keys: "
        f"{', '.join(NETWORK_FIELDS)}.",
    ),
    "model.scan": Key(
        False, "Loop over stacked blocks, so that thousands of layers compile in seconds."
    ),
    "model.remat": Key(
        0,
        "Blocks in a group for rematerialization: only the group's input is stored and the rest "
        "computed again in the backward pass; 0 stores everything.",
        NOT_NEGATIVE,
        True,
    ),
    "model.dtype": Key(
        "float32",
        "Type of the computation, float32 or bfloat16; parameters stay float32.",
        one_of("float32", "bfloat16"),
    ),
    "model.bn_group_size": Key(
        "global",
        "What batch normalization averages over: global, device or a number of examples.",
        _SPAN,
    ),
    "model.norm_momentum": Key(
        0.9, "Fraction of the running statistics that each step keeps.", FRACTION
    ),
    "data.source": Key("tfds:digits", "Data set: tfds:NAME or folder:DIR."),
    "data.in_memory": Key(False, "Decode all images once and keep them in memory.", None, True),
    "data.resident": Key(False, "Keep the training images on the devices.", None, True),
    "data.train_split": Key("train", "Split to train on."),
    "data.holdout": Key(
        0.0,
        "Fraction of data.train_split that is held out from training as the split 'holdout'.",
        FRACTION,
    ),
    "data.eval_split": Key(
        "test",
        "Split to evaluate on; 'holdout' is the part held out by data.holdout.",
        None,
        True,
    ),
    "data.eval_batch_size": Key(
        0, "Examples in a batch of the evaluation; 0 for batch_size.", NOT_NEGATIVE, True
    ),
    "data.workers": Key(0, "Processes that read images; 0 reads in threads.", NOT_NEGATIVE, True),
    "data.timeout": Key(
        300.0,
        "Seconds to wait for a batch before the run saves and stops; 0 for no limit.",
        NOT_NEGATIVE,
        True,
    ),
    "data.accept_changes": Key(
        False,
        "Continue a run even if its images or classes have changed since it began.",
        None,
        True,
    ),
    "data.crop": Key(
        "none",
        "Crop of a training image: none, jitter (the paper's) or random_resized.",
        one_of("none", "jitter", "random_resized"),
    ),
    "data.size": Key(0, "Side of the crops in pixels; 0 uses images as they are.", PIXELS),
    "data.early_sizes": Key(
        (), "Sides of earlier training images in pixels, before data.size.", SIDES
    ),
    "data.early_steps": Key((), "Steps at which training switches to the next size.", STEPS),
    "data.jitter": Key(
        (256, 480), "Range of the shorter side before the crop jitter, in pixels.", _RANGE
    ),
    "data.crop_area": Key(
        (0.08, 1.0), "Range of the area of a random crop, as a fraction of the image.", _RANGE
    ),
    "data.crop_ratio": Key(
        (3 / 4, 4 / 3), "Range of the aspect ratio of a random crop, width by height.", _RANGE
    ),
    "data.eval_size": Key(
        0, "Side of the evaluation's center crop in pixels; 0 for data.size.", PIXELS
    ),
    "data.crop_fraction": Key(
        0.875, "Side of the evaluation's crop as a fraction of the resized shorter side.", SHARE
    ),
    "data.interpolation": Key(
        "bilinear", "Filter of resizing: bilinear or bicubic.", one_of("bilinear", "bicubic")
    ),
    "data.exif": Key(
        "auto",
        "Turn images upright as their EXIF orientation says: on, off, or auto, which is on for "
        "folder:DIR and off for other data.",
        one_of("auto", "off", "on"),
        former="off",
    ),
    "data.alpha": Key(
        "auto",
        "Transparent pixels: white shows them on white, drop ignores the alpha channel, error "
        "refuses the image; auto is white for folder:DIR and drop for other data.",
        one_of("auto", "drop", "white", "error"),
        former="drop",
    ),
    "data.channels": Key(
        0,
        "Convert images to 1 channel (grey), 3 (RGB) or 4 (RGB and alpha); 0 for the data's own.",
        CHANNELS,
    ),
    "data.policy": Key(
        "none",
        "Augmentation by random operations: none, randaugment or trivialaugment.",
        one_of("none", "randaugment", "trivialaugment"),
    ),
    "data.policy_operations": Key(2, "Number of randaugment's operations on an image.", POSITIVE),
    "data.policy_magnitude": Key(
        9,
        "Magnitude of randaugment's operations, from 0 to 30.",
        (lambda n: 0 <= n <= 30, "0 to 30"),
    ),
    "data.repeats": Key(
        1, "Times that each example occurs in a batch, augmented differently each time.", POSITIVE
    ),
    "data.mean": Key(
        (0.0,),
        "Mean that is subtracted from pixels in [0, 1]: one number, or one for each channel.",
        _NUMBERS,
    ),
    "data.std": Key(
        (1.0,),
        "Standard deviation by which they are then divided: one number, or one for each channel.",
        _SCALES,
    ),
    "data.pixel_mean": Key(False, "Subtract the mean training image instead of data.mean."),
    "data.pad": Key(
        0, "Black pixels on each side before a random crop of the original size.", PIXELS
    ),
    "data.flip": Key(False, "Mirror half of the training images left to right."),
    "data.pca_lighting": Key(
        0.0,
        "Standard deviation of the shift along the principal components of color.",
        NOT_NEGATIVE,
    ),
    "data.erase": Key(
        0.0, "Probability that a rectangle of a training image is erased.", PROBABILITY
    ),
    "data.mixup": Key(0.0, "Alpha of the Beta distribution of mixup; 0 for none.", NOT_NEGATIVE),
    "data.cutmix": Key(0.0, "Alpha of the Beta distribution of CutMix; 0 for none.", NOT_NEGATIVE),
    "optim.learning_rate": Key(0.1, "Learning rate; where it varies, the highest.", POSITIVE),
    "optim.optimizer": Key("sgd", "Optimizer; its settings are keys below."),
    "optim.schedule": Key("cosine", "Learning rate schedule; its settings are keys below."),
    "optim.warmup_steps": Key(
        0, "Steps of warm-up, in which the rate increases linearly from 0.", NOT_NEGATIVE
    ),
    "optim.warmup_rate": Key(
        0.0, "Constant rate during the warm-up; 0 for the linear increase.", NOT_NEGATIVE
    ),
    "optim.loss": Key("cross_entropy", "Training loss; its settings are keys below."),
    "optim.on_divergence": Key(
        "stop",
        "What follows if training diverges: stop; skip_batches, continue from a checkpoint "
        "without the batches since then; or lower_rate, continue from it with lower rates.",
        one_of("stop", "skip_batches", "lower_rate"),
        True,
    ),
    "optim.divergence_factor": Key(
        0.5,
        "Factor by which optim.on_divergence=lower_rate multiplies all learning rates.",
        (lambda value: 0 < value < 1, "more than 0 and less than 1"),
        True,
    ),
    "optim.divergence_retries": Key(
        3, "Times that it continues from one checkpoint before it stops.", POSITIVE, True
    ),
    "mesh.data": Key(
        -1,
        "Devices that a batch is divided between; -1 for all that mesh.fsdp does not use.",
        _DEVICES,
        True,
    ),
    "mesh.fsdp": Key(
        1,
        "Devices that batch and parameters are divided between; -1 for all that mesh.data does "
        "not use.",
        _DEVICES,
        True,
    ),
    "eval.recompute_bn": Key(
        0,
        "Training batches over which batch normalization statistics are recomputed at the end; 0 "
        "keeps the running statistics.",
        NOT_NEGATIVE,
    ),
    "eval.metrics": Key(
        "", "More metrics of each evaluation, by name with spaces between.", None, True
    ),
    "eval.every": Key(
        0, "Steps between evaluations; 0 for one at the end only.", NOT_NEGATIVE, True
    ),
    "checkpoint.every": Key(
        0, "Steps between checkpoints; 0 for one at the end only.", NOT_NEGATIVE, True
    ),
    "checkpoint.keep": Key(2, "Newest checkpoints that are kept.", POSITIVE, True),
    "checkpoint.on_failure": Key(
        "stop",
        "What follows if a checkpoint or a record cannot be written: stop, or continue training "
        "and write it the next time (several processes stop).",
        one_of("stop", "continue"),
        True,
    ),
    "log.every": Key(50, "Steps between lines in metrics.jsonl.", POSITIVE, True),
    "log.tensorboard": Key(True, "Write TensorBoard event files.", None, True),
    "log.progress": Key(True, "Show a progress bar on a terminal.", None, True),
}


def all_keys(tables: Tables) -> dict[str, Key]:
    """The keys of every experiment and those that the entries of the tables add."""
    added = tables.keys()
    twice = added.keys() & SCHEMA.keys()
    if twice:
        raise UserError(f"there is a config key {min(twice)} already; use another name")
    groups = list(dict.fromkeys(key.partition(".")[0] for key in SCHEMA))

    def place(key: str) -> int:
        group = key.partition(".")[0]
        return groups.index(group) if group in groups else len(groups)

    return dict(sorted({**SCHEMA, **added}.items(), key=lambda item: place(item[0])))
