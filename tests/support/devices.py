"""Runs the programs of other devices here."""

from contextlib import contextmanager

import pytest

from resnet_flax.ops import dispatch


@contextmanager
def as_chosen_for_a_gpu():
    """Programs traced in this context use the implementations for GPUs, on any device."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(dispatch, "call", lambda functions, *operands: functions.gpu(*operands))
        yield
