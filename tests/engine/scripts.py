"""What the tests of the scripts share."""

import csv
import json
from pathlib import Path

import torch

from timm_mlcsd.network import load_checkpoint

ROOT = Path(__file__).parents[2]
PREDICT_FLAGS = ['-j', 0, '-b', 5, '--device', 'cpu']


def run(main, argv):
    """Exit code of a script."""
    try:
        main([str(a) for a in argv])
    except SystemExit as e:
        return e.code
    return 0


def rows_of(path):
    """Rows of a file of predictions, as dictionaries."""
    if path.suffix == '.csv':
        with open(path, newline='') as f:
            return list(csv.DictReader(f))
    if path.suffix == '.jsonl':
        return [json.loads(line) for line in path.read_text().splitlines()]
    import pyarrow.parquet

    return pyarrow.parquet.read_table(path).to_pylist()


def weights(path):
    checkpoint = load_checkpoint(path)
    return {**checkpoint['state_dict'], **checkpoint.get('task_state', {}).get('criterion', {})}


def assert_same(a, b):
    assert set(a) == set(b)
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
