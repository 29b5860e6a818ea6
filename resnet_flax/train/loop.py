"""The training loop: read this to learn what a run does."""

import json
import math
from contextlib import ExitStack
from pathlib import Path
from signal import Signals
from typing import Any

import jax
import ml_collections

from resnet_flax import distributed
from resnet_flax.config import conflicts, flatten, resolve
from resnet_flax.data.pipeline import eval_batches
from resnet_flax.errors import UserError
from resnet_flax.evaluation.metrics import Result
from resnet_flax.evaluation.run import evaluate
from resnet_flax.provenance import provenance, read_json, write_json
from resnet_flax.train.checkpoint import Checkpoints
from resnet_flax.train.curves import draw_curves
from resnet_flax.train.feed import open_feed
from resnet_flax.train.interrupt import Interruption
from resnet_flax.train.meter import Meter, diverged
from resnet_flax.train.recompute import recompute_statistics
from resnet_flax.train.setup import Run, build
from resnet_flax.train.state import TrainState
from resnet_flax.train.writers import Record, Writers

# Steps between two times at which several processes ask each other whether one has got a signal.
AGREE_EVERY = 20


class Stopped(Exception):  # noqa: N818  no error
    """A signal ended the run; what is needed to go on is saved.

    Attributes:
      signal: its number.
    """

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal


def train(
    config: ml_collections.ConfigDict, workdir: str | Path, stop: Interruption | None = None
) -> Result:
    """Trains, or goes on training, or finds the run finished; evaluates at the end in any case.

    Args:
      config: an experiment, see `resnet_flax.config`.
      workdir: made where it is not there. Gets checkpoints/, metrics.jsonl, tensorboard/,
        config.json, sittings.json, curves.png and, at the end, result.json.
      stop: a context already entered, for who wants signals of before this call heard too.

    Returns:
      The result on `data.eval_split` after the last step.

    Raises:
      UserError: the config, the data, the workdir or the devices do not fit, the disk is full,
        or the loss is not finite.
      Stopped: SIGTERM or SIGINT came; the state is saved.
    """
    config, workdir = resolve(config), Path(workdir)
    with ExitStack() as stack:
        stop = stack.enter_context(Interruption()) if stop is None else stop
        run = build(config)
        distributed.check_same(flatten(config), besides=("data.data_dir", "log.progress"))
        if distributed.is_first():
            _prepare_workdir(workdir)
        distributed.wait()
        checkpoints = stack.enter_context(
            Checkpoints(workdir / "checkpoints", config.checkpoint.keep)
        )
        state, start, notes = _restore_or_init(run, config, checkpoints, workdir)
        log = config.log
        writers = stack.enter_context(
            Writers(
                workdir,
                start,
                config.steps,
                tensorboard=log.tensorboard,
                bar=log.progress,
                silent=not distributed.is_first(),
            )
        )
        for note in [_introduction(run, config, state), *run.notes, *notes]:
            writers.terminal.say(note)
        if distributed.is_first():
            _note_sitting(workdir, start, config.steps)
        feed = stack.enter_context(open_feed(run, config, start))
        meter = Meter(config, run.programs.schedule, writers, feed)
        result, saved = None, start  # step 0 is made anew faster than it is read
        step = before = start
        while True:
            checkpoints.poll()
            # Evaluate, save, next batch, step, log: always in this order, so that a run that
            # goes on from a checkpoint does what the uninterrupted one does after saving it.
            last = step == config.steps
            if last and step != saved and config.eval.recompute_bn:
                state = recompute_statistics(run, config, state)
            if last or _due(step, config.eval.every):
                with meter.paused():
                    result = _evaluate(run, config, state, step, writers, stop)
            signal = _agreed(stop, before, step)
            if step != saved and (last or signal or _due(step, config.checkpoint.every)):
                with meter.paused():  # which raises where the state is not finite
                    checkpoints.save(step, state, run.about)
                saved = step
            if signal and not (last and result):
                checkpoints.wait()
                raise Stopped(_how_to_go_on(signal.name, step, workdir), signal)
            if last:
                break
            n = min(feed.most, _until_due(step, config))
            state, sums = feed.advance(state, step, n)
            meter.add(step, n, sums)
            before, step = step, step + n
    assert result is not None
    if distributed.is_first():
        _report(config, workdir, result, trained=start < config.steps)
    return result


def _introduction(run: Run, config: ml_collections.ConfigDict, state: TrainState) -> str:
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    devices = f"{run.mesh.size} x {run.mesh.devices.flat[0].device_kind}"
    return (
        f"{_network(config)} ({parameters:,} parameters) on {config.data.source} "
        f"({len(run.train_source):,} + {len(run.eval_source):,} images), {devices}"
    )


def _network(config: ml_collections.ConfigDict) -> str:
    return " ".join([config.model.name, *config.model.axes.split()])


def _due(step: int, every: int) -> bool:
    return every > 0 and step > 0 and step % every == 0


def _agreed(stop: Interruption, before: int, step: int) -> Signals | None:
    """The signal to follow: all processes at the same step, so every now and then."""
    if jax.process_count() == 1:
        return stop.signal
    if step // AGREE_EVERY == before // AGREE_EVERY:
        return None
    number = distributed.largest(stop.signal or 0)
    return Signals(number) if number else None


