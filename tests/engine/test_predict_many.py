"""mlcsd-predict --output: every image once in a file, whatever happens on the way."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import timm
import torch
from scripts import PREDICT_FLAGS as FLAGS
from scripts import rows_of, run
from stream_data import noise, write_tars

from timm_mlcsd import save_pretrained
from timm_mlcsd.adaptive import AdaptiveModel
from timm_mlcsd.cli import predict
from timm_mlcsd.data import Preprocessing
from timm_mlcsd.engine.prediction.output import record_path
from timm_mlcsd.network import load_network


def expected_rows(network, paths):
    """Answers for one image after the other."""
    loaded = load_network(network)
    runtime, read = AdaptiveModel.from_pretrained(network), Preprocessing(loaded.data_config)
    for path in paths:
        logits, exit_index, cost = runtime.predict(read(path))
        probability, index = logits[0].softmax(-1).max(0)
        yield loaded.class_names[index], probability.item(), exit_index.item() + 1, cost.item()


@pytest.mark.parametrize('ending', ['csv', 'jsonl', 'parquet'])
def test_rows_are_what_the_network_answers(adaptive_run, images, tmp_path, ending, capsys):
    out = tmp_path / f'preds.{ending}'
    assert run(predict.main, [adaptive_run, images, '--output', out, *FLAGS]) == 0
    rows = rows_of(out)
    paths = sorted(map(str, images.glob('*/*.png')))
    assert list(rows[0]) == ['filename', 'label', 'prob', 'exit', 'macs'] and [row['filename'] for row in rows] == paths
    for row, (label, probability, exit, macs) in zip(rows, expected_rows(adaptive_run, paths)):
        assert (row['label'], int(row['exit']), int(row['macs'])) == (label, exit, macs)
        # six digits, and kernels that sum in another order for another batch
        assert float(row['prob']) == pytest.approx(probability, abs=1e-4)
    assert len({row['exit'] for row in rows}) > 1
    record = json.loads(record_path(out).read_text())
    assert record['finished'] and record['answered'] == 12 and sum(record['exits']) == 12
    assert '12 images labelled' in capsys.readouterr().out
    assert {p.name for p in tmp_path.glob('*preds*')} | {p.name for p in tmp_path.glob('.*')} == {
        out.name,
        record_path(out).name,
    }


def test_columns(adaptive_run, images, tmp_path):
    flags = ['--topk', 2, '--include-index', '--output-type', 'logit', '--filename-col', 'file', '--no-policy']
    assert run(predict.main, [adaptive_run, images, '--output', tmp_path / 'a.jsonl', *flags, *FLAGS]) == 0
    (row, *_) = rows_of(tmp_path / 'a.jsonl')
    pairs = [f'{name}_{rank}' for rank in range(2) for name in ('index', 'label', 'logit')]
    assert list(row) == ['file', *pairs, 'exit', 'macs'] and row['exit'] == 4
    network = load_network(adaptive_run)
    with torch.no_grad():
        top = network.model(Preprocessing(network.data_config)(row['file']))[0].topk(2)
    assert [row['index_0'], row['index_1']] == top.indices.tolist()
    assert [row['logit_0'], row['logit_1']] == pytest.approx(top.values.tolist(), abs=1e-4)
    assert (
        run(predict.main, [adaptive_run, images, '--output', tmp_path / 'b.csv', '--label-type', 'none', *FLAGS]) == 0
    )
    assert list(rows_of(tmp_path / 'b.csv')[0]) == ['filename', 'index', 'prob', 'exit', 'macs']


def test_imagenets_classes_have_descriptions(images, tmp_path, capsys):
    torch.manual_seed(0)
    save_pretrained(timm.create_model('mlcsd_test_resnet', exits=2), tmp_path / 'net')
    found = {}
    for kind in ('name', 'description', 'detailed'):
        flags = ['--output', tmp_path / f'{kind}.csv', '--label-type', kind, '--include-index', *FLAGS]
        assert run(predict.main, [tmp_path / 'net', images, *flags]) == 0
        found[kind] = rows_of(tmp_path / f'{kind}.csv')[0]
    info = timm.data.ImageNetInfo()
    index = int(found['name']['index'])
    assert found['name']['label'] == str(index)
    assert found['description']['label'] == info.index_to_description(index)
    assert found['detailed']['label'] == info.index_to_description(index, detailed=True)


def test_files_patterns_and_what_is_no_image(adaptive_run, images, tmp_path, caplog):
    (images / 'notes.txt').write_text('no image')
    (images / '._0.png').write_bytes(b'twin')
    some = images / 'red' / '1.png'
    inputs = [some, images / '*' / '[01].png', images / 'blue', some]
    assert run(predict.main, [adaptive_run, *inputs, '--output', tmp_path / 'a.csv', *FLAGS]) == 0
    names = [row['filename'] for row in rows_of(tmp_path / 'a.csv')]
    expected = [some, *(images / c / f'{i}.png' for c in ('blue', 'green', 'red') for i in range(2))]
    assert names == list(dict.fromkeys([*map(str, expected), *(str(images / 'blue' / f'{i}.png') for i in range(4))]))
    assert run(predict.main, [adaptive_run, images, '--output', tmp_path / 'b.csv', *FLAGS]) == 0
    assert 'left out 1 hidden, 1 .txt' in caplog.text and len(rows_of(tmp_path / 'b.csv')) == 12


def test_a_table_of_the_folder_in_the_terminal(adaptive_run, images, capsys):
    assert run(predict.main, [adaptive_run, images]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 14


def test_images_that_cannot_be_read_are_listed(adaptive_run, images, tmp_path, capsys):
    (images / 'green' / '2.png').write_bytes(b'damaged')
    flags = ['--output', tmp_path / 'a.csv', *FLAGS]
    assert run(predict.main, [adaptive_run, images, *flags]) == 2
    error = capsys.readouterr().err
    assert '1 image cannot be labelled' in error and '2.png' in error and 'a.csv.json' in error
    record = json.loads((tmp_path / 'a.csv.json').read_text())
    assert record['answered'] == 11 and record['unreadable'] == 1 and '2.png' in record['unreadable_images'][0]
    assert run(predict.main, [adaptive_run, images, *flags, '--resume', '--max-bad-samples', 1]) == 0
    assert len(rows_of(tmp_path / 'a.csv')) == 11
    shutil.copy(images / 'green' / '1.png', images / 'green' / '2.png')
    assert run(predict.main, [adaptive_run, images, *flags, '--resume']) == 0
    assert len({row['filename'] for row in rows_of(tmp_path / 'a.csv')}) == 12


@pytest.mark.parametrize('ending', ['csv', 'jsonl', 'parquet'])
def test_a_torn_line_and_new_images(adaptive_run, images, tmp_path, ending):
    out = tmp_path / f'a.{ending}'
    late = images / 'red' / '3.png'
    late.rename(tmp_path / 'late.png')
    assert run(predict.main, [adaptive_run, images, '--output', out, *FLAGS]) == 0
    if ending != 'parquet':
        out.write_bytes(out.read_bytes()[:-9])
    (tmp_path / 'late.png').rename(late)
    assert run(predict.main, [adaptive_run, images, '--output', out, '--resume', *FLAGS]) == 0
    rows = rows_of(out)
    assert len(rows) == len({row['filename'] for row in rows}) == 12
    whole = tmp_path / f'whole.{ending}'
    assert run(predict.main, [adaptive_run, images, '--output', whole, *FLAGS]) == 0

    def key(row):
        return row['filename']

    # other batches, so other roundings of the last digit
    for a, b in zip(sorted(rows, key=key), sorted(rows_of(whole), key=key)):
        assert a.pop('prob') and b.pop('prob') and a == b


def test_a_killed_job_goes_on_without_doubles(adaptive_run, folder, tmp_path):
    many = tmp_path / 'many'
    for i in range(40):
        shutil.copytree(folder / 'test', many / str(i))
    out = tmp_path / 'a.parquet'
    command = [sys.executable, '-m', 'timm_mlcsd.cli.predict', adaptive_run, many, '--output', out, '--resume', *FLAGS]
    lines = tmp_path / '.a.parquet.partial.jsonl'
    for least in (20, 60):
        job = subprocess.Popen([str(c) for c in command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(6000):
            if (lines.exists() and lines.read_bytes().count(b'\n') >= least) or job.poll() is not None:
                break
            time.sleep(0.01)
        job.send_signal(signal.SIGKILL)
        assert job.wait() == -signal.SIGKILL, 'it ended before it was killed'
    assert not out.exists()
    assert run(predict.main, command[3:]) == 0
    names = [row['filename'] for row in rows_of(out)]
    assert len(names) == len(set(names)) == 480


def test_two_processes_share_the_work(adaptive_run, images, tmp_path, capsys):
    whole = tmp_path / 'whole.csv'
    assert run(predict.main, [adaptive_run, images, '--output', whole, *FLAGS]) == 0
    for i in range(3):
        (images / 'blue' / f'late{i}.png').write_bytes(b'damaged')
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', 2, '-m']
    command += ['timm_mlcsd.cli.predict', adaptive_run, images, '--output', tmp_path / 'a.csv', *FLAGS]
    job = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=240)
    assert job.returncode == 1 and '3 images cannot be labelled' in job.stderr, job.stderr
    parts = [rows_of(tmp_path / f'a.{rank}-of-2.csv') for rank in range(2)]
    found = {row['filename']: row for part in parts for row in part}
    assert sum(map(len, parts)) == len(found) == 12
    for row in rows_of(whole):
        other = found[row['filename']]
        assert float(row.pop('prob')) == pytest.approx(float(other.pop('prob')), abs=1e-4) and row == other
    assert run(predict.main, [adaptive_run, images, '--output', tmp_path / 'a.csv', '--resume', *FLAGS]) == 2
    assert 'was written by 2 process(es), now there are 1' in capsys.readouterr().err


def test_names_are_kept_as_they_are(adaptive_run, images, tmp_path):
    names = [
        'a b.png',
        'a,"b".png',
        'a\nb.png',
        'a\rb.png',
        '\r\n.png',
        'a\tb.png',
        'a\\tb.png',
        '\u3000写\u202f1.png',
        "=1'.png",
    ]
    photo = images / 'red' / '0.png'
    for name in names:
        shutil.copy(photo, tmp_path / name)
    shutil.copy(photo, os.fsencode(tmp_path) + b'/\xff.png')
    os.mkfifo(tmp_path / 'pipe.png')
    for ending in ('csv', 'jsonl', 'parquet'):
        out = tmp_path / f'a.{ending}'
        inputs = [tmp_path / name for name in names] + [
            os.fsdecode(os.fsencode(tmp_path) + b'/\xff.png'),
            images / '..',
        ]
        assert run(predict.main, [adaptive_run, *inputs, '--output', out, *FLAGS]) == 0
        before = out.read_bytes()
        assert run(predict.main, [adaptive_run, *inputs, '--output', out, '--resume', *FLAGS]) == 0
        assert ending == 'parquet' or out.read_bytes() == before
        found = [os.path.basename(row['filename']) for row in rows_of(out)]
        assert found[: len(names) + 1] == [*names, r'\xff.png'] and len(found) == len(names) + 1 + 12
        assert sum(json.loads(record_path(out).read_text())['exits']) == len(found)


def test_other_columns_of_a_data_set_are_not_mixed(adaptive_run, tmp_path, capsys):
    import datasets
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3), dtype=np.uint8)
    pictures = [Image.fromarray(p) for p in pixels]
    (tmp_path / 'data').mkdir()
    datasets.Dataset.from_dict(dict(image=pictures, other=pictures)).to_parquet(tmp_path / 'data' / 'train.parquet')
    where = ['--dataset', f'hfds/{tmp_path / "data"}', '--split', 'train', '--output', tmp_path / 'a.csv', *FLAGS]
    assert run(predict.main, [adaptive_run, *where]) == 0
    assert run(predict.main, [adaptive_run, *where, '--resume', '--input-key', 'other']) == 2
    assert 'it was made with input_key' in capsys.readouterr().err
    stream = [where[0], where[1].replace('hfds', 'hfids'), *where[2:5], tmp_path / 'b.csv', *FLAGS]
    assert run(predict.main, [adaptive_run, *stream]) == 0
    with open(tmp_path / 'b.csv', 'a') as f:
        f.write('x.png,red,0.3,1,5\n')
    assert run(predict.main, [adaptive_run, *stream, '--resume']) == 2
    assert "'x.png' is not the number of an image" in capsys.readouterr().err


def test_data_sets(adaptive_run, tmp_path):
    import datasets
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (23, 16, 16, 3), dtype=np.uint8)
    table = datasets.Dataset.from_dict(dict(picture=[Image.fromarray(p) for p in pixels]))
    (tmp_path / 'data').mkdir()
    table.cast_column('picture', datasets.Image()).to_parquet(tmp_path / 'data' / 'train.parquet')
    where = ['--dataset', f'hfds/{tmp_path / "data"}', '--split', 'train', '--input-key', 'picture']
    assert run(predict.main, [adaptive_run, *where, '--output', tmp_path / 'a.csv', *FLAGS]) == 0
    assert [row['filename'] for row in rows_of(tmp_path / 'a.csv')] == [str(i) for i in range(23)]
    where[1] = where[1].replace('hfds', 'hfids')
    assert run(predict.main, [adaptive_run, *where, '--output', tmp_path / 'b.csv', *FLAGS]) == 0
    lines = (tmp_path / 'b.csv').read_bytes().splitlines(keepends=True)
    (tmp_path / 'b.csv').write_bytes(b''.join(lines[:11]))
    assert run(predict.main, [adaptive_run, *where, '--output', tmp_path / 'b.csv', '--resume', *FLAGS]) == 0
    for a, b in zip(rows_of(tmp_path / 'a.csv'), rows_of(tmp_path / 'b.csv')):
        assert float(a.pop('prob')) == pytest.approx(float(b.pop('prob')), abs=1e-4) and a == b


def test_a_folder_that_torchvision_reads(adaptive_run, folder, tmp_path):
    where = ['--data-dir', folder / 'test', '--dataset', 'torch/image_folder', '--split', 'test']
    assert run(predict.main, [adaptive_run, *where, '--output', tmp_path / 'a.csv', *FLAGS]) == 0
    assert len(rows_of(tmp_path / 'a.csv')) == 12


def test_shards_without_labels(adaptive_run, tmp_path):
    pytest.importorskip('webdataset')
    labelled = noise()
    shards = [
        [(name, data, None if i % 2 else 'none') for i, (name, data, _) in enumerate(s)] for s in labelled['test']
    ]
    rows = []
    for name, splits in (('with', labelled), ('without', dict(test=shards))):
        folder = write_tars(tmp_path / name, splits)
        where = ['--dataset', 'wds/', '--data-dir', folder, '--split', 'test', '--output', tmp_path / f'{name}.csv']
        assert run(predict.main, [adaptive_run, *where, *FLAGS]) == 0
        rows.append(rows_of(tmp_path / f'{name}.csv'))
    assert rows[0] == rows[1] and len(rows[0]) == 13


def test_mistakes(adaptive_run, images, tmp_path, capsys, monkeypatch):
    out = tmp_path / 'a.csv'
    assert run(predict.main, [adaptive_run, images, '--output', out, *FLAGS]) == 0
    before = out.read_bytes()
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'folder.csv').mkdir()
    (tmp_path / 'b.csv').write_text('mine')
    cases = [
        ([images, '--output', out], 'exists; go on with --resume'),
        ([images, '--output', out, '--resume', '--topk', 2], 'it was made with topk 1, this would be 2'),
        ([images, '--output', out, '--resume', '--no-policy'], 'it was made with policy'),
        ([images / 'red', '--output', out, '--resume'], 'which is no image to label now'),
        ([images, '--output', out, '--resume', '--filename-col', 'file'], "made with filename_col \"filename\""),
        ([images, tmp_path / 'typo', '--output', tmp_path / 'c.csv'], "typo': there is no such file or folder"),
        ([images, '--output', tmp_path / 'folder.csv'], 'expected a file, got a folder'),
        ([images, '--output', ''], "argument --output: expected a text, got ''"),
        ([images, '--threshold', 0.5, '--no-policy'], 'give one of the two'),
        ([f'{images}/[x]/*.png', '--output', tmp_path / 'c.csv'], '[[] stands for a bracket'),
        ([images, '--output', tmp_path / 'b.csv', '--resume'], 'tells how it was made, cannot be read'),
        ([images, '--output', tmp_path / 'a.txt'], 'expected a file that ends in .csv, .jsonl, .parquet'),
        ([images, '--output', tmp_path / 'b.csv' / 'a.csv'], 'cannot be written'),
        ([tmp_path / 'empty', '--output', tmp_path / 'c.csv'], 'the folder has no images'),
        ([f'{tmp_path}/*.gif', '--output', tmp_path / 'c.csv'], 'no file of this pattern'),
        ([], 'expected INPUT, a file, folder or pattern, or --dataset NAME'),
        ([images, '--dataset', 'digits', '--output', tmp_path / 'c.csv'], 'not both'),
        (['--dataset', 'digits'], 'only with --output'),
        ([images, '--resume'], '--resume: only with --output'),
        ([images, '--output', tmp_path / 'c.csv', '--filename-col', 'prob'], 'there is another column of this name'),
        ([images, '--output', tmp_path / 'c.csv', '--label-type', 'detailed'], 'expected a network whose classes'),
    ]
    capsys.readouterr()
    for argv, message in cases:
        assert run(predict.main, [adaptive_run, *argv, *FLAGS]) == 2, argv
        error = capsys.readouterr().err
        assert message in error and error.count('\n') == 1, (argv, error)
    assert out.read_bytes() == before and (tmp_path / 'b.csv').read_text() == 'mine'
    assert not (tmp_path / 'c.csv').exists() and not (tmp_path / 'c.csv.json').exists()
    for name, value in (('RANK', '3'), ('WORLD_SIZE', '2')):
        monkeypatch.setenv(name, value)
    assert run(predict.main, [adaptive_run, images]) == 2
    assert 'are not as torchrun sets them' in capsys.readouterr().err
    monkeypatch.setenv('RANK', '1')
    assert run(predict.main, [adaptive_run, images]) == 2
    assert 'several processes need --output' in capsys.readouterr().err


def test_a_full_disk_loses_nothing(adaptive_run, images, tmp_path, capsys):
    out = tmp_path / 'a.csv'
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    network = load_network(adaptive_run)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(os.fspath(images)) * 8, before[1]))
        assert run(predict.main, [adaptive_run, images, '--output', out, *FLAGS]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert 'cannot be written: File too large; nothing before is lost' in capsys.readouterr().err
    assert run(predict.main, [adaptive_run, images, '--output', out, '--resume', *FLAGS]) == 0
    assert len({row['filename'] for row in rows_of(out)}) == 12 and network
