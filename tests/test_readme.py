"""What the README shows must run."""

import re
from pathlib import Path

import torch

from timm_mlcsd.cli.arguments import ScriptParser
from timm_mlcsd.cli.flags import train_parser, validate_parser
from timm_mlcsd.cli.predict import predict_parser
from timm_mlcsd.cli.push import push_parser

README = (Path(__file__).parents[1] / 'README.md').read_text()


def test_python_examples_run_in_order(monkeypatch, tmp_path):
    blocks = re.findall(r'```python\n(.*?)```', README, re.S)
    assert len(blocks) == 3
    loader = [(torch.randn(2, 3, 32, 32), torch.randint(100, (2,)))]
    namespace = dict(loader=loader, image=torch.randn(1, 3, 32, 32))
    namespace.update(val_logits=torch.randn(8, 20, 100), val_targets=torch.randint(100, (20,)))
    monkeypatch.chdir(tmp_path)
    for block in blocks:
        exec(block, namespace)
    assert namespace['loss'].isfinite() and namespace['logits'].shape == (2, 100)
    assert (tmp_path / 'exit_policy.json').is_file()


def test_flags_exist():
    parsers = [train_parser(), validate_parser(), predict_parser(), push_parser(), ScriptParser()]
    known = {option for parser in parsers for action in parser._actions for option in action.option_strings}
    known |= {'--input-size'}
    named = set(re.findall(r'(?<![\w-])--[a-z][a-z-]+', README))
    assert named <= known, named - known
