"""Accuracy and cost of every exit of a trained network, and of a policy that lets images leave early."""

import csv
import importlib.util
import json
import logging
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch
from torch.utils.data import Dataset

from ..adaptive import ExitPolicy, evaluate_policy
from ..cost import ExitCost, exit_costs
from ..data import CORRUPTIONS, IMAGE_MODE, default_image_mode
from ..errors import UserError, as_user_error, install_hint
from ..hub import URI_SCHEMES
from ..models import MultiExitModel
from ..network import Network, load_network
from ..report import format_table, plot_accuracy_against_cost, write_page
from .benchmark import benchmark_policy, tables
from .build import resolve_data_config
from .class_metrics import ClassCounts
from .combinations import check_input
from .datasets import check_classes, class_names, load_dataset, same_split
from .device import resolve_device
from .evaluator import Evaluation, Evaluator, LabelledLogits, accumulate, finalize
from .exported import compare_exported, load_exported
from .fit_policy import backbone_macs, check_policy_flags, fit_or_load_policy, reports_on_half, saved_policy_path
from .gallery import ExampleGallery, page_data
from .held_out import halves_of, held_out, is_data_of, is_same_place
from .imagenet_labels import RealLabels, read_valid_labels
from .robustness import check_corruptible, corruption_rows, corruption_table, describe_corruptions, risk_limit
from .static_networks import StaticNetwork, benchmark_static, load_static, static_table
from .validate_config import ValidateConfig

__all__ = ['load_model', 'load_split', 'validate', 'with_trained_data']


_logger = logging.getLogger('validate')


def validate(config: ValidateConfig) -> List[Dict[str, Any]]:
    """Evaluate all exits; print the table, and write what the configuration asks for.

    Returns:
        One dict per exit, in the order of the table.

    Raises:
        UserError: Settings, data or checkpoint do not fit.
    """
    check_input(config.data)
    check_policy_flags(config)
    for flag, given in (('real_labels', config.real_labels), ('valid_labels', config.valid_labels)):
        if given and (config.adaptive or config.exported):
            raise UserError(f'--{flag.replace("_", "-")}: only without --adaptive and --exported.')
    if config.trust_exported and not config.exported:
        raise UserError('--trust-exported: expected --exported FOLDER.')
    _check_outputs(config)
    device = resolve_device(config.device)
    network = load_model(config)
    model = network.model
    config, data_config = with_trained_data(config, network)
    if (config.plot or config.adaptive) and not model.resumable:
        flag = '--adaptive' if config.adaptive else '--plot'
        raise UserError(f'{flag}: the exits have no cost of their own: {model.why_not_resumable}.')
    counted = exit_costs(model, data_config['input_size']) if model.resumable else []
    costs: Sequence[Optional[ExitCost]] = counted or [None] * model.num_exits
    dataset, split = load_split(config, network.checkpoint)
    names = class_names(dataset)
    valid = read_valid_labels(config.valid_labels, model.num_classes) if config.valid_labels else None
    if valid is not None and config.data.class_map and names and len(names) != len(valid):
        raise UserError(
            f'--valid-labels: expected data with the {len(valid)} classes of its file, got {len(names)} names from '
            f'--class-map; leave --class-map out.'
        )
    known = network.class_names if valid is None or not network.class_names else [network.class_names[i] for i in valid]
    check_classes(names, known, split)
    evaluator = Evaluator(model, data_config, config.data, config.device, device=device, classes=valid)
    if names and len(names) > evaluator.num_classes:
        raise UserError(f'the data has {len(names)} classes, the model {evaluator.num_classes}: they do not fit.')
    exported = load_exported(config.exported, evaluator, config.trust_exported) if config.exported else None
    if config.adaptive:
        result, about, classes = _validate_adaptive(config, network, evaluator, dataset, split, counted)
    else:
        classes = ClassCounts([f'Ex{k}' for k in range(1, model.num_exits + 1)], evaluator.num_classes)
        result, about = _evaluate(config, evaluator, dataset, classes), {}
        _print_exits(config, evaluator, result, costs, split)
    about['classes'] = classes.rows(names or known, valid)
    if exported is not None:
        comparison = compare_exported(exported, evaluator, evaluator.loader(dataset))
        print(f'\nExported, {config.exported}:\n{comparison.describe()}')
        about['exported'] = asdict(comparison)
    rows = _rows(model, result, costs)
    if config.results_file:
        _write_results(Path(config.results_file), rows, result, config.source, split, about)
    if config.plot:
        others = about.get('adaptive', {}).get('against', [])[2:]
        _plot(config.plot, rows, counted, result.num_samples, f'{config.source} on {split}', others)
    return rows


