"""Shared helpers: everything is seeded, offline and small."""

import os

os.environ.setdefault('HF_HUB_OFFLINE', '1')

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
