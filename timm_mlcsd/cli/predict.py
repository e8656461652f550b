"""Labels for images on the command line: ``mlcsd-predict CHECKPOINT|hf-hub:REPO|FOLDER INPUT...``."""

import argparse
import math
import time
from datetime import timedelta
from typing import Iterator, List, NamedTuple, Optional, Sequence, Tuple

import torch

from ..adaptive import AdaptiveModel, ExitPolicy
from ..data import Preprocessing
from ..distributed import init_distributed, launched_context
from ..engine.device import make_autocast, resolve_device, to_channels_last
from ..engine.prediction import (
    LABEL_TYPES,
    OUTPUT_TYPES,
    PredictConfig,
    choose_policy,
    find_images,
    labels,
    load,
    predict_to_file,
)
from ..errors import UserError, as_user_error, one_line, printable, run_script
from ..models import MultiExitModel
from .arguments import ScriptParser, positive_int, probability, text
from .data_flags import add_device_flags, add_loader_flags

__all__ = ['Answer', 'answer', 'main', 'predict']

HEADERS = ('Image', 'Labels', 'Exit', 'ms')
# number of labels per image in the terminal, by default
TOPK = 3
# processes with slow shares may end late
FOREVER = timedelta(days=30)


class Answer(NamedTuple):
    """What a network says of one image.

    Attributes:
        probabilities: [C].
        exit: The exit that answered, from 0.
        milliseconds: From the first stage to the answer.
    """

    probabilities: torch.Tensor
    exit: int
    milliseconds: float


def predict_parser() -> ScriptParser:
    """The flags of mlcsd-predict."""
    parser = ScriptParser(inputs='images', prog='mlcsd-predict', description='Label images with a multi-exit network')
    parser.add_argument('network', help='checkpoint of train.py, folder of a run, saved folder, or hf-hub:REPO')
    parser.add_argument(
        'images',
        nargs='*',
        default=[],
        metavar='INPUT',
        help="image file, folder of images, or pattern such as 'photos/**/*.jpg' (default: --dataset names the images)",
    )
    parser.add_argument('--use-ema', action='store_true', help='use the averaged weights of the checkpoint')
    parser.add_argument(
        '--threshold',
        type=probability,
        metavar='P',
        help='leave at the first exit whose top probability is at least this (default: the exit policy beside the '
        'weights decides; without one the last exit answers)',
    )
    parser.add_argument(
        '--no-policy', action='store_true', help='let the last exit answer every image, even if there is a policy'
    )
    _add_data_flags(parser)
    _add_output_flags(parser)
    add_device_flags(parser, compiles=False)
    parser.set_defaults(**PredictConfig().to_dict())
    return parser


def _add_data_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('Data')
    group.add_argument(
        '--dataset',
        '-d',
        metavar='NAME',
        help="data set to label instead of files: digits, or in timm's notation hfds/PATH, hfids/PATH, tfds/NAME, "
        'wds/NAME or torch/NAME; wds/ data needs labels, which are not used (default: none)',
    )
    group.add_argument('--data-dir', metavar='DIR', help='path to the data set (default: none)')
    group.add_argument('--split', metavar='NAME', help='name of the split of the data set')
    group.add_argument(
        '--input-key',
        help='column with the images, in data that has columns (default: the usual one, such as image)',
    )
    group.add_argument(
        '--dataset-download', action='store_true', help='download a data set of torch/, tfds/ or hfids/ that is missing'
    )
    group.add_argument(
        '--dataset-trust-remote-code', action='store_true', help='let a data set of the Hugging Face Hub run its code'
    )
    add_loader_flags(group)


def _add_output_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('Output')
    group.add_argument(
        '--output',
        type=text,
        metavar='FILE',
        help='write a row per image to this .csv, .jsonl or .parquet file, in batches; of several processes of '
        'torchrun each writes a part (default: a table in the terminal, one image after the other)',
    )
    group.add_argument('--resume', action='store_true', help='go on with the file of --output if it exists')
    group.add_argument(
        '--topk', type=positive_int, metavar='N', help=f'labels per image (default: {TOPK}, with --output 1)'
    )
    group.add_argument(
        '--label-type',
        choices=LABEL_TYPES,
        help="label of a class: its name, for ImageNet's classes also a description, short or detailed; or none, the "
        "index alone (default: names; for a network without names and with as many classes as ImageNet, descriptions)",
    )
    group.add_argument('--include-index', action='store_true', help='write the class index too, with --output')
    group.add_argument('--output-type', choices=OUTPUT_TYPES, help='value to write beside a label, with --output')
    group.add_argument('--filename-col', type=text, metavar='NAME', help='name of the column with files, with --output')


