"""PyTorch, for the tests that compare with it."""

import pytest


@pytest.fixture
def torch():
    """PyTorch itself; a test that asks for it is skipped where it is not installed."""
    return pytest.importorskip("torch", reason="compares with files that PyTorch itself writes")