def _until_due(step: int, config: ml_collections.ConfigDict) -> int:
    """Steps from `step` to the next one at which the loop has something to do."""
    every = [n for n in (config.eval.every, config.checkpoint.every) if n > 0]
    return min([config.steps - step, *(n - step % n for n in every)])


def _prepare_workdir(workdir: Path) -> None:
    """Finds out now, not after hours, that the workdir cannot be written."""
    try:
        for directory in (workdir, workdir / "checkpoints"):
            directory.mkdir(parents=True, exist_ok=True)
            probe = directory / ".writable"
            probe.write_text("yes")
            probe.unlink()
    except OSError as error:
        raise UserError(
            f"cannot write to the workdir {workdir}: {error.strerror} ({error.filename}); give "
            "one that can be written as --workdir"
        ) from error


def _restore_or_init(
    run: Run, config: ml_collections.ConfigDict, checkpoints: Checkpoints, workdir: Path
) -> tuple[TrainState, int, list[str]]:
    """The state to start from, its step, and what the user should know about it."""

    def accept(meta: dict[str, Any]) -> None:
        different = conflicts(config, meta["config"])
        if different:
            listed = ", ".join(f"{k} is {b!r} but was {a!r}" for k, (a, b) in different.items())
            raise UserError(
                f"{workdir} holds a run of another config: {listed}; "
                "give another --workdir, or the config that the run began with"
            )
        if meta["step"] > config.steps:
            raise UserError(
                f"{workdir} holds a run of {meta['step']} steps, more than steps={config.steps}; "
                "give another --workdir, or as many steps"
            )

    target = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        jax.eval_shape(run.programs.init, config.seed),
        run.programs.shardings,
    )
    restored = checkpoints.restore_newest(target, accept)
    if distributed.is_first():
        (workdir / "config.json").write_text(json.dumps(flatten(config), indent=2) + "\n")
    if restored is None:
        return run.programs.init(config.seed), 0, []
    state, meta, notes = restored
    step = meta["step"]
    word = "is finished" if step == config.steps else "goes on"
    return state, step, [*notes, f"{workdir} {word} at step {step} of {config.steps}"]


def _evaluate(
    run: Run,
    config: ml_collections.ConfigDict,
    state: TrainState,
    step: int,
    writers: Writers,
    stop: Interruption,
) -> Result | None:
    """Evaluates and records the result; None where a signal came before the end."""
    source, size = run.eval_source, config.data.eval_batch_size or config.batch_size
    number = -(-len(source) // size)
    with eval_batches(
        source,
        batch_size=size,
        transform=run.eval_transform,
        host=jax.process_index(),
        hosts=jax.process_count(),
        workers=config.data.workers,
    ) as batches:
        progress = evaluate(
            run.programs.eval_step,
            state.variables,
            batches,
            run.mesh,
            source,
            len(run.about["class_names"]),
        )
        for done, result in enumerate(progress, start=1):
            if result is None:
                writers.terminal.evaluating(done, number)
                if stop.signal and jax.process_count() == 1:
                    return None
    assert result is not None
    if not math.isfinite(result.loss):
        raise diverged(step, f"evaluation loss {result.loss}")
    split = config.data.eval_split
    # The records of training are of "train".
    name = "train (evaluated)" if split == "train" else split
    record: Record = {
        "split": name,
        "step": step,
        "loss": result.loss,
        "error": result.error,
        "top5_error": result.top5_error,
        "count": result.count,
    }
    if not writers.has(name, step):  # as it is when the run was finished
        writers.write(record)
    writers.terminal.evaluated(step, record)
    return result


def _how_to_go_on(signal: str, step: int, workdir: Path) -> str:
    saved = f"which is saved in {workdir}" if step else "before the first"
    return f"stopped by {signal} at step {step}, {saved}; run the same command again to go on"


def _note_sitting(workdir: Path, start: int, steps: int) -> None:
    """Notes with what this part of the run is trained, before anything of that can change."""
    path = workdir / "sittings.json"
    if start < steps:
        before = read_json(path) if start else None
        write_json(path, [*(before or []), {"from_step": start, **provenance()}])


def _report(
    config: ml_collections.ConfigDict, workdir: Path, result: Result, *, trained: bool
) -> None:
    finished = {
        "split": config.data.eval_split,
        "step": config.steps,
        "errors": result.errors,
        "count": result.count,
        "top5_error": result.top5_error,
        "loss": result.loss,
    }
    path = workdir / "result.json"
    known = read_json(path) or {}
    # What a finished run left says with which commit and device it was trained: that stays, though
    # an evaluation elsewhere may differ by a rounding.
    if trained or any(known.get(key) != finished[key] for key in ("split", "step", "count")):
        sittings = read_json(workdir / "sittings.json") or [provenance()]
        about = {key: value for key, value in sittings[-1].items() if key != "from_step"}
        earlier = {"sittings": sittings} if len(sittings) > 1 else {}
        write_json(path, {**finished, **about, **earlier, "config": flatten(config)})
    curves = workdir / "curves.png"
    draw_curves(workdir / "metrics.jsonl", curves, f"{_network(config)} on {config.data.source}")
    print(f"curves: {curves}")
    print(f"checkpoints: {workdir / 'checkpoints'}")
    error = f"{config.data.eval_split} error: {100 * result.error:.2f} %"
    print(f"{error} ({result.errors} of {result.count}, loss {result.loss:.4f})", flush=True)
