"""What several tests are marked with."""

import pytest


def long(*values):
    """Parameters of a test that only `make test-long` takes."""
    return pytest.param(*values, marks=pytest.mark.long)