def _plot(
    path: str,
    rows: Sequence[Dict[str, Any]],
    costs: Sequence[ExitCost],
    num_samples: int,
    title: str,
    others: Sequence[Dict[str, Any]],
) -> None:
    exits = [(row['macs'] / 1e6, row['top1']) for row in rows]
    backbone = backbone_macs(costs) / 1e6, rows[-1]['top1']
    points = {row['name']: (row['mmacs'], row['top1']) for row in others if row['mmacs'] is not None}
    plot_accuracy_against_cost(path, exits, num_samples, backbone, title, points)


def _evaluate(config: ValidateConfig, evaluator: Evaluator, dataset: Dataset[Any], classes: ClassCounts) -> Evaluation:
    """The metrics of all exits, by the labels of the data or the reassessed ones of ImageNet."""
    batches = classes.counted(evaluator.batches(dataset))
    if not config.real_labels:
        return finalize(accumulate(batches))
    real = RealLabels(config.real_labels, dataset, evaluator.model.num_exits, evaluator.num_classes)
    return real.replace(finalize(accumulate(real.counted(batches))))


def _validate_adaptive(
    config: ValidateConfig,
    network: Network,
    evaluator: Evaluator,
    dataset: Dataset[Any],
    split: str,
    costs: Sequence[ExitCost],
) -> Tuple[Evaluation, Dict[str, Any], ClassCounts]:
    """Evaluate all exits, and a policy beside the plain backbone.

    Returns:
        The metrics of the exits, the record of the policy, and the answers of exits and policy per class.
    """
    names = class_names(dataset)
    static = [load_static(name, evaluator, names or network.class_names) for name in config.against]
    if config.corruptions:
        check_corruptible(evaluator, static, dataset)
    chosen = fit_or_load_policy(config, network, evaluator, dataset, split, costs)
    policy, origin = chosen.policy, chosen.origin
    loader = evaluator.loader(dataset)
    test = evaluator.logits(loader)
    result = test.evaluate()
    _print_exits(config, evaluator, result, costs, split)
    with as_user_error(f'the images of {split} do not fit the network'):
        adaptive = evaluate_policy(*test, costs, policy)
    gallery = ExampleGallery(adaptive, test, policy, evaluator.data_config) if config.report else None
    benchmark = benchmark_policy(evaluator, policy, loader, len(test.targets), gallery.collect if gallery else None)
    text, record = tables(policy, adaptive, benchmark, test, costs, config.data.batch_size)
    print(f'\nAdaptive, {origin}: {policy.score}, aggregate {policy.aggregate}', *chosen.describe(), text, sep='\n')
    record.update(chosen.record())
    if static:
        rows = benchmark_static(evaluator, policy, adaptive.cost, static, dataset, len(test.targets))
        print(f'\nBeside networks without early exits, in turn on the same images:\n{static_table(rows)}')
        record['against'] = rows
    if config.corruptions:
        record['corruptions'] = _validate_corrupted(config, evaluator, dataset, test, policy, costs, static)
    if config.save_policy:
        policy.save(saved_policy_path(config))
        print(f'policy: {saved_policy_path(config)}')
    if gallery is not None:
        assert chosen.val is not None  # a report needs the logits, so the policy comes with them
        title, about = f'{config.source} on {split}', '; '.join([origin, *chosen.describe_fit()])
        names = names or network.class_names
        data = page_data(
            title, about, policy, chosen.val, test, costs, benchmark, gallery, names, config.data.batch_size
        )
        data['against'] = [row for row in record.get('against', [])[2:] if row['mmacs'] is not None]
        write_page(config.report, data)
        print(f'page: {config.report}')
    classes = ClassCounts([*(f'Ex{k}' for k in range(1, len(costs) + 1)), 'adaptive'], evaluator.model.num_classes)
    classes.add(torch.cat([test.logits.argmax(-1), adaptive.prediction[None]]), test.targets)
    return result, dict(adaptive=record), classes


