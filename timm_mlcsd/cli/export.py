"""``mlcsd-export``: the stages of a network as graphs, for places without timm.

``mlcsd-export output/train/RUN exported`` writes a folder that contains a runner.
"""

import logging
from pathlib import Path
from typing import Optional, Sequence

from ..adaptive import ExitPolicy
from ..adaptive.export import FORMATS, export_stages
from ..errors import UserError, one_line, run_script
from ..network import load_network
from .arguments import ScriptParser

__all__ = ['export_parser', 'main']


def export_parser() -> ScriptParser:
    """The flags of mlcsd-export."""
    parser = ScriptParser(prog='mlcsd-export', description='Write the stages of a network as graphs')
    parser.add_argument('network', help='checkpoint of train.py, folder of a run, saved folder, or hf-hub:REPO')
    parser.add_argument('directory', help='folder to write, new or of an earlier export')
    parser.add_argument(
        '--format', choices=FORMATS, default='onnx', help='onnx for ONNX Runtime, torch for torch.export'
    )
    parser.add_argument('--policy', metavar='FILE', help='file of the exit policy (default: that beside the weights)')
    parser.add_argument('--use-ema', action='store_true', help='export the averaged weights of the checkpoint')
    return parser


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Entry point of mlcsd-export and of ``python -m timm_mlcsd.adaptive.export``."""

    def run() -> None:
        args = export_parser().parse_args(argv)
        for name in ('onnxscript', 'onnx_ir', 'torch.onnx'):
            logging.getLogger(name).setLevel(logging.WARNING)  # they log every pass
        network = load_network(args.network, args.use_ema)
        policy_file = args.policy or network.policy_file
        if policy_file is None:
            raise UserError(
                f'{args.network!r} has no exit policy beside its weights: make one with validate.py --adaptive '
                f'--save-policy, or name one with --policy FILE.'
            )
        try:
            policy = ExitPolicy.load_for(policy_file, network.model)
            export_stages(
                network.model,
                policy,
                args.directory,
                args.format,
                data_config=network.data_config,
                class_names=network.class_names,
            )
        except (ValueError, OSError) as e:
            raise UserError(one_line(e, 1000)) from None
        size = sum(path.stat().st_size for path in Path(args.directory).iterdir()) / 1e6
        print(f'{args.directory}: {network.model.num_exits} stages, {size:.1f} MB')

    run_script('mlcsd-export', run)


if __name__ == '__main__':
    main()
