"""The PyTorch references of tests/fixtures, where torch is installed."""

import importlib
import sys
from pathlib import Path

import pytest

FIXTURES = Path(__file__).parents[1] / "fixtures"


def live_reference(name: str):
    """The module tests/fixtures/NAME.py, or a skip where torch or diffusers is not installed."""
    reason = "needs torch and diffusers; no CPU build of torch 2.13.0 at hand for this Python"
    pytest.importorskip("torch", reason=reason)
    pytest.importorskip("diffusers", reason=reason)
    sys.path.insert(0, str(FIXTURES))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(FIXTURES))
