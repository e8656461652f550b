"""A trained network, with its exit policy if it has one, to the Hub: ``mlcsd-push CHECKPOINT REPO``."""

import argparse
import sys
from typing import Optional, Sequence

from ..adaptive import ExitPolicy
from ..arguments import ScriptParser
from ..errors import blame, run_script
from ..hub import push_to_hub
from ..network import load_network

__all__ = ['main', 'push']

# what a reader of the card wants to know of the training
_SETTINGS = (
    'distill',
    'alpha',
    'beta',
    'gamma',
    'temperature',
    'epochs',
    'batch_size',
    'opt',
    'lr',
    'sched',
    'weight_decay',
    'smoothing',
    'seed',
)


def push_parser() -> ScriptParser:
    """The flags of mlcsd-push."""
    parser = ScriptParser(prog='mlcsd-push', description='Upload a trained multi-exit network to the Hugging Face Hub')
    parser.add_argument('checkpoint', help='a checkpoint of train.py, the folder of a run, or a saved folder')
    parser.add_argument('repo', help='OWNER/NAME, or NAME in your own namespace; made if it is not there')
    parser.add_argument('--private', action='store_true', help='make a new repository private')
    parser.add_argument('--revision', metavar='BRANCH', help='branch to commit to')
    parser.add_argument('--license', default='apache-2.0', help='what the model card says')
    parser.add_argument('--use-ema', action='store_true', help='upload the averaged weights')
    return parser


def push(args: argparse.Namespace) -> str:
    """Upload as the flags say; prints and returns the address of the commit."""
    network = load_network(args.checkpoint, args.use_ema)
    trained = network.checkpoint
    card = {}
    if 'results' in trained:
        card = dict(results=trained['results'], measured_on=trained['measured_on'])
    if trained:
        card['training'] = {key: trained['args'][key] for key in _SETTINGS if trained['args'].get(key) is not None}
    with blame('the exit policy cannot be used'):
        policy = None if network.policy_file is None else ExitPolicy.load(network.policy_file)
    with blame(f'{args.repo!r} cannot be pushed to'):
        address = push_to_hub(
            network.model,
            args.repo,
            private=args.private,
            revision=args.revision,
            data_config=network.data_config,
            class_names=network.class_names,
            license=args.license,
            policy=policy,
            **card,
        )
    print(address)
    return address


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Entry point of mlcsd-push."""
    run_script('mlcsd-push', lambda: push(push_parser().parse_args(argv)))


if __name__ == '__main__':
    main(sys.argv[1:])