def _validate_corrupted(
    config: ValidateConfig,
    evaluator: Evaluator,
    dataset: Dataset[Any],
    test: LabelledLogits,
    policy: ExitPolicy,
    costs: Sequence[ExitCost],
    static: Sequence[StaticNetwork],
) -> List[Dict[str, Any]]:
    """Evaluate a policy on corrupted images, and print the table; returns its rows."""
    limit = risk_limit(policy, config.max_drop, config.risk)
    names = CORRUPTIONS if 'all' in config.corruptions else tuple(dict.fromkeys(config.corruptions))
    rows = corruption_rows(evaluator, dataset, test, policy, costs, static, limit.risk, names, config.severity)
    table = corruption_table(rows, limit.risk, [network.name for network in static])
    print(f'\nCorrupted images, severity {config.severity}:\n{table}')
    print(describe_corruptions(rows, limit))
    return rows


def _print_exits(
    config: ValidateConfig, evaluator: Evaluator, result: Evaluation, costs: Sequence[Optional[ExitCost]], split: str
) -> None:
    size = 'x'.join(map(str, evaluator.data_config['input_size']))
    print(f'{config.source}: {result.num_samples} images of {split}, input {size}')
    print(_table(_rows(evaluator.model, result, costs), result))


def _check_outputs(config: ValidateConfig) -> None:
    """Find out before the work whether its results can be written."""
    if config.results_file and Path(config.results_file).suffix not in ('.csv', '.json'):
        raise UserError(f'--results-file {config.results_file!r} must end in .csv or .json.')
    if config.plot and Path(config.plot).suffix != '.png':
        raise UserError(f'--plot {config.plot!r} must end in .png.')
    if config.plot and importlib.util.find_spec('matplotlib') is None:
        raise UserError(f'--plot needs matplotlib; {install_hint("plot")}.')
    if config.report and Path(config.report).suffix not in ('.html', '.htm'):
        raise UserError(f'--report {config.report!r} must end in .html.')
    policy = str(saved_policy_path(config)) if config.save_policy else None
    if policy and Path(policy).suffix != '.json':
        raise UserError(f'--save-policy {policy!r} must end in .json.')
    if policy and Path(policy).exists():
        with as_user_error(f'--save-policy {policy!r} would replace a file that is not a policy; name another'):
            ExitPolicy.load(policy)
    for path in filter(None, (config.results_file, config.plot, config.report, policy)):
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            is_new = not Path(path).exists()
            open(path, 'a').close()
            if is_new:
                Path(path).unlink()
        except OSError as e:
            raise UserError(f'{path!r} cannot be written: {e.strerror}.') from None


def load_model(config: ValidateConfig) -> Network:
    """Load the network that `checkpoint` or `model` names.

    Raises:
        UserError: There is none, or both are given.
    """
    if bool(config.checkpoint) == bool(config.model):
        raise UserError('give either --checkpoint PATH (of train.py) or --model hf-hub:REPO|local-dir:PATH.')
    if config.model and not config.model.startswith(URI_SCHEMES):
        raise UserError(f'--model {config.model!r} must be hf-hub:REPO or local-dir:PATH.')
    network = load_network(config.source, config.use_ema)
    if 'state_dict_ema' in network.checkpoint and not config.use_ema:
        _logger.warning('The checkpoint also has averaged weights, which chose its epoch: --use-ema evaluates them.')
    return network