@torch.inference_mode()
def answer(model: MultiExitModel, image: torch.Tensor, policy: Optional[ExitPolicy] = None) -> Answer:
    """Run a network on one image [1, C, H, W] until it is sure.

    Args:
        model: A network in evaluation mode.
        image: The image, on the network's device.
        policy: When to stop; None for the last exit.
    """
    adaptive = None if policy is None else AdaptiveModel(model, policy, range(model.num_exits))
    start = time.perf_counter()
    if adaptive is None:
        k, logits = model.num_exits - 1, model(image)
    else:
        logits, exit_index, _ = adaptive.predict(image)
        k = int(exit_index.item())
    probabilities = logits[0].float().softmax(-1).cpu()
    return Answer(probabilities, k, 1000 * (time.perf_counter() - start))


def predict(config: PredictConfig) -> List[Answer]:
    """Label the images of a configuration; prints a line for each as soon as it is answered.

    Args:
        config: The prediction, without `output`.

    Returns:
        The answers.

    Raises:
        UserError: The network or the flags don't fit, or images cannot be read or have no finite logits; the others are
            answered first.
    """
    paths = find_images(config.images)
    network = load(config)
    model = network.model
    names = labels(network, config.label_type)
    texts = [printable(name) for name in names or map(str, range(model.num_classes))]
    with as_user_error(f'{config.network!r} cannot label files'):
        preprocessing = Preprocessing(network.data_config)
    device = resolve_device(config.device)
    model.to(device)
    if config.device.channels_last:
        model.to(memory_format=torch.channels_last)
    policy = choose_policy(config, network)
    top = min(config.topk or TOPK, model.num_classes)
    widths = (max(len(printable(path)) for path in paths), _label_width(texts, top), 4, 8)
    print(_row(HEADERS, widths), _row(['-' * width for width in widths], widths), sep='\n', flush=True)
    answers: List[Answer] = []
    unreadable: List[str] = []
    for path, image in _read(paths, preprocessing, unreadable):
        image = to_channels_last(image.to(device)) if config.device.channels_last else image.to(device)
        with make_autocast(config.device, device):
            if not answers:
                all_exits = policy and policy.with_thresholds([t if t == math.inf else 1e9 for t in policy.thresholds])
                answer(model, image, all_exits)  # setting up isn't timed
            found = answer(model, image, policy)
        if not found.probabilities.isfinite().all():
            unreadable.append(f'{path!r} has no answer: the logits of the network are not finite')
            continue
        answers.append(found)
        best = found.probabilities.topk(top)
        shown = [f'{texts[i]} {100 * p:.1f}%' for p, i in zip(best.values.tolist(), best.indices.tolist())]
        cells = (printable(path), ', '.join(shown), f'Ex{found.exit + 1}', f'{found.milliseconds:.1f}')
        print(_row(cells, widths), flush=True)
    if len(unreadable) > config.data.max_bad_samples:
        raise UserError(f'{len(unreadable)} of {len(paths)} images: {"; ".join(unreadable)}')
    return answers


def _read(
    paths: Sequence[str], preprocessing: Preprocessing, unreadable: List[str]
) -> Iterator[Tuple[str, torch.Tensor]]:
    """The images that can be read; what is wrong with the others is added to `unreadable`."""
    for path in paths:
        try:
            image = preprocessing(path)
        except Exception as e:  # decoders fail in as many ways as there are files
            unreadable.append(f'{path!r} cannot be read as an image: {one_line(e)}')
            continue
        yield path, image


def _label_width(texts: Sequence[str], count: int) -> int:
    """The width of a column for so many labels with their percentages; very long ones may stick out."""
    return min(count * (max(map(len, texts)) + len(' 100.0%, ')) - 2, 60)


def _row(cells: Sequence[str], widths: Sequence[int]) -> str:
    """Cells in columns: text to the left, numbers to the right."""
    image, found, exit_, milliseconds = cells
    return f'{image:<{widths[0]}}  {found:<{widths[1]}}  {exit_:<{widths[2]}}  {milliseconds:>{widths[3]}}'


def _predict(config: PredictConfig) -> None:
    has_data = bool(config.data.dataset or config.data.data_dir)
    if bool(config.images) == has_data:
        what = 'not both' if has_data else 'got neither'
        raise UserError(f'expected INPUT, a file, folder or pattern, or --dataset NAME; {what}.')
    if config.output:
        context = init_distributed(resolve_device(config.device), timeout=FOREVER)
        try:
            predict_to_file(config, context)
        finally:
            context.shutdown()
        return
    default = PredictConfig()
    for name in ('resume', 'include_index', 'output_type', 'filename_col'):
        if getattr(config, name) != getattr(default, name):
            raise UserError(f'--{name.replace("_", "-")}: only with --output FILE.')
    if has_data:
        raise UserError('--dataset: only with --output FILE, which gets a row per image.')
    if launched_context().size > 1:
        raise UserError('torchrun: several processes need --output FILE, of which each writes a part.')
    predict(config)


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Entry point of mlcsd-predict."""
    run_script('mlcsd-predict', lambda: _predict(PredictConfig.from_dict(vars(predict_parser().parse_args(argv)))))


if __name__ == '__main__':
    main()
