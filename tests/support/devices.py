"""What other devices would run, run here."""

from contextlib import contextmanager

import pytest

from resnet_flax.ops import dispatch


@contextmanager
def as_chosen_for_a_gpu():
    """Programs that are traced here compute each operation as a GPU would, on whatever device."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(dispatch, "call", lambda functions, *operands: functions.gpu(*operands))
        yield
