"""What the tests of the scripts share."""

from pathlib import Path

import torch

from timm_mlcsd.network import load_checkpoint

ROOT = Path(__file__).parents[2]


def run(main, argv):
    """Exit code of a script."""
    try:
        main([str(a) for a in argv])
    except SystemExit as e:
        return e.code
    return 0


def weights(path):
    checkpoint = load_checkpoint(path)
    return {**checkpoint['state_dict'], **checkpoint.get('task_state', {}).get('criterion', {})}


def assert_same(a, b):
    assert set(a) == set(b)
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
