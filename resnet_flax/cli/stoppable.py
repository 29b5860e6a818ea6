"""Runs training so that a signal stops it with everything saved."""

import sys
from collections.abc import Callable

from resnet_flax.runtime.signals import SignalHandler
from resnet_flax.runtime.terminal import leave_quietly, say


def stoppable(run: Callable[[SignalHandler], None]) -> int:
    """Runs training; the exit status is 0, or 128 + n if signal n stopped it.

    Signals are handled from here on, before the imports that take seconds.
    """
    with SignalHandler() as stop:
        from resnet_flax.runtime import compilation_cache
        from resnet_flax.training.session import Interrupted

        compilation_cache.enable()
        try:
            run(stop)
        except Interrupted as stopped:
            say(stopped, sys.stderr)
            return 128 + stopped.signal
        finally:
            leave_quietly()
    return 0