def with_trained_data(config: ValidateConfig, network: Network) -> Tuple[ValidateConfig, Dict[str, Any]]:
    """Complete a configuration with what a network was trained on.

    Returns:
        The configuration, whose data is named and read as in training where the user has not said otherwise; and the
        preprocessing.

    Raises:
        UserError: The settings do not fit the network.
    """
    trained = network.checkpoint.get('args', {})
    data = replace(config.data)
    if not data.dataset and not data.data_dir:
        data.dataset, data.data_dir = trained.get('dataset', ''), trained.get('data_dir')
        data.class_map = data.class_map or trained.get('class_map', '')
    for key in ('input_key', 'target_key', 'input_img_mode', 'in_chans'):
        if getattr(data, key) is None:
            setattr(data, key, trained.get(key))
    data.in_chans = data.in_chans or network.model.in_chans
    data_config = resolve_data_config(data, network.model, network.checkpoint.get('data_config') or network.data_config)
    with as_user_error(f'--in-chans {data.in_chans}'):
        data.input_img_mode = data_config.get(IMAGE_MODE) or default_image_mode(data.in_chans)
    return replace(config, data=data), data_config


def load_split(config: ValidateConfig, checkpoint: Dict[str, Any]) -> Tuple[Dataset[Any], str]:
    """The data to evaluate on, a split or the images that training held out, and its name.

    Raises:
        UserError: It cannot be read, or it is what the checkpoint was trained on under another name.
    """
    if not config.held_out:
        # the folder that was trained on is no split of itself
        other = 'val_indices' in checkpoint and config.split != checkpoint.get('train_split')
        needs_folder = other and is_same_place(config.data, checkpoint)
        dataset = load_dataset(config.data, config.split, needs_folder=needs_folder)
        named = [checkpoint.get(name) for name in ('train_split', 'val_split')]
        meant = any(name and same_split(config.split, name) for name in named)
        if not meant and is_data_of(dataset, checkpoint):
            raise UserError(
                f'--split {config.split}: these are the images that the checkpoint was trained on; --split '
                f'{checkpoint["train_split"]} evaluates on them on purpose, --held-out on those held out.'
            )
        return dataset, config.split
    if 'val_indices' not in checkpoint:
        raise UserError('--held-out needs a checkpoint whose training held images out of its train split.')
    images, name = held_out(config.data, checkpoint)
    if reports_on_half(config):
        return halves_of(images)[1], f'the other half of {name}'
    return images, name


def _rows(model: MultiExitModel, result: Evaluation, costs: Sequence[Optional[ExitCost]]) -> List[Dict[str, Any]]:
    return [
        dict(
            exit=f'Ex{k}',
            tap=tap,
            top1=metrics.top1,
            top5=metrics.top5,
            loss=metrics.loss,
            rescued=metrics.overthinking,  # the name in results files
            **{name: getattr(cost, name, None) for name in ('macs', 'params', 'depth')},
        )
        for k, (tap, metrics, cost) in enumerate(zip(model.exit_names, result.exits, costs), 1)
    ]


def _table(rows: Sequence[Dict[str, Any]], result: Evaluation) -> str:
    headers = ('Exit', 'Tap', 'Top-1 %', 'Top-5 %', 'Loss', 'MMACs', 'Params M', 'Overthinking %')
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
    more: Dict[str, Any],
) -> None:
    about = dict(source=source, split=split, num_samples=result.num_samples, mean_top1=result.mean_top1, **more)
    if 'adaptive' in more:
        per_exit = more['adaptive']['exits']
        rows = [dict(row, **{k: v for k, v in here.items() if k != 'top1'}) for row, here in zip(rows, per_exit)]
    with open(path, 'w', newline='') as f:
        if path.suffix == '.json':
            json.dump(dict(about, exits=rows), f, indent=2)
            f.write('\n')
        else:
            writer = csv.DictWriter(f, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
