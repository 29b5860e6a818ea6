"""Runs training so that a signal stops it with everything saved."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import NoReturn

from resnet_flax.cli import leaving
from resnet_flax.errors import UserError
from resnet_flax.runtime import machine
from resnet_flax.runtime.heartbeat import Heartbeat
from resnet_flax.runtime.signals import SignalHandler, not_ignored
from resnet_flax.runtime.terminal import leave_quietly, say

# Seconds in which a lost process, whose loss may have caused an error, is reported instead of that.
VERDICT = 2.0

CONTINUES = "the same command continues from the newest checkpoint, if there is one"
SECOND = f"ended by a second Ctrl-C before the state was saved; {CONTINUES}"


def stoppable(run: Callable[[SignalHandler], None]) -> int:
    """Runs training; the exit status is 0, 128 + n if signal n stopped it, or 1 at a second Ctrl-C.

    Signals are handled from here on, before the imports that take seconds.
    """
    with SignalHandler() as stop, not_ignored(_end_at_once):
        from resnet_flax.runtime import compilation_cache, distributed
        from resnet_flax.training.session import Interrupted

        compilation_cache.enable()
        try:
            run(stop)
        except Interrupted as stopped:
            if distributed.is_primary():
                say(stopped, sys.stderr)
            return 128 + stopped.signal
        except KeyboardInterrupt as error:
            if isinstance(error.__context__, Interrupted):  # while what had ended was tidied up
                if distributed.is_primary():
                    say(error.__context__, sys.stderr)
                return 128 + error.__context__.signal
            say(SECOND, sys.stderr)
            return 1
        finally:
            leave_quietly()
    return 0


def _end_at_once() -> NoReturn:
    # The state may have been saved before.
    say(f"ended by a second Ctrl-C; {CONTINUES}", sys.stderr)
    leaving.end(1)


@contextlib.contextmanager
def heard(heartbeat: Heartbeat | None) -> Iterator[None]:
    """A context at whose end this process says to the others how it ended.

    An error may only be the consequence of another process's loss, which is reported instead.
    """
    if heartbeat is None:
        yield
        return
    from resnet_flax.training.session import Interrupted

    try:
        yield
    except Interrupted as stopped:
        heartbeat.leave("goodbye", 128 + stopped.signal)
        raise
    except Exception as error:
        # A collective may wait for a frozen process for a shorter time than the heartbeat.
        collective = _from_collective(error)
        pause = heartbeat.limit + VERDICT if collective else VERDICT
        heartbeat.leave("failed", 2 if isinstance(error, UserError) else 1, pause)
        raise
    except BaseException:  # a second Ctrl-C
        heartbeat.leave("abandon", 1)
        raise
    heartbeat.leave("goodbye", 0)


def _from_collective(error: BaseException) -> bool:
    """Whether an error may come from a collective, directly or as its cause."""
    import jax

    cause: BaseException | None = error
    seen = set[int]()
    while cause is not None and id(cause) not in seen:  # an error can be its own cause
        seen.add(id(cause))
        if isinstance(cause, jax.errors.JaxRuntimeError):
            return not machine.lacks_memory(cause)
        cause = cause.__cause__ or cause.__context__
    return False
