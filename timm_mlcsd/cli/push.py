"""A trained network, with its exit policy if it has one, to a folder or the Hub: ``mlcsd-push CHECKPOINT TARGET``."""

import argparse
import logging
import os
import shlex
from pathlib import Path
from typing import Any, Dict, Optional, Sequence

from ..adaptive import ExitPolicy
from ..errors import UserError, as_user_error, printable, run_script
from ..hub import URI_SCHEMES, push_to_hub, save_pretrained
from ..network import Network, load_network
from ..report import check_license
from .arguments import ScriptParser

__all__ = ['folder_of', 'main', 'push']

_logger = logging.getLogger('push')

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
    parser = ScriptParser(
        prog='mlcsd-push', description='Save a trained multi-exit network in a folder or on the Hugging Face Hub'
    )
    parser.add_argument('checkpoint', help='checkpoint of train.py, folder of a run, or saved folder')
    parser.add_argument(
        'target',
        help='folder, written as ./NAME or NAME/, or a repository of the Hub, written as OWNER/NAME, NAME or '
        'hf-hub:NAME; it is made if it is missing',
    )
    parser.add_argument('--private', action='store_true', help='make a new repository private')
    parser.add_argument(
        '--revision', metavar='BRANCH', help='branch of the repository to commit to (default: its main one)'
    )
    parser.add_argument('--license', type=_license, default='apache-2.0', help='license that the model card states')
    parser.add_argument('--use-ema', action='store_true', help='save the averaged weights of the checkpoint')
    return parser


def _license(text: str) -> str:
    try:
        check_license(text)
    except ValueError as e:
        raise argparse.ArgumentTypeError(str(e)) from None
    return text


def push(args: argparse.Namespace) -> str:
    """Save or upload as the flags say; prints where and how to load it, and returns the folder or the commit's address.

    Raises:
        UserError: The network cannot be loaded, or not be written there.
    """
    folder = folder_of(args.target)
    if folder is not None:
        _check_folder(args, folder)
    network = load_network(args.checkpoint, args.use_ema)
    what = dict(
        data_config=network.data_config, class_names=network.class_names, license=args.license, **_card(network)
    )
    if network.policy_file is not None:
        with as_user_error('the exit policy cannot be used'):
            what['policy'] = ExitPolicy.load_for(network.policy_file, network.model)
        if what['policy'].weights_digest is None:
            _logger.warning(f'{network.policy_file} does not say which weights it was fitted to; it is bound to these.')
    with as_user_error(f'{args.target!r} cannot be written'):
        if folder is not None:
            save_pretrained(network.model, folder, **what)
            place = source = str(folder)
        else:
            repo = _without_scheme(args.target)
            place = push_to_hub(network.model, repo, private=args.private, revision=args.revision, **what)
            owner_and_name = place.partition('/commit/')[0].split('/')[-2:]
            source = f'hf-hub:{"/".join(owner_and_name)}' + (f'@{args.revision}' if args.revision else '')
    print(printable(place))
    print(
        printable(f'load it with timm_mlcsd.from_pretrained({source!r}), or: mlcsd-predict {shlex.quote(source)} IMAGE')
    )
    return place


def folder_of(target: str) -> Optional[Path]:
    """The folder that a target means; None where it means a repository on the Hub.

    Raises:
        UserError: It may mean either.
    """
    if target.startswith(('hf-hub:', 'hf_hub:')):
        return None
    if target.startswith('local-dir:'):
        return Path(_without_scheme(target)).expanduser()
    path = Path(target).expanduser()
    marked = target.startswith(('.', '~')) or target.endswith(('/', os.sep)) or path.is_absolute()
    if marked or path.is_dir():
        return path
    if os.path.lexists(path) or ('/' in target and path.parent.exists()):
        there = path if os.path.lexists(path) else path.parent
        raise UserError(
            f'{target!r} may be a folder or a repository of the Hub, because {str(there)!r} is here; write ./{target} '
            f'for the folder, hf-hub:{target} for the Hub.'
        )
    if target.count('/') > 1:
        raise UserError(
            f'{target!r} is neither OWNER/NAME on the Hub nor a folder here; write ./{target} for a folder.'
        )
    return None


def _without_scheme(target: str) -> str:
    return target.partition(':')[2] if target.startswith(URI_SCHEMES) else target


def _check_folder(args: argparse.Namespace, folder: Path) -> None:
    for flag in ('private', 'revision'):
        if getattr(args, flag):
            raise UserError(f'--{flag} is for the Hub, and {args.target!r} is a folder; write hf-hub:NAME for the Hub.')
    if folder.exists() and os.path.exists(args.checkpoint) and folder.samefile(args.checkpoint):
        raise UserError(f'{args.target!r} is what is to be saved; name another folder.')


def _card(network: Network) -> Dict[str, Any]:
    """What the checkpoint of train.py knows for the model card."""
    trained = network.checkpoint
    if not trained:
        return {}
    settings = {key: trained['args'][key] for key in _SETTINGS if trained['args'].get(key) is not None}
    return dict(results=trained.get('results'), measured_on=trained.get('measured_on'), training=settings)


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Entry point of mlcsd-push."""
    run_script('mlcsd-push', lambda: push(push_parser().parse_args(argv)))


if __name__ == '__main__':
    main()
