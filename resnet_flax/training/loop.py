"""The training loop: read this to learn what a run does."""

import math
from contextlib import ExitStack
from pathlib import Path
from signal import Signals
from typing import Any

import jax
import ml_collections

from resnet_flax.config import flatten, resolve
from resnet_flax.data.readers import Patience, WaitInterrupted
from resnet_flax.errors import UserError
from resnet_flax.evaluation.evaluate import evaluate
from resnet_flax.evaluation.metrics import Result
from resnet_flax.runtime import distributed
from resnet_flax.runtime.signals import SignalHandler
from resnet_flax.training.bn_statistics import recompute_statistics
from resnet_flax.training.checkpoint import Checkpoints
from resnet_flax.training.input import open_input
from resnet_flax.training.metrics_logger import MetricsLogger
from resnet_flax.training.outputs import claimed, note_session, report
from resnet_flax.training.resume import restore_or_init
from resnet_flax.training.run import Run, build
from resnet_flax.training.session import Interrupted, Position, Session, rescue, save
from resnet_flax.training.state import TrainState
from resnet_flax.training.writers import Record, Writers

# Steps between checks of several processes whether one has received a signal.
AGREE_EVERY = 20


def train(
    config: ml_collections.ConfigDict, workdir: str | Path, stop: SignalHandler | None = None
) -> Result:
    """Trains, or continues training; evaluates at the end, also if the run was finished already.

    Args:
      config: an experiment, see `resnet_flax.config`.
      workdir: created if missing; only one run at a time can use it. Gets checkpoints/,
        metrics.jsonl, tensorboard/, config.json, sessions.json, curves.png and, at the end,
        result.json.
      stop: a context that was already entered, to handle signals before this call too.

    Returns:
      The result on `data.eval_split` after the last step.

    Raises:
      UserError: the config, the data, the workdir or the devices do not fit, the disk is full, an
        image cannot be read, or the loss is not finite. The state is saved, unless it is not
        finite.
      Interrupted: a signal came (`runtime.signals`); the state is saved.
    """
    config, workdir = resolve(config), Path(workdir)
    with ExitStack() as stack:
        stop = stack.enter_context(SignalHandler()) if stop is None else stop
        patience = Patience(config.data.timeout, _asked(stop))
        try:
            run = build(config, patience)
        except WaitInterrupted:
            assert stop.signal is not None
            raise _interrupted(stop.signal, 0, workdir) from None
        besides = ("data.data_dir", "data.source", "log.progress")
        distributed.assert_same_on_all(flatten(config), besides)
        distributed.assert_same_on_all(run.about["data"], what="data set", compare="its files")
        stack.enter_context(claimed(workdir, "checkpoints"))
        result, trained = _train(run, workdir, stop)
        if distributed.is_primary():
            title = f"{_network(config)} on {config.data.source}"
            report(run.about, title, workdir, result, new=trained)
    return result


def _train(run: Run, workdir: Path, stop: SignalHandler) -> tuple[Result, bool]:
    """`train` once it has the workdir; also returns whether there was anything to train."""
    config = run.config
    with ExitStack() as stack:
        checkpoints = stack.enter_context(
            Checkpoints(workdir / "checkpoints", config.checkpoint.keep)
        )
        begin = restore_or_init(run, checkpoints, workdir)
        writers = stack.enter_context(
            Writers(
                workdir,
                begin.step,
                config.steps,
                tensorboard=config.log.tensorboard,
                bar=config.log.progress,
                silent=not distributed.is_primary(),
            )
        )
        for note in [_introduction(run, begin.state), *run.notes, *begin.notes]:
            writers.terminal.say(note)
        if distributed.is_primary():
            note_session(workdir, begin.step, config.steps, begin.changes)
        input_ = stack.enter_context(open_input(run, begin.step))
        metrics_logger = MetricsLogger(config, run.programs.schedule, writers, input_)
        session = Session(run, workdir, checkpoints, writers, input_, metrics_logger, stop)
        # Initialising step 0 is faster than restoring it.
        at = Position(begin.state, begin.step, begin.step, begin.averaged)
        try:
            return _loop(session, at), begin.step < config.steps
        except Exception as error:
            raise rescue(session, at, error) from error


def _loop(session: Session, at: Position) -> Result:
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
        checkpoints.poll()
        last = at.step == config.steps
        signal = _agreed(stop, before, at.step)
        try:
            if last and not at.averaged and not signal:
                at.state = recompute_statistics(run, at.state)
                at.averaged, at.saved = True, -1
            if last or signal or _due(at.step, config.checkpoint.every):
                save(session, at)
            if signal:
                checkpoints.wait()
                raise _interrupted(signal, at.step, session.workdir)
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
    return (
        f"{_network(run.config)} ({parameters:,} parameters) on {run.config.data.source} "
        f"({len(run.train_source):,} + {len(run.eval_source):,} images), {devices}"
    )


def _network(config: ml_collections.ConfigDict) -> str:
    return " ".join([config.model.name, *config.model.overrides.split()])


def _due(step: int, every: int) -> bool:
    return every > 0 and step > 0 and step % every == 0


def _asked(stop: SignalHandler) -> Any:
    """Whether to stop waiting for data; never with several processes, which stop together."""
    return lambda: stop.signal is not None and jax.process_count() == 1


def _agreed(stop: SignalHandler, before: int, step: int) -> Signals | None:
    """The signal to act on; several processes agree on it at certain steps only."""
    if jax.process_count() == 1:
        return stop.signal
    if step // AGREE_EVERY == before // AGREE_EVERY:
        return None
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


def _evaluate(session: Session, at: Position) -> Result:
    """Evaluates and records the result.

    Raises:
      WaitInterrupted: a signal came before the end.
    """
    run, writers = session.run, session.writers
    batches_in_all = -(-len(run.eval_source) // run.eval_batch_size)

    def after_batch(done: int) -> None:
        writers.terminal.evaluating(done, batches_in_all)
        if run.patience.interrupted():
            raise WaitInterrupted

    with run.eval_batches() as batches:
        result = evaluate(
            run.programs.eval_step,
            at.state.variables,
            batches,
            run.mesh,
            run.eval_source,
            run.num_classes,
            after_batch=after_batch,
        )
    if not math.isfinite(result.loss):
        raise UserError(
            f"the evaluation at step {at.step} gave a loss of {result.loss}, though training's is "
            "finite: the running statistics of batch normalisation are unusable; start again in "
            "another --workdir with a lower optim.learning_rate or a longer optim.warmup_steps, or "
            "continue without evaluations by --config.eval.every=0"
        )
    record: Record = {
        "split": _record_name(run.config),
        "step": at.step,
        "loss": result.loss,
        "error": result.error,
        "top5_error": result.top5_error,
        "count": result.count,
    }
    if not writers.has(record["split"], at.step):  # there is one if the run was finished
        writers.write(record)
    writers.terminal.evaluated(at.step, record)
    return result


def _interrupted(signal: Signals, step: int, workdir: Path) -> Interrupted:
    when = f"at step {step}, which is saved in {workdir}" if step else "before the first step"
    what = "continue" if step else "begin"
    said = f"stopped by {signal.name} {when}; run the same command again to {what}"
    return Interrupted(said, signal)
