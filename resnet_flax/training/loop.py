"""The training loop: read this to learn what a run does. It knows no task."""

import gc
import math
from contextlib import ExitStack
from pathlib import Path
from signal import Signals
from typing import Any

import jax
import ml_collections

from resnet_flax.config import flatten
from resnet_flax.data.readers import WaitInterrupted
from resnet_flax.evaluation.evaluate import evaluate
from resnet_flax.runtime import distributed, storage
from resnet_flax.runtime.signals import SignalHandler
from resnet_flax.training.bn_statistics import recompute_statistics
from resnet_flax.training.checkpoint import Checkpoints
from resnet_flax.training.divergence import DivergedError, Recoveries, describe
from resnet_flax.training.input import open_input
from resnet_flax.training.metrics_logger import MetricsLogger
from resnet_flax.training.outputs import claimed, note_session, report
from resnet_flax.training.parts import CommonError, complete_batches
from resnet_flax.training.resume import restore_or_init
from resnet_flax.training.run import Run
from resnet_flax.training.session import (
    Interrupted,
    Position,
    Session,
    finish_save,
    rescue,
    save,
)
from resnet_flax.training.state import TrainState
from resnet_flax.training.writers import Record, Writers

# Steps between checks of several processes whether one has received a signal, and whether the save
# in progress has ended.
AGREE_EVERY = 20


def train(run: Run, workdir: str | Path, stop: SignalHandler | None = None) -> Any:
    """Trains, or continues training; evaluates at the end, also if the run was finished already.

    Args:
      run: what to train; `apply.experiment` makes it from a config.
      workdir: created if missing; only one run at a time can use it. Gets checkpoints/,
        metrics.jsonl, tensorboard/, config.json, sessions.json, curves.png and, at the end,
        result.json.
      stop: a context that was already entered, to handle signals before this call too.

    Returns:
      The result on the evaluation split after the last step.

    Raises:
      UserError: the workdir or its run do not fit, the disk is full, an image cannot be read, or
        the loss is not finite. The state is saved, unless it is not finite.
      Interrupted: a signal came (`runtime.signals`); the state is saved.
    """
    workdir = storage.local(workdir)
    with ExitStack() as stack:
        stop = stack.enter_context(SignalHandler()) if stop is None else stop
        besides = ("data.data_dir", "data.source", "log.progress")
        distributed.assert_same_on_all(flatten(run.config), besides)
        distributed.assert_same_on_all(run.about["data"], what="data set", compare="its files")
        stack.enter_context(claimed(workdir, "checkpoints"))
        recoveries = Recoveries(run.config.optim)
        while True:
            try:
                result, trained = _train(run, workdir, stop, recoveries)
                break
            except DivergedError as error:
                recoveries.note(error)
            gc.collect()  # the state that diverged, before another one takes the same memory
        if distributed.is_primary():
            report(run.about, run.title, workdir, result, new=trained)
    return result


def _train(
    run: Run, workdir: Path, stop: SignalHandler, recoveries: Recoveries
) -> tuple[Any, bool]:
    """`train` once it has the workdir; also returns whether there was anything to train.

    Raises:
      DivergedError: training diverged; calling it again continues as `recoveries` decides.
    """
    config = run.config
    with ExitStack() as stack:
        checkpoints = stack.enter_context(
            Checkpoints(workdir / "checkpoints", config.checkpoint.keep)
        )
        # Not from one that a signal left between two that are due: where training continues after
        # diverging does not depend on interruptions.
        every = config.checkpoint.every if recoveries.returning else 0
        begin = restore_or_init(run, checkpoints, workdir, every)
        recovery, recovered = recoveries.begin(begin.step, begin.recovery)
        run = run.after(recovery)
        if recovered:
            checkpoints.remove_after(begin.step)
        writers = stack.enter_context(
            Writers(
                workdir,
                begin.step,
                config.steps,
                tensorboard=config.log.tensorboard,
                # A launcher may give processes a terminal though it writes to a file.
                bar=config.log.progress and jax.process_count() == 1,
                silent=not distributed.is_primary(),
                patient=config.checkpoint.on_failure == "continue",
            )
        )
        if recovered:
            notes = [describe(begin.step, recovered), *begin.notes]
        else:
            notes = [_introduction(run, begin.state), *run.notes, *begin.notes]
        for note in notes:
            writers.terminal.say(note)
        if distributed.is_primary():
            note_session(workdir, begin.step, config.steps, begin.changes, recovered)
        input_ = stack.enter_context(open_input(run, begin.step))
        metrics_logger = MetricsLogger(
            *(config, run.programs.schedule, writers, input_, begin.unlogged),
            recovery.data_offset,
        )
        session = Session(run, workdir, checkpoints, writers, input_, metrics_logger, stop)
        # Initialising step 0 is faster than restoring it.
        at = Position(begin.state, begin.step, begin.step, begin.averaged)
        try:
            return _loop(session, at), begin.step < config.steps
        except Exception as error:
            found = rescue(session, at, error)
            if found is error:
                raise
            raise found from error


