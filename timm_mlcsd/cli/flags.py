"""The parsers of train.py and validate.py: timm's flags under timm's names, plus those of the exits.

Defaults are those of the configurations that the flags fill.
"""

import argparse

from ..adaptive import AGGREGATES, RISKS, SCORES, THRESHOLD_METHODS
from ..data import CORRUPTIONS
from ..engine.config import TrainConfig
from ..engine.validate_config import ValidateConfig
from .arguments import ScriptParser, budget, confidence, integer, number, positive_float
from .data_flags import add_data_flags, add_device_flags, add_train_data_flags
from .model_flags import add_loss_flags, add_model_flags
from .run_flags import add_process_flags, add_run_flags
from .training_flags import add_training_flags

__all__ = ['train_parser', 'validate_parser']


def train_parser() -> argparse.ArgumentParser:
    """The flags of train.py."""
    parser = ScriptParser(
        prog='train.py',
        description='Train a multi-exit network',
    )
    parser.add_argument(
        '-c', '--config', metavar='FILE', help='YAML file of flags, which the command line overrides (default: none)'
    )
    add_train_data_flags(add_data_flags(parser, trains=True))
    add_model_flags(parser)
    add_loss_flags(parser)
    add_training_flags(parser)
    add_device_flags(parser)
    add_process_flags(parser)
    add_run_flags(parser)
    parser.set_defaults(**TrainConfig().to_dict())
    return parser


def validate_parser() -> argparse.ArgumentParser:
    """The flags of validate.py."""
    parser = ScriptParser(
        prog='validate.py',
        description='What every exit of a network costs and gets right',
    )
    parser.add_argument(
        '-c', '--config', metavar='FILE', help='YAML file of flags, which the command line overrides (default: none)'
    )
    group = add_data_flags(parser, trains=False)
    group.add_argument('--split', metavar='NAME', help='name of the split to evaluate on')
    group.add_argument(
        '--held-out',
        action='store_true',
        help='evaluate on the images that training held out of its train split, not on --split',
    )
    group.add_argument(
        '--real-labels',
        nargs='?',
        const=True,
        metavar='FILE',
        help="count the reassessed labels of ImageNet's validation images as right, those of a JSON file or else those "
        'that timm contains (default: the labels of the data)',
    )
    group.add_argument(
        '--valid-labels',
        metavar='FILE',
        help='text file of the class indices that the data has, one per line, as for ImageNet-A (default: all classes)',
    )
    _add_network_flags(parser.add_argument_group('Model'))
    add_device_flags(parser)
    group = parser.add_argument_group('Adaptive inference')
    _add_policy_goal_flags(group)
    _add_policy_file_flags(group)
    _add_result_flags(parser.add_argument_group('Results'))
    parser.set_defaults(**ValidateConfig().to_dict())
    return parser


def _add_network_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        '--checkpoint',
        metavar='PATH',
        help='checkpoint of train.py, or folder of a run for its best one (default: none, --model names the network)',
    )
    group.add_argument(
        '--model',
        metavar='NAME',
        help='saved network, hf-hub:REPO or local-dir:PATH (default: none, --checkpoint names the network)',
    )
    group.add_argument('--use-ema', action='store_true', help='evaluate the averaged weights of the checkpoint')


def _add_policy_goal_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        '--adaptive',
        action='store_true',
        help='let images leave at early exits by an exit policy, and report that too',
    )
    group.add_argument(
        '--budget',
        type=budget,
        metavar='B',
        help='fit a policy: the best within a mean cost per image of B MMACs, or of a percentage of the plain backbone '
        'such as 60%% (default: no such limit)',
    )
    group.add_argument(
        '--latency-budget',
        type=positive_float,
        metavar='MS',
        help='fit a policy: the best within a mean of MS milliseconds per image, measured here at batch size 1 '
        '(default: no such limit)',
    )
    group.add_argument(
        '--max-drop',
        type=number(at_least=-100, at_most=100),
        metavar='P',
        help='fit a policy: the cheapest whose --risk is at most P percentage points (default: no such limit)',
    )
    group.add_argument(
        '--confidence',
        type=confidence,
        metavar='C',
        help='probability with which the risk on new images is at most --max-drop; none to look at the calibration '
        'images alone, without a guarantee for others',
    )
    group.add_argument(
        '--risk',
        choices=RISKS,
        help='what --max-drop limits: accuracy lost against the last exit, share of wrong answers among early ones, or '
        'share of answers that differ from the last exit',
    )
    group.add_argument(
        '--score',
        choices=SCORES,
        help='certainty of an exit: top probability, 1 less the normalised entropy, margin of the two top '
        'probabilities or logits, or number of exits in a row that agree (default: confidence)',
    )
    group.add_argument(
        '--aggregate',
        choices=AGGREGATES,
        help='answer of an exit: its own, or a mean of all so far, with equal or with fitted weights (default: last)',
    )
    group.add_argument(
        '--method',
        choices=THRESHOLD_METHODS,
        help="how thresholds are found: a search for the best, halfway between that and exit rates, the best of "
        "MSDNet's exit rates, one quantile for all exits, the way of the paper, or what is best in cross-validation "
        '(default: auto)',
    )


def _add_policy_file_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        '--calibration-split',
        metavar='NAME',
        help='name of the split to fit the policy to (default: the images that chose the best epoch of the training)',
    )
    group.add_argument(
        '--calibration-images',
        nargs='+',
        default=[],
        metavar='PATH',
        help='files, folders or patterns of images without labels to fit the policy to, for --risk disagreement '
        '(default: images with labels, as above)',
    )
    group.add_argument(
        '--policy',
        metavar='FILE',
        help='file of the policy to use, if none is fitted (default: that beside the weights)',
    )
    group.add_argument(
        '--save-policy',
        nargs='?',
        const=True,
        metavar='FILE',
        help='write the fitted policy to FILE or else to exit_policy.json beside the weights (default: write none)',
    )


def _add_result_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        '--report',
        metavar='FILE',
        help='write a page on --adaptive for the browser to this .html file (default: no page)',
    )
    group.add_argument(
        '--results-file', metavar='FILE', help='write the table to this .csv or .json file (default: none)'
    )
    group.add_argument(
        '--against',
        nargs='+',
        default=[],
        metavar='NAME',
        help='networks without early exits to compare --adaptive with: checkpoints, or names of networks that timm has '
        'pretrained (default: none)',
    )
    group.add_argument(
        '--corruptions',
        nargs='+',
        choices=('all', *CORRUPTIONS),
        default=[],
        metavar='NAME',
        help='also run --adaptive on corrupted images, with the policy of the clean ones: all, or some of '
        f'{", ".join(CORRUPTIONS)} (default: none)',
    )
    group.add_argument('--severity', type=integer(1, 5), metavar='N', help='severity of --corruptions, 1 to 5')
    group.add_argument(
        '--exported',
        metavar='FOLDER',
        help='also run the stages that mlcsd-export wrote to this folder, and compare their answers (default: none)',
    )
    group.add_argument(
        '--trust-exported',
        action='store_true',
        help="load PyTorch's exported programs of --exported, which can run code, because their author is trusted",
    )
    group.add_argument('--plot', metavar='FILE', help='draw accuracy against cost to this .png file (default: no plot)')
