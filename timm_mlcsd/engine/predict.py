"""Labels for images on the command line: ``mlcsd-predict CHECKPOINT|hf-hub:REPO|FOLDER IMAGE...``."""

import argparse
import logging
import math
import sys
import time
from typing import List, NamedTuple, Optional, Sequence

import torch
from PIL import Image, ImageOps
from timm.data import create_transform

from ..adaptive import AdaptiveModel, ExitPolicy
from ..arguments import ScriptParser, positive_int, probability
from ..errors import UserError, blame, run_script, shortened
from ..models import MultiExitModel
from ..network import Network, load_network
from ..report import format_table

__all__ = ['Answer', 'answer', 'main', 'predict']

_logger = logging.getLogger('predict')

# how an image file is read for a number of channels
_MODES = {1: 'L', 3: 'RGB', 4: 'RGBA'}


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
    parser.add_argument('network', help='a checkpoint of train.py or the folder of a run, hf-hub:REPO, a saved folder')
    parser.add_argument('images', nargs='+', metavar='IMAGE', help='image files')
    parser.add_argument(
        '--threshold',
        type=probability,
        metavar='P',
        help='leave at the first exit whose top probability is at least this (default: the exit policy beside the '
        'weights decides; without one the last exit answers)',
    )
    parser.add_argument(
        '--no-policy', action='store_true', help='let the last exit answer, also where there is a policy'
    )
    parser.add_argument('--topk', type=positive_int, default=3, metavar='N', help='labels to show')
    parser.add_argument('--use-ema', action='store_true', help='use the averaged weights of a checkpoint')
    parser.add_argument('--device', default='cpu', help='where to run')
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
        k = exit_index.item()
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
        return ExitPolicy([args.threshold] * (model.num_exits - 1))
    with blame('the exit policy cannot be used'):
        policy = ExitPolicy.load(network.policy_file)
        policy.check(model.num_exits, model.exit_names)
    return policy


def predict(args: argparse.Namespace) -> List[Answer]:
    """Label the images that the flags name; prints a table."""
    network = load_network(args.network, args.use_ema)
    model, names = network.model, network.class_names
    if not model.num_classes:
        raise UserError(f'{args.network!r} has no classes to tell apart (num_classes=0).')
    if model.in_chans not in _MODES:
        raise UserError(f'{args.network!r} takes images of {model.in_chans} channels, which image files do not have.')
    with blame(f'--device {args.device} cannot be used'):
        model.to(args.device)
    policy = _policy(args, network)
    transform = create_transform(**network.data_config, is_training=False)
    answers, rows, unreadable = [], [], []
    for path in args.images:
        try:
            with Image.open(path) as file:
                picture = ImageOps.exif_transpose(file).convert(_MODES[model.in_chans])
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
            unreadable.append(f'{path!r} cannot be read as an image: {shortened(e)}')
            continue
        image = transform(picture).unsqueeze(0).to(args.device)
        if not answers:
            all_exits = policy and policy.with_thresholds([t if t == math.inf else 1e9 for t in policy.thresholds])
            answer(model, image, all_exits)  # setting up isn't timed
        answers.append(answer(model, image, policy))
        top = answers[-1].probabilities.topk(min(args.topk, model.num_classes))
        labels = [
            f'{names[i] if names else i} {100 * p:.1f}%' for p, i in zip(top.values.tolist(), top.indices.tolist())
        ]
        rows.append((path, ', '.join(labels), f'Ex{answers[-1].exit + 1}', f'{answers[-1].milliseconds:.1f}'))
    if rows:
        print(format_table(('Image', 'Labels', 'Exit', 'ms'), rows))
    if unreadable:
        raise UserError('; '.join(unreadable))
    return answers


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Entry point of mlcsd-predict."""
    run_script('mlcsd-predict', lambda: predict(predict_parser().parse_args(argv)))


if __name__ == '__main__':
    main(sys.argv[1:])
