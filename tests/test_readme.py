"""What the README and the pages in docs/ show must run."""

import re
from pathlib import Path

import pytest
import timm
import torch
import yaml
from torch.distributed.run import get_args_parser as torchrun_parser

import timm_mlcsd  # noqa: F401  (registers the models)
from timm_mlcsd.cli.cost import cost_parser
from timm_mlcsd.cli.export import export_parser
from timm_mlcsd.cli.flags import train_parser, validate_parser
from timm_mlcsd.cli.predict import predict_parser
from timm_mlcsd.cli.push import push_parser

ROOT = Path(__file__).parents[1]
PATHS = [ROOT / 'README.md', *sorted(ROOT.glob('docs/*.md'))]
PAGES = {str(path.relative_to(ROOT)): path.read_text() for path in PATHS}
LINKED = [*PATHS, *sorted(ROOT.glob('experiments/*.md')), *sorted(ROOT.glob('benchmarks/*.md'))]
COMMANDS = {
    './train.py': train_parser,
    './validate.py': validate_parser,
    'mlcsd-cost': cost_parser,
    'mlcsd-export': export_parser,
    'mlcsd-predict': predict_parser,
    'mlcsd-push': push_parser,
}
# a training that is much shorter than the recipe of the README
SHORT = dict(epochs=1, batch_size=128, workers=0, model_kwargs={'channels': [4, 8, 8, 16]})


def python_blocks(page: str) -> list:
    return re.findall(r'```python\n(.*?)```', PAGES[page], re.S)


def flags_in(text: str) -> set:
    return set(re.findall(r'(?<![\w-])--[a-z][a-z-]+', text))


def options(parser) -> set:
    return {option for action in parser._actions for option in action.option_strings}


def anchors(path: Path) -> set:
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r'^#+ (.*)$', re.sub(r'^```.*?^```', '', path.read_text(), flags=re.S | re.M), re.M)
    return {re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings}


@pytest.fixture
def model():
    return timm.create_model('mlcsd_resnet18', num_classes=100, exits=8, small_input=True)


def test_all_examples_are_run_here():
    counts = {page: len(python_blocks(page)) for page in PAGES if python_blocks(page)}
    assert counts == {'README.md': 2, 'docs/models.md': 1, 'docs/adaptive.md': 2}


def test_training_loop_runs():
    namespace = dict(loader=[(torch.randn(2, 3, 32, 32), torch.randint(100, (2,)))])
    exec(python_blocks('README.md')[0], namespace)
    assert namespace['loss'].isfinite()


def test_training_from_python_runs(monkeypatch, tmp_path):
    recipe = yaml.safe_load((ROOT / 'configs' / 'quickstart.yaml').read_text())
    (tmp_path / 'configs').mkdir()
    (tmp_path / 'configs' / 'quickstart.yaml').write_text(yaml.safe_dump({**recipe, **SHORT}))
    monkeypatch.chdir(tmp_path)
    namespace = {}
    exec(python_blocks('README.md')[1], namespace)
    assert len(namespace['evaluation'].exits) == 4 and namespace['evaluation'].num_samples == 360
    assert namespace['folder'].parent.name == 'output' and (namespace['folder'] / 'model_best.pth.tar').is_file()


def test_early_exit_example_runs(model):
    namespace = dict(model=model, image=torch.randn(1, 3, 32, 32))
    exec(*python_blocks('docs/models.md'), namespace)
    assert namespace['logits'].shape == (1, 100)


def test_adaptive_example_runs(model, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    namespace = dict(model=model.eval(), images=torch.randn(2, 3, 32, 32))
    namespace.update(val_logits=torch.randn(8, 20, 100), val_targets=torch.randint(100, (20,)))
    calibration, stream = python_blocks('docs/adaptive.md')
    exec(calibration, namespace)
    assert namespace['logits'].shape == (2, 100)
    assert (tmp_path / 'exit_policy.json').is_file()
    namespace.update(batches=[torch.randn(3, 3, 32, 32), torch.randn(1, 3, 32, 32)])
    exec(stream, namespace)
    assert namespace['logits'].shape == (1, 100)


@pytest.mark.parametrize('page', PAGES)
def test_flags_exist(page):
    known = set().union(*(options(parser()) for parser in (*COMMANDS.values(), torchrun_parser)))
    known.add('--data')  # of python -m experiments.heads_only
    assert flags_in(PAGES[page]) <= known, flags_in(PAGES[page]) - known


@pytest.mark.parametrize('page', PAGES)
def test_command_lines_use_flags_of_their_command(page):
    for language, block in re.findall(r'^```(\w*)\n(.*?)^```$', PAGES[page].replace('\\\n', ' '), re.S | re.M):
        for line in [] if language else block.splitlines():
            command = line.partition(' ')[0]
            if command in COMMANDS:
                assert flags_in(line) <= options(COMMANDS[command]()), line


@pytest.mark.parametrize('page', LINKED, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page):
    for link in re.findall(r'\]\(([^)\s]+)\)', page.read_text()):
        # report/page.html is made when the site is built, and checked there
        if not re.match(r'\w+:', link) and link != 'report/page.html':
            name, _, anchor = link.partition('#')
            target = page.parent / name if name else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link
