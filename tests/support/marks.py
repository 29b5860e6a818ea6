"""Marks that several tests use."""

import pytest


def long(*values):
    """Parameters of a test that only `make test-long` runs."""
    return pytest.param(*values, marks=pytest.mark.long)
