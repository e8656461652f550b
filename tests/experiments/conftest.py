"""Candidates of the experiments as choices of the package, for one test."""

import sys
from pathlib import Path

import pytest

from timm_mlcsd.losses import DISTILL_METHODS, TEACHERS

sys.path.insert(0, str(Path(__file__).parents[2]))  # experiments is no part of the package


@pytest.fixture
def with_candidates():
    from experiments.candidates import register

    before = dict(TEACHERS), dict(DISTILL_METHODS)
    register()
    yield
    for choices, old in zip((TEACHERS, DISTILL_METHODS), before):
        choices.clear()
        choices.update(old)
