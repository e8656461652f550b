"""Labels for images on the command line: ``mlcsd-predict CHECKPOINT|hf-hub:REPO|FOLDER IMAGE...``."""

import argparse
import logging
import math
import time
from typing import Iterator, List, NamedTuple, Optional, Sequence, Tuple

import torch

from ..adaptive import AdaptiveModel, ExitPolicy
from ..data import ClassNames, Preprocessing, class_label
from ..errors import UserError, as_user_error, one_line, printable, run_script
from ..models import MultiExitModel
from ..network import Network, load_network
from .arguments import ScriptParser, positive_int, probability

__all__ = ['Answer', 'answer', 'main', 'predict']

_logger = logging.getLogger('predict')

HEADERS = ('Image', 'Labels', 'Exit', 'ms')


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
    parser = ScriptParser(prog='mlcsd-predict', description='Label images with a multi-exit network')
    parser.add_argument('network', help='checkpoint of train.py, folder of a run, saved folder, or hf-hub:REPO')
    parser.add_argument('images', nargs='+', metavar='IMAGE', help='image file to label')
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
    parser.add_argument('--topk', type=positive_int, default=3, metavar='N', help='labels to show per image')
    parser.add_argument('--use-ema', action='store_true', help='use the averaged weights of the checkpoint')
    parser.add_argument('--device', default='cpu', help='device to run on, such as cpu or cuda')
    return parser


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


def _policy(args: argparse.Namespace, network: Network) -> Optional[ExitPolicy]:
    """When to stop: as ``--threshold`` says, else as the policy beside the weights does."""
    model = network.model
    if args.threshold is None and (network.policy_file is None or args.no_policy):
        return None
    if not model.resumable:
        if args.threshold is None:
            _logger.warning(f'The exit policy is not used: the network runs as a whole: {model.why_not_resumable}.')
            return None
        raise UserError(f'--threshold: the network answers at its last exit only: {model.why_not_resumable}.')
    if args.threshold is not None:
        return ExitPolicy((args.threshold,) * (model.num_exits - 1))
    assert network.policy_file is not None  # without it and a threshold there is no policy
    with as_user_error('the exit policy cannot be used, --no-policy does without it'):
        policy = ExitPolicy.load_for(network.policy_file, model)
    return policy.without_digest()  # checked once, not with every image


def predict(args: argparse.Namespace) -> List[Answer]:
    """Label the images that the flags name; prints a line for each as soon as it is answered.

    Raises:
        UserError: The network or the flags don't fit, or images cannot be read; the others are answered first.
    """
    network = load_network(args.network, args.use_ema)
    model, names = network.model, network.class_names
    if not model.num_classes:
        raise UserError(f'{args.network!r} has no classes to tell apart (num_classes=0).')
    with as_user_error(f'{args.network!r} cannot label files'):
        preprocessing = Preprocessing(network.data_config)
    with as_user_error(f'--device {args.device} cannot be used'):
        model.to(args.device)
    policy = _policy(args, network)
    top = min(args.topk, model.num_classes)
    widths = (max(len(printable(path)) for path in args.images), _label_width(names, model.num_classes, top), 4, 8)
    print(_row(HEADERS, widths), _row(['-' * width for width in widths], widths), sep='\n', flush=True)
    answers: List[Answer] = []
    unreadable: List[str] = []
    for path, image in _read(args, preprocessing, unreadable):
        if not answers:
            all_exits = policy and policy.with_thresholds([t if t == math.inf else 1e9 for t in policy.thresholds])
            answer(model, image, all_exits)  # setting up isn't timed
        answers.append(answer(model, image, policy))
        best = answers[-1].probabilities.topk(top)
        labels = [
            f'{printable(class_label(names, i))} {100 * p:.1f}%'
            for p, i in zip(best.values.tolist(), best.indices.tolist())
        ]
        cells = (printable(path), ', '.join(labels), f'Ex{answers[-1].exit + 1}', f'{answers[-1].milliseconds:.1f}')
        print(_row(cells, widths), flush=True)
    if unreadable:
        raise UserError(f'{len(unreadable)} of {len(args.images)} images: {"; ".join(unreadable)}')
    return answers


def _read(
    args: argparse.Namespace, preprocessing: Preprocessing, unreadable: List[str]
) -> Iterator[Tuple[str, torch.Tensor]]:
    """The images that can be read, on the device; what is wrong with the others is added to `unreadable`."""
    for path in args.images:
        try:
            image = preprocessing(path)
        except Exception as e:  # decoders fail in as many ways as there are files
            unreadable.append(f'{path!r} cannot be read as an image: {one_line(e)}')
            continue
        yield path, image.to(args.device)


def _label_width(names: Optional[ClassNames], num_classes: int, count: int) -> int:
    """The width of a column for so many labels with their percentages; very long ones may stick out."""
    longest = max(len(printable(class_label(names, index))) for index in range(num_classes))
    return min(count * (longest + len(' 100.0%, ')) - 2, 60)


def _row(cells: Sequence[str], widths: Sequence[int]) -> str:
    """Cells in columns: text to the left, numbers to the right."""
    image, labels, exit_, milliseconds = cells
    return f'{image:<{widths[0]}}  {labels:<{widths[1]}}  {exit_:<{widths[2]}}  {milliseconds:>{widths[3]}}'


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Entry point of mlcsd-predict."""
    run_script('mlcsd-predict', lambda: predict(predict_parser().parse_args(argv)))


if __name__ == '__main__':
    main()
