"""Compare exits that are added to a trained network with exits that are trained with the network.

    python -m experiments.heads_only --scale cpu --data FOLDER_WITH_CIFAR100_PARQUET

Trains the plain ResNet18 of Table 2 and its MENM. Then adds exits to the plain network with configs/heads_only.yaml:
without distillation, with the last exit as teacher, and with all exits as teachers. Prints minutes and test accuracy
per exit, and whether the weights of the backbone and the last exit's logits on all test images are unchanged bit for
bit.
"""

import argparse
from pathlib import Path
from typing import Any, Dict

import torch
import yaml
from safetensors.torch import save_file

from timm_mlcsd.cli.arguments import ScriptParser
from timm_mlcsd.errors import UserError, run_script
from timm_mlcsd.report import format_table

from .measure import RunEvaluator
from .plan import ROOT, Run, load_table
from .runner import Runner, load_results

TEACHERS = {
    'heads only, no distillation': dict(distill='none'),
    'heads only, last exit as teacher': dict(distill='one-for-all'),
    'heads only, all exits as teachers': dict(distill='all-for-all'),
}


def heads_only(whole: Run, weights: Path, **teacher: Any) -> Run:
    """Derive the run that trains only the exits of a network.

    Args:
        whole: Run that trains the whole network.
        weights: File with the weights of the plain network.
        **teacher: Flags that choose the teacher.

    Returns:
        The run.
    """
    recipe: Dict[str, Any] = yaml.safe_load((ROOT / 'configs' / 'heads_only.yaml').read_text())
    return whole._replace(flags={**whole.flags, **recipe, **teacher, 'initial_checkpoint': str(weights)})


def main() -> None:
    """Train the networks and print the comparison."""
    parser = ScriptParser(prog='experiments.heads_only', description=__doc__.splitlines()[0])
    parser.add_argument('--scale', default='cpu')
    parser.add_argument('--data', metavar='PATH', help='folder with the Parquet files')
    parser.add_argument('--work', type=Path, default=ROOT / 'output' / 'heads_only', metavar='DIR')
    parser.add_argument('--device', help='device, as for train.py')
    args: argparse.Namespace = parser.parse_args()
    rows = {row.labels: row.runs[0] for row in load_table('table2', args.scale, seeds=1).rows}
    plain, menm, taught = (rows['ResNet18', method] for method in ('SE', 'MENM', 'One for all'))
    args.work.mkdir(parents=True, exist_ok=True)
    results = args.work / 'results.jsonl'
    runner = Runner(results, args.work.resolve(), args.data, args.scale, args.device)

    def train(*runs: Run) -> None:
        errors = runner.run(list(runs), jobs=1)
        if errors:
            raise UserError(' '.join(errors))

    def evaluator(run: Run) -> RunEvaluator:
        return RunEvaluator(args.work / run.id / 'train', args.device)

    train(plain)
    before = evaluator(plain)
    backbone = before.model.backbone.state_dict()
    weights = args.work.resolve() / 'plain.safetensors'
    save_file(backbone, weights)
    heads_only_runs = {name: heads_only(taught, weights, **teacher) for name, teacher in TEACHERS.items()}
    train(*heads_only_runs.values(), menm)

    answers = before.logits('test').logits[-1]
    records, table = load_results(results), []
    for name, run in {'plain network': plain, **heads_only_runs, 'whole network, no distillation': menm}.items():
        test, minutes, same = records[run.id]['test'], records[run.id]['seconds'] / 60, ''
        if name in heads_only_runs:
            after = evaluator(run)
            state = after.model.backbone.state_dict()
            tensors = state.keys() == backbone.keys() and all(torch.equal(t, backbone[n]) for n, t in state.items())
            same = 'yes' if tensors and torch.equal(after.logits('test').logits[-1], answers) else 'NO'
        exits = ' '.join(f'{accuracy:.1f}' for accuracy in test)
        table.append((name, run.flags['epochs'], minutes, exits, sum(test) / len(test), same))
    print(format_table(('', 'epochs', 'minutes', 'exits, test top-1', 'mean', 'same backbone'), table))


if __name__ == '__main__':
    run_script('experiments.heads_only', main)
