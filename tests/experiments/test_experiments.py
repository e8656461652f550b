"""The paper's tables: what they ask for, that nothing runs twice, what a report says."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments.heads_only import heads_only
from experiments.plan import HERE, Row, Run, Table, load_datasets, load_table, table_names
from experiments.report import figure, report
from experiments.runner import Runner, load_results
from timm_mlcsd.cli.config_file import parse_args
from timm_mlcsd.cli.flags import train_parser
from timm_mlcsd.errors import UserError


def ids(name, scale='paper', **kwargs):
    return {run.id for row in load_table(name, scale, **kwargs).rows for run in row.runs}


@pytest.mark.parametrize('name', table_names())
def test_every_table_is_made_of_flags_that_exist(name, tmp_path, with_candidates):
    import yaml

    scale, seeds = ('explore', 2) if name == 'stage-a' else ('paper', 3)
    table = load_table(name, scale)
    assert table.dataset in load_datasets() and table.rows and all(len(row.runs) == seeds for row in table.rows)
    labels = {row.labels for row in table.rows}
    assert set(table.paper) <= labels and set(table.baselines) <= {label[-1] for label in labels}
    for row in table.rows:
        path = tmp_path / 'flags.yaml'
        path.write_text(yaml.safe_dump(row.runs[0].flags))
        parse_args(train_parser(), ['--config', str(path)])


def test_all_of_the_papers_tables_are_there():
    names = set(table_names())
    assert {f'table{i}' for i in range(1, 16)} <= names and {f'figure{i}' for i in range(2, 8)} <= names


def test_tables_share_runs():
    assert len(ids('table2')) == 6 * 4 * 3
    # MENM, FLSM: the same training in Tables 2 and 8, whatever else the tables say of teachers
    assert len(ids('table8') & ids('table2')) == 2 * 3
    assert ids('table15') < ids('table14') and ids('table5') & ids('table7')


def test_a_run_is_its_settings():
    table = load_table('table2', 'paper')
    flags = {row.labels: row.runs[0].flags for row in table.rows}
    menm, all_for_all = flags['ResNet18', 'MENM'], flags['ResNet18', 'All for all']
    assert menm['distill'] == 'none' and 'alpha' not in menm
    assert all_for_all['alpha'] == 5.0 and all_for_all['beta'] == 10.0 and all_for_all['epochs'] == 240
    assert flags['MobileNetV2', 'MENM']['lr'] == 0.01
    cpu = load_table('table2', 'cpu')
    assert {row.labels[0] for row in cpu.rows} == {'ResNet18'}
    assert cpu.rows[0].runs[0].flags['train_split'] == 'train[:5000]'
    assert not ids('table2', 'cpu') & ids('table2')
    with pytest.raises(UserError, match=r"table 'table99' is unknown; choose from .*table1, table2"):
        load_table('table99', 'cpu')
    with pytest.raises(UserError, match=r"scale 'x' is unknown; choose from confirm, cpu, explore, paper, smoke"):
        load_table('table2', 'x')


def test_a_plain_network_gets_exits(tmp_path):
    runs = {row.labels[1]: row.runs[0] for row in load_table('table2', 'cpu').rows}
    plain, taught = runs['SE'], runs['One for all']
    config = tmp_path / 'flags.yaml'
    config.write_text(json.dumps(heads_only(taught, Path('plain.safetensors'), distill='all-for-all').flags))
    args = parse_args(train_parser(), ['--config', str(config)])
    assert args.heads_only is True and args.initial_checkpoint == 'plain.safetensors'
    assert args.exits == 8 and args.distill == 'all-for-all' and args.epochs == 20
    assert args.alpha == 1.0 and args.beta == 0.0
    # the network, its data and the precision are the plain one's
    for name in ('model_kwargs', 'small_input', 'train_split', 'mean', 'amp_dtype'):
        assert getattr(args, name) == getattr(parse_args(train_parser(), _as_config(plain, tmp_path)), name)


def _as_config(run, folder):
    (folder / 'plain.yaml').write_text(json.dumps(run.flags))
    return ['--config', str(folder / 'plain.yaml')]


TINY = dict(
    model='mlcsd_resnet18', model_kwargs=dict(channels=[4, 4, 4, 4]), exits=2, small_input=True, img_size=16, epochs=3
) | dict(crop_pct=1.0, batch_size=64, lr=0.02, warmup_epochs=0, color_jitter=0.0, train_crop_mode='pad4', alpha=1.0)
TINY |= dict(cache_dataset='device', workers=0, val_split='validation', distill='all-for-all', checkpoint_hist=1)


def test_runs_are_stopped_resumed_and_never_repeated(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    monkeypatch.delenv('PYTEST_XDIST_WORKER', raising=False)
    results, run = tmp_path / 'results.jsonl', Run('digits', TINY, 3)

    def runner(**kwargs):
        return Runner(results, tmp_path / 'work', None, 'smoke', device='cpu', **kwargs)

    folder = tmp_path / 'work' / run.id
    # time is up as soon as there is something to go on from
    stopped = runner(deadline=float('inf'))
    monkeypatch.setattr(stopped, '_deadline_passed', lambda: (folder / 'train' / 'last.pth.tar').exists())
    popen = subprocess.Popen

    class Killed(popen):
        def wait(self, timeout=None):
            while self.poll() is None and not stopped._deadline_passed():
                time.sleep(0.05)
            if self.poll() is None:
                self.kill()
            return super().wait()

    monkeypatch.setattr('experiments.runner.subprocess.Popen', Killed)
    assert stopped.run([run], 1) == [] and not results.exists()
    monkeypatch.setattr('experiments.runner.subprocess.Popen', popen)
    assert runner().run([run, run], 1) == []
    (record,) = load_results(results).values()
    assert 'Resuming after epoch' in (folder / 'log.txt').read_text()
    assert record['id'] == run.id and record['flags'] == TINY and record['seed'] == 3
    assert len(record['test']) == len(record['validation']) == len(record['macs']) == 2
    assert len(record['curve']) == 39 and record['seconds'] > 0 and record['versions']['torch']
    assert [round(sum(row), 4) for row in record['weights']] == [1.0, 1.0]
    assert runner().run([run], 1) == [] and len(results.read_text().splitlines()) == 1
    assert '1 runs, 0 missing' in capsys.readouterr().out


def test_a_failed_run_is_reported_with_its_log(tmp_path):
    run = Run('digits', dict(TINY, exits=99), 0)
    (error,) = Runner(tmp_path / 'r.jsonl', tmp_path, None, 'smoke').run([run], 1)
    assert run.id in error and 'exits=99 is impossible' in (tmp_path / run.id / 'log.txt').read_text()
    with pytest.raises(UserError, match='expected an existing file or folder with cifar100'):
        Runner(tmp_path / 'r.jsonl', tmp_path, '/nowhere', 'smoke').run([Run('cifar100', TINY, 0)], 1)


def record(run, *test):
    return dict(
        id=run.id,
        test=list(test),
        validation=list(test),
        rescued=[1.0] * (len(test) - 1) + [0.0],
        macs=[1e6 * (k + 1) for k in range(len(test))],
        params=[1e6] * len(test),
        depth=[3, 5],
        curve=[(1e6, 10.0), (2e6, 20.0)],
        weights=[[0.25, 0.75], [0.5, 0.5]],
    )


def make_table(**kwargs):
    runs = [[Run('cifar100', dict(method=m), s) for s in range(3)] for m in 'ab']
    rows = [Row(('Net', label), r) for label, r in zip(('MENM', 'New'), runs)]
    fields = dict(show=['accuracy', 'rescued', 'cost', 'weights'], paper={}, note='A note.', test_split='test')
    return Table('t', 'a title', 'cifar100', ['Network', 'Method'], rows, ['MENM'], **{**fields, **kwargs})


def test_report():
    from scipy.stats import ttest_ind

    table = make_table(paper={('Net', 'MENM'): 75.0, ('Net', 'New'): 76.5})
    means = {'MENM': [(9, 11), (10, 12), (11, 13)], 'New': [(8, 10), (10, 11), (9, 11)]}
    results = {run.id: record(run, *t) for row in table.rows for run, t in zip(row.runs, means[row.labels[1]])}
    text = report(table, results, 'cpu')
    p = ttest_ind([9, 10.5, 10], [10, 11, 12], equal_var=False).pvalue
    assert '| Net | MENM | 3 | 10.00 ± 1.00 | 12.00 ± 1.00 | 11.00 ± 1.00 |' in text
    assert f'| 9.83 ± 0.76 | {p:.2g} | 76.50 |' in text
    assert '- Net / New against MENM: -1.17 here, +1.50 there: unlike the paper.' in text
    assert '6 of 6 runs' in text and 'A note.' in text
    assert '| Net | MENM | 1.00 |' in text  # rescued
    assert '| Net | New | 2.0 | 1.00 | 4.0 |' in text  # cost
    assert '| Teacher-Ex1 | 0.250 | 0.750 |' in text


def test_report_of_what_is_half_done():
    table = make_table()
    assert 'Nothing has been run yet' in report(table, {}, 'cpu')
    run = table.rows[0].runs[0]
    text = report(table, {run.id: record(run, 9.0, 11.0)}, 'cpu')
    assert '1 of 6 runs' in text and '| Net | MENM | 1 | 9.00 | 11.00 | 10.00 | 10.00 |  |' in text


@pytest.mark.parametrize('kind', ['anytime', 'budgeted'])
def test_figures(kind, tmp_path):
    table = make_table(show=[kind])
    assert not figure(table, {}, tmp_path / 'f.png')
    run = table.rows[0].runs[0]
    assert figure(table, {run.id: record(run, 9.0, 11.0)}, tmp_path / 'f.png')
    assert (tmp_path / 'f.png').read_bytes().startswith(b'\x89PNG')


def test_results_that_are_committed_belong_to_tables():
    for path in (HERE / 'results').glob('*.jsonl'):
        seeds = 0 if path.stem == 'confirm' else 20
        known = {id for name in table_names() for id in ids(name, path.stem, seeds=seeds)}
        records = [json.loads(line) for line in path.read_text().splitlines()]
        assert {r['id'] for r in records} <= known, path
        assert all(r['id'] == Run(r['dataset'], r['flags'], r['seed']).id for r in records)
        assert not any({'dataset', 'data_dir', 'output'} & set(r['flags']) for r in records)


def test_a_dead_runners_training_keeps_its_lock(tmp_path):
    from experiments.runner import _lock

    with _lock(tmp_path / 'lock') as lock:
        child = subprocess.Popen([sys.executable, '-c', 'input()'], stdin=subprocess.PIPE, pass_fds=(lock,))
    with _lock(tmp_path / 'lock') as second:
        assert second is None
    child.communicate(b'\n')
    with _lock(tmp_path / 'lock') as third:
        assert third is not None


def test_data_is_missed_before_anything_runs(tmp_path):
    runner = Runner(tmp_path / 'r.jsonl', tmp_path / 'work', None, 'smoke')
    with pytest.raises(UserError, match='expected an existing file or folder with cifar100'):
        runner.run([Run('digits', TINY, 0), Run('cifar100', TINY, 0)], 1)
    assert not (tmp_path / 'work').exists()
    sliced = Runner(tmp_path / 'r.jsonl', tmp_path / 'work', str(tmp_path), 'cpu')
    with pytest.raises(UserError, match='expected Parquet files'):
        sliced.run([Run('cifar100', {**TINY, 'train_split': 'train[:50]'}, 0)], 1)


@pytest.mark.parametrize('argv', ['report --scale typo', 'list --scale typo', 'report table99', 'run figure5'])
def test_mistakes_are_one_line(argv, monkeypatch, capsys):
    from experiments.__main__ import main

    monkeypatch.setattr(sys, 'argv', ['experiments', *argv.split()])
    with pytest.raises(SystemExit) as exit:
        main()
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.startswith('experiments: error: ') and error.count('\n') == 1


def test_stage_a_reads_other_training_images_than_it_trains_on():
    table = load_table('stage-a', 'explore')
    assert table.test_split == 'train[6000:16000]' and load_table('table2', 'cpu').test_split == 'test'
    for row in table.rows:
        flags = row.runs[0].flags
        assert (flags['train_split'], flags['val_split']) == ('train[:5000]', 'train[5000:6000]')
        assert 'val_fraction' not in flags and flags['epochs'] == 60 and len(row.runs) == 2
    one = table.rows[0].runs[0]
    assert 'the test split was not read' in report(table, {one.id: record(one, 20, 30)}, 'explore')
    assert not load_table('stage-a', 'cpu').rows  # some of its runs are those of other tables there


def test_every_seed_of_stage_b_has_images_of_its_own():
    (row, *_) = load_table('table8', 'confirm').rows
    assert [run.seed for run in row.runs] == list(range(10, 18))
    splits = [run.flags['train_split'] for run in row.runs]
    bounds = [tuple(map(int, split[len('train[') : -1].split(':'))) for split in splits]
    assert bounds == [(5000 * i, 5000 * (i + 1)) for i in range(1, 9)]  # none overlap, nor the 1,000 below
    assert {run.flags['val_split'] for run in row.runs} == {'train[45000:46000]'}
    assert all('val_fraction' not in run.flags for run in row.runs)
    assert len(ids('table8', 'confirm', seeds=2)) == 2 * len(load_table('table8', 'confirm').rows)
    with pytest.raises(UserError, match='--seeds 9: expected at most 8, which the scale lists'):
        load_table('table8', 'confirm', seeds=9)


def test_exits_are_in_their_columns():
    runs = {label: [Run('cifar100', dict(method=label), seed) for seed in range(3)] for label in ('SE', 'two', 'three')}
    rows = [Row(('Net', label), found) for label, found in runs.items()]
    table = make_table()._replace(rows=rows, baselines=['SE'], show=['accuracy'])
    accuracies = {'two': (20, 34), 'three': (20, 21, 34.5)}
    results = {}
    for label, found in runs.items():
        for noise, one in enumerate(found):
            values = [30 + noise] if label == 'SE' else [v + noise / 10 for v in accuracies[label]]
            results[one.id] = dict(record(one, *values), test=values)
    text = report(table, results, 'cpu')
    assert '| Net | SE | 3 |  |  | 31.00 ± 1.00 | 31.00' in text
    assert '| Net | two | 3 | 20.10 ± 0.10 | 34.10 ± 0.10 |  | 27.10' in text
    # the last exits, not the means: 34.1 against 31
    from scipy.stats import ttest_ind

    p = ttest_ind([34, 34.1, 34.2], [30, 31, 32], equal_var=False).pvalue
    assert f'| {p:.2g} |' in text and 'p is that of their last exits' in text


@pytest.mark.parametrize('more, message', [('--draws 1', '--draws 1: expected at least 2'), ('', 'none.pt')])
def test_mistakes_in_a_comparison_of_policies_are_one_line(more, message, monkeypatch, capsys, tmp_path):
    from experiments.policies import main

    monkeypatch.setattr(sys, 'argv', ['policies', '--logits', str(tmp_path / 'none.pt'), *more.split()])
    with pytest.raises(SystemExit) as exit:
        main()
    error = capsys.readouterr().err
    assert exit.value.code == 2 and message in error and error.count('\n') == 1


def test_a_stopped_comparison_of_policies_continues(monkeypatch, tmp_path):
    from experiments import policies

    done = []

    def one_draw(stored, num_images, draw, policy):
        done.append((num_images, draw, policy))
        return [draw, 1.0, 2.0] if policy == 'margin' else [draw + 0.5, 1.0, num_images]

    monkeypatch.setattr(policies, 'one_draw', one_draw)
    path = tmp_path / 'output' / 'draws.jsonl'
    first = policies.Draws(path, 'one')
    assert [first.result({}, 100, draw, 'margin')[0] for draw in (0, 1, 0)] == [0, 1, 0]
    again = policies.Draws(path, 'one')
    found = {name: [again.result({}, 100, draw, name) for draw in range(3)] for name in ('margin', 'EENet')}
    assert done == [(100, 0, 'margin'), (100, 1, 'margin'), (100, 2, 'margin'), *((100, i, 'EENet') for i in range(3))]
    # other images to fit, other logits
    again.result({}, 50, 0, 'margin')
    policies.Draws(path, 'two').result({}, 100, 0, 'margin')
    assert done[6:] == [(50, 0, 'margin'), (100, 0, 'margin')]
    lead = policies.compare(found).splitlines()[-1].split()
    assert lead[:4] == ['EENet', '1.50', '0.50', '0.00']
