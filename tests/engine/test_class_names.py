"""A name belongs to an index, in every output."""

import json
import pickle
import re

import pytest
from scripts import run

from timm_mlcsd.cli import predict, train, validate
from timm_mlcsd.data import class_label, load_class_map, names_by_index, same_names
from timm_mlcsd.errors import UserError
from timm_mlcsd.network import load_checkpoint, load_network


def test_names_by_index():
    assert names_by_index({'ant': 1, 'bee': 3}) == [None, 'ant', None, 'bee']
    assert names_by_index({'wasp': 0, 'ant': 0, 'bee': 1}) == ['ant / wasp', 'bee']
    assert [class_label([None, 'ant'], i) for i in range(3)] == ['0', 'ant', '2']
    assert same_names(['a', None], ['a']) and not same_names([None, 'a'], ['a'])
    assert same_names(['caf\u00e9'], ['cafe\u0301']) and not same_names(['caf\u00e9'], ['cafe'])


@pytest.mark.parametrize(
    'text, message',
    [
        ('ant\nant\nbee\ncat\n', "'ant' is on the lines 1 and 2"),
        ('ant\n\nbee\n', 'line 2 is empty'),
        ('\ufeffant\nbee\n', 'line 1 has a byte-order mark'),
        ('caf\u00e9\ncafe\u0301\n', 'look the same'),
        ('ant\nan\u200bt\n', 'look the same'),
        ('\n\n', 'got an empty file'),
        ('', 'got an empty file'),
    ],
)
def test_class_maps_that_are_refused(tmp_path, text, message):
    (tmp_path / 'map.txt').write_text(text, encoding='utf-8')
    with pytest.raises(UserError, match=re.escape(message)) as e:
        load_class_map(tmp_path / 'map.txt')
    assert '--class-map' in str(e.value) and '\n' not in str(e.value)


class Evil:
    def __reduce__(self):
        return print, ('code ran',)


@pytest.mark.parametrize(
    'content',
    [{'ant': -1}, {'ant': True}, {'ant': 1.0}, {'ant': 10**9}, ['ant'], {('ant',): 0}, {'ant': Evil()}, {'': 0}, {}],
)
def test_pickled_class_maps_that_are_refused(tmp_path, content, capsys):
    (tmp_path / 'map.pkl').write_bytes(pickle.dumps(content))
    with pytest.raises(UserError, match='--class-map'):
        load_class_map(tmp_path / 'map.pkl')
    assert 'code ran' not in capsys.readouterr().out


def test_damaged_and_missing_class_maps(tmp_path):
    (tmp_path / 'map.pkl').write_bytes(pickle.dumps({'ant': 0})[:-3])
    (tmp_path / 'latin.txt').write_bytes('größe'.encode('latin-1'))
    for name in ('map.pkl', 'latin.txt', 'none.txt', 'map.csv'):
        with pytest.raises(UserError, match='--class-map'):
            load_class_map(tmp_path / name)


@pytest.fixture(scope='module')
def gaps(folder, small_flags, tmp_path_factory):
    """A run whose classes have the indices 1, 3 and 4 of 6."""
    out = tmp_path_factory.mktemp('gaps')
    (out / 'map.pkl').write_bytes(pickle.dumps(dict(red=1, green=4, blue=3)))
    argv = [folder, *small_flags, '--class-map', out / 'map.pkl', '--num-classes', 6, '--epochs', 12]
    assert run(train.main, [*argv, '--output', out, '--experiment', 'run']) == 0
    return out / 'run' / 'last.pth.tar'  # five images choose the best epoch too early


NAMES = [None, 'red', None, 'blue', 'green', None]


def labels_of(output):
    """First label per line of mlcsd-predict."""
    return [re.search(r'\.png\s+(\S+) [\d.]+%', line)[1] for line in output.splitlines() if '.png' in line]


def photos(folder):
    return [folder / 'test' / name / f'{i}.png' for name in ('red', 'green', 'blue') for i in range(4)]


def test_gaps_stay_gaps(gaps, folder, capsys):
    assert load_checkpoint(gaps)['class_names'] == NAMES
    assert run(validate.main, ['--checkpoint', gaps, '--split', 'test', '--workers', 0]) == 0
    top1 = float(re.search(r'Ex4 .*?(\d+\.\d\d)', capsys.readouterr().out)[1])
    assert run(predict.main, [gaps, *photos(folder), '--topk', 1]) == 0
    labels = labels_of(capsys.readouterr().out)
    right = sum(label == path.parent.name for label, path in zip(labels, photos(folder)))
    assert 100 * right / 12 == pytest.approx(top1, abs=0.02) and right >= 10
    assert run(predict.main, [gaps, photos(folder)[0], '--topk', 6]) == 0
    shown = capsys.readouterr().out
    assert all(re.search(rf'[ ,]{label} [\d.]+%', shown) for label in ('0', 'red', '2', 'blue', 'green', '5'))


def test_data_without_a_map_is_refused_for_a_network_with_one(gaps, folder, capsys):
    argv = [folder, '--checkpoint', gaps, '--split', 'test', '--workers', 0, '--dataset', '']
    assert run(validate.main, argv) == 2
    assert 'are not those that are trained on (0, red, 2, blue, green' in capsys.readouterr().err


def test_fewer_names_than_classes(small, tmp_path, folder, capsys):
    assert run(train.main, [*small, '--num-classes', 10, '--epochs', 1]) == 0
    assert load_network(tmp_path / 'run').class_names == ['blue', 'green', 'red', *[None] * 7]
    assert run(predict.main, [tmp_path / 'run', *photos(folder), '--topk', 10]) == 0
    assert run(train.main, [*small, '--num-classes', 10, '--epochs', 2, '--resume', tmp_path / 'run']) == 0


def test_class_maps_where_labels_are_indices(small, tmp_path, capsys):
    (tmp_path / 'map.txt').write_text('red\ngreen\nblue\n')
    argv = [*small, '--class-map', tmp_path / 'map.txt', '--dataset', 'torch/image_folder']
    assert run(train.main, argv) == 2
    assert 'whose labels are indices; leave the flag out' in capsys.readouterr().err


def test_evil_names_are_escaped(small, folder, tmp_path, capsys):
    data = tmp_path / 'data'
    for split in ('train', 'test'):
        for name, shown in (('red', 'r\x1b[31m'), ('green', 'g'), ('blue', 'b')):
            (data / split).mkdir(parents=True, exist_ok=True)
            (data / split / shown).symlink_to(folder / split / name)
    assert run(train.main, [data, *small[1:]]) == 0
    capsys.readouterr()
    assert run(predict.main, [tmp_path / 'run', data / 'test' / 'r\x1b[31m' / '0.png']) == 0
    out = capsys.readouterr().out
    assert '\x1b' not in out and r'r\x1b[31m' in out


def test_results_and_checkpoint_agree(gaps, tmp_path):
    argv = ['--checkpoint', gaps, '--split', 'test', '--workers', 0, '--results-file', tmp_path / 'r.json']
    assert run(validate.main, argv) == 0
    assert json.loads((tmp_path / 'r.json').read_text())['num_samples'] == 12