def _loop(session: Session, at: Position) -> Any:
    """Takes the remaining steps.

    Always in this order: save, evaluate, next batch, step, log. So a run that continues from a
    checkpoint does the same as the uninterrupted one after saving it; saving does not wait for an
    evaluation, which may fail; and an interrupted evaluation is repeated.
    """
    run, checkpoints, stop = session.run, session.checkpoints, session.stop
    config = run.config
    before = at.step
    known = session.writers.has(_record_name(config), at.step)
    evaluated = at.step if distributed.all_max(int(known)) else None
    while True:
        last = at.step == config.steps
        signal = None
        if _agreeing(before, at.step):
            finish_save(session, at)
            signal = _agreed(stop)
        try:
            if last and not at.averaged and not signal:
                with session.metrics_logger.paused():  # the last step's results come first
                    at.state = recompute_statistics(run, at.state)
                at.averaged, at.saved = True, -1
            if last or signal or _due(at.step, config.checkpoint.every):
                save(session, at, needed=last or bool(signal))
            if signal:
                checkpoints.wait()
                raise interrupted(signal, at.step, session.workdir)
            if last or (_due(at.step, config.eval.every) and evaluated != at.step):
                with session.metrics_logger.paused():
                    result = _evaluate(session, at)
                evaluated = at.step
            if last:
                return result
            n = min(session.input.most, _until_due(at.step, config))
            at.state, sums = session.input.advance(at.state, at.step, n)
            before, at.step = at.step, at.step + n
            session.metrics_logger.add(before, n, sums)
        except WaitInterrupted:
            continue  # a signal came while waiting for data: save and stop


def _introduction(run: Run, state: TrainState) -> str:
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    devices = f"{run.mesh.size} x {run.mesh.devices.flat[0].device_kind}"
    if jax.process_count() > 1:
        devices += f" in {jax.process_count()} processes"
    return (
        f"{run.title} ({parameters:,} parameters; {len(run.train_source):,} + "
        f"{len(run.eval_source):,} images), {devices}"
    )


def _due(step: int, every: int) -> bool:
    return every > 0 and step > 0 and step % every == 0


def _agreeing(before: int, step: int) -> bool:
    """Whether it is time to agree; several processes do so at certain steps only."""
    return jax.process_count() == 1 or step // AGREE_EVERY != before // AGREE_EVERY


def _agreed(stop: SignalHandler) -> Signals | None:
    """The signal to act on, the same in all processes."""
    if jax.process_count() == 1:
        return stop.signal
    number = distributed.all_max(stop.signal or 0)
    return Signals(number) if number else None


def _until_due(step: int, config: ml_collections.ConfigDict) -> int:
    """Steps from `step` to the next one at which the loop has something else to do."""
    every = [n for n in (config.eval.every, config.checkpoint.every) if n > 0]
    return min([config.steps - step, *(n - step % n for n in every)])


def _record_name(config: ml_collections.ConfigDict) -> str:
    """The split in records of evaluations; "train" is that of records of training."""
    split = config.data.eval_split
    return "train (evaluated)" if split == "train" else split


def _evaluate(session: Session, at: Position) -> Any:
    """Evaluates and records the result.

    Raises:
      WaitInterrupted: a signal came before the end.
      CommonError: the loss is not finite or, with several processes, one could not read its part.
    """
    run, writers = session.run, session.writers
    batches_in_all = -(-len(run.eval_source) // run.eval_batch_size)

    def after_batch(done: int) -> None:
        writers.terminal.evaluating(done, batches_in_all)
        if run.patience.interrupted():
            raise WaitInterrupted

    what = f"the evaluation at step {at.step}"
    with run.eval_batches() as batches:
        result = evaluate(
            run.task.measures,
            run.programs.eval_step,
            at.state.variables,
            complete_batches(batches, batches_in_all, run.blank_eval_batch, what, at.step),
            run.mesh,
            run.eval_source,
            after_batch=after_batch,
        )
    if not math.isfinite(result.loss):
        error = DivergedError(
            f"{what} gave a loss of {result.loss}, though training's is "
            "finite: the running statistics of batch normalisation are unusable; start again in "
            "another --workdir with a lower optim.learning_rate or a longer optim.warmup_steps, or "
            "continue without evaluations by --config.eval.every=0"
        )
        raise CommonError(at.step, error)
    split = _record_name(run.config)
    record: Record = {"split": split, "step": at.step, **result.record()}
    if not writers.has(split, at.step):  # there is one if the run was finished
        writers.write(record)
    writers.terminal.evaluated(at.step, record)
    return result


def interrupted(signal: Signals, step: int, workdir: Path) -> Interrupted:
    """The exception that ends a run after a signal; `step` is saved, 0 for none."""
    when = f"at step {step}, which is saved in {workdir}" if step else "before the first step"
    what = "continue" if step else "begin"
    said = f"stopped by {signal.name} {when}; run the same command again to {what}"
    return Interrupted(said, signal)
