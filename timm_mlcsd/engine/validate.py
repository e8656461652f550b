"""What every exit of a trained network costs and gets right: the loop behind validate.py."""

import argparse
import csv
import importlib.util
import json
import logging
import sys
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

import torch

from ..adaptive import ExitPolicy, evaluate_policy
from ..cost import ExitCost, exit_costs
from ..data import IMAGE_MODE, default_image_mode
from ..errors import UserError, blame, install_hint, run_script
from ..hub import SOURCES
from ..models import MultiExitModel
from ..network import Network, load_network
from ..report import format_table, plot_accuracy_against_cost, write_page
from .adaptive import run_adaptive, tables
from .build import autocast_of, compiled, data_config_of, resolve_device
from .calibration import Logits, check_flags, policy_of, policy_path, reports_on_half
from .config import parse_args
from .datasets import check_classes, class_names, load_dataset, same_split
from .evaluate import Evaluation, evaluate, exit_logits
from .flags import validate_parser
from .held_out import halves_of, held_out, is_data_of, is_same_data
from .loaders import eval_loader
from .page import Album, page_data

__all__ = ['data_flags_from', 'load_model', 'load_split', 'main', 'validate']


_logger = logging.getLogger('validate')


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Entry point of validate.py and mlcsd-validate."""
    run_script('validate.py', lambda: validate(parse_args(validate_parser(), argv)))


def validate(args: argparse.Namespace) -> List[Dict[str, Any]]:
    """Evaluate all exits as the flags say; print the table, write what was asked for.

    Returns:
        One dict per exit, in the order of the table.

    Raises:
        UserError: The flags, the data or the checkpoint don't fit.
    """
    check_flags(args)
    _check_outputs(args)
    device = resolve_device(args)
    network = load_model(args)
    model, checkpoint = network.model, network.checkpoint
    data_flags_from(args, checkpoint)
    args.in_chans = args.in_chans or model.in_chans
    data_config = data_config_of(args, model, checkpoint.get('data_config') or network.data_config)
    with blame(f'--in-chans {args.in_chans}'):
        args.input_img_mode = data_config.get(IMAGE_MODE) or default_image_mode(args.in_chans)
    if (args.plot or args.adaptive) and not model.resumable:
        flag = '--adaptive' if args.adaptive else '--plot'
        raise UserError(f'{flag}: the exits have no cost of their own: {model.why_not_resumable}.')
    costs = exit_costs(model, data_config['input_size']) if model.resumable else [None] * model.num_exits

    dataset, split = load_split(args, checkpoint)
    names = class_names(dataset)
    check_classes(names, network.class_names, split)
    if names and len(names) > model.num_classes:
        raise UserError(f'the data has {len(names)} classes, the model {model.num_classes}: they do not fit.')
    model.to(device)
    if args.channels_last:
        model.to(memory_format=torch.channels_last)
    forward = compiled(model.forward_exits, args)

    def loader_of(dataset: Any) -> Any:
        with blame('the data flags cannot be used'):
            return eval_loader(args, dataset, data_config, device, num_classes=model.num_classes)

    def batches_of(loader: Any) -> Iterator[Tuple[torch.Tensor, torch.Tensor]]:
        return exit_logits(model, loader, device, autocast_of(args, device), args.channels_last, forward)

    source = args.checkpoint or args.model
    size = 'x'.join(map(str, data_config['input_size']))
    if not args.adaptive:
        result = evaluate(batches_of(loader_of(dataset)))
        rows, record = _rows(model, result, costs), {}
        print(f'{source}: {result.num_samples} images of {split}, input {size}\n{_table(rows, result)}')
    else:
        policy, val, fitted_to = policy_of(args, network, names, costs, loader_of, batches_of)
        loader = loader_of(dataset)
        test = Logits.of(batches_of(loader))
        result = evaluate(zip(test.logits.split(1024, dim=1), test.targets.split(1024)))
        rows = _rows(model, result, costs)
        print(f'{source}: {result.num_samples} images of {split}, input {size}\n{_table(rows, result)}')
        with blame(f'the images of {split} do not fit the network'):
            adaptive = evaluate_policy(*test, costs, policy)
        album = Album(adaptive, test, policy, data_config) if args.report else None
        run = run_adaptive(args, model, policy, loader, len(test.targets), device, album and album.look)
        text, record = tables(policy, adaptive, run, test, costs, args.batch_size)
        print(f'\nAdaptive, {fitted_to}: {policy.score}, aggregate {policy.aggregate}\n{text}')
        record['fitted_to'] = fitted_to
        if args.save_policy:
            policy.save(policy_path(args))
            print(f'policy: {policy_path(args)}')
        if args.report:
            names = names or network.class_names
            title = f'{source} on {split}'
            write_page(args.report, page_data(title, fitted_to, policy, val, test, costs, run, album, names))
            print(f'page: {args.report}')
    if args.results_file:
        _write_results(Path(args.results_file), rows, result, source, split, record)
    if args.plot:
        points = [(row['macs'] / 1e6, row['top1']) for row in rows]
        plot_accuracy_against_cost(args.plot, {source: points}, title=f'{source} on {split}')
    return rows


def _check_outputs(args: argparse.Namespace) -> None:
    """Find out before the work whether its results can be written."""
    if args.results_file and Path(args.results_file).suffix not in ('.csv', '.json'):
        raise UserError(f'--results-file {args.results_file!r} must end in .csv or .json.')
    if args.plot and Path(args.plot).suffix != '.png':
        raise UserError(f'--plot {args.plot!r} must end in .png.')
    if args.plot and importlib.util.find_spec('matplotlib') is None:
        raise UserError(f'--plot needs matplotlib; {install_hint("plot")}.')
    if args.report and Path(args.report).suffix not in ('.html', '.htm'):
        raise UserError(f'--report {args.report!r} must end in .html.')
    policy = str(policy_path(args)) if args.save_policy else None
    if policy and Path(policy).suffix != '.json':
        raise UserError(f'--save-policy {policy!r} must end in .json.')
    if policy and Path(policy).exists():
        with blame(f'--save-policy {policy!r} would replace a file that is not a policy; name another'):
            ExitPolicy.load(policy)
    for path in filter(None, (args.results_file, args.plot, args.report, policy)):
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            is_new = not Path(path).exists()
            open(path, 'a').close()
            if is_new:
                Path(path).unlink()
        except OSError as e:
            raise UserError(f'{path!r} cannot be written: {e.strerror}.') from None


def load_model(args: argparse.Namespace) -> Network:
    """The network that ``--checkpoint`` or ``--model`` names, with its weights."""
    if bool(args.checkpoint) == bool(args.model):
        raise UserError('give either --checkpoint PATH (of train.py) or --model hf-hub:REPO|local-dir:PATH.')
    if args.model and not args.model.startswith(SOURCES):
        raise UserError(f'--model {args.model!r} must be hf-hub:REPO or local-dir:PATH.')
    network = load_network(args.checkpoint or args.model, args.use_ema)
    if 'state_dict_ema' in network.checkpoint and not args.use_ema:
        _logger.warning('The checkpoint also has averaged weights, which chose its epoch: --use-ema evaluates them.')
    return network


def data_flags_from(args: argparse.Namespace, checkpoint: Dict[str, Any]) -> None:
    """Where the flags name no data, fill in what the checkpoint was trained on."""
    trained = checkpoint.get('args', {})
    if not args.dataset and not args.data_dir:
        args.dataset, args.data_dir = trained.get('dataset', ''), trained.get('data_dir')
        args.class_map = args.class_map or trained.get('class_map', '')
    for key in ('input_key', 'target_key', 'input_img_mode', 'in_chans'):
        if getattr(args, key) is None:
            setattr(args, key, trained.get(key))


def load_split(args: argparse.Namespace, checkpoint: Dict[str, Any]) -> Tuple[Any, str]:
    """The data to evaluate on, ``--split`` or what training held out, and what to call it."""
    if not args.held_out:
        # the folder that was trained on is no split of itself
        of_it = is_same_data(args, checkpoint) and args.split != checkpoint.get('train_split')
        dataset = load_dataset(args, args.split, needs_folder=of_it and 'val_indices' in checkpoint)
        named = [checkpoint.get(name) for name in ('train_split', 'val_split')]
        meant = any(name and same_split(args.split, name) for name in named)
        if not meant and is_data_of(dataset, checkpoint):
            raise UserError(
                f'--split {args.split}: these are the images that the checkpoint was trained on; --split '
                f'{checkpoint["train_split"]} evaluates on them on purpose, --held-out on those held out.'
            )
        return dataset, args.split
    if 'val_indices' not in checkpoint:
        raise UserError('--held-out needs a checkpoint whose training held images out of its train split.')
    dataset, name = held_out(args, checkpoint)
    if reports_on_half(args):
        return halves_of(dataset)[1], f'the other half of {name}'
    return dataset, name


def _rows(model: MultiExitModel, result: Evaluation, costs: Sequence[Optional[ExitCost]]) -> List[Dict[str, Any]]:
    return [
        dict(
            exit=f'Ex{k}',
            tap=tap,
            **metrics._asdict(),
            **{name: getattr(cost, name, None) for name in ('macs', 'params', 'depth')},
        )
        for k, (tap, metrics, cost) in enumerate(zip(model.exit_names, result.exits, costs), 1)
    ]


def _table(rows: Sequence[Dict[str, Any]], result: Evaluation) -> str:
    headers = ('Exit', 'Tap', 'Top-1 %', 'Top-5 %', 'Loss', 'MMACs', 'Params M', 'Right here, wrong at the last %')
    lines = [
        (
            *(r[key] for key in ('exit', 'tap', 'top1', 'top5', 'loss')),
            *(r[key] and r[key] / 1e6 for key in ('macs', 'params')),
            r['rescued'],
        )
        for r in rows
    ]
    return format_table(headers, [*lines, ('Mean', None, result.mean_top1, *[None] * 5)])


def _write_results(
    path: Path,
    rows: Sequence[Dict[str, Any]],
    result: Evaluation,
    source: str,
    split: str,
    record: Dict[str, Any],
) -> None:
    about = dict(source=source, split=split, num_samples=result.num_samples, mean_top1=result.mean_top1)
    if record:
        about['adaptive'] = record
        rows = [dict(row, **{k: v for k, v in here.items() if k != 'top1'}) for row, here in zip(rows, record['exits'])]
    with open(path, 'w', newline='') as f:
        if path.suffix == '.json':
            json.dump(dict(about, exits=rows), f, indent=2)
            f.write('\n')
        else:
            writer = csv.DictWriter(f, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == '__main__':
    main(sys.argv[1:])
