"""train.py and ``mlcsd-train``: train a multi-exit network."""

import os
from typing import Optional, Sequence

from ..distributed import end_process, init_distributed
from ..engine.combinations import check_combinations
from ..engine.config import TrainConfig
from ..engine.device import resolve_device
from ..engine.training import train
from ..errors import UserError, run_script
from .config_file import parse_args
from .flags import train_parser

__all__ = ['main', 'read_config']


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Entry point of train.py and mlcsd-train."""
    run_script('train.py', lambda: _train(read_config(argv)))
    if int(os.environ.get('WORLD_SIZE', 1)) > 1:
        end_process()


def read_config(argv: Optional[Sequence[str]] = None) -> TrainConfig:
    """The configuration that a command line of train.py describes.

    Args:
        argv: Arguments, None for those of the process.

    Raises:
        UserError: A flag is wrong, or flags contradict each other.
    """
    config = TrainConfig.from_dict(vars(parse_args(train_parser(), argv)))
    check_combinations(config)
    return config


def _train(config: TrainConfig) -> None:
    tag = config.model.pretrained_backbone
    if not config.data.dataset and not config.data.data_dir and isinstance(tag, str):
        raise UserError(
            f'--pretrained-backbone {tag}: expected a tag of weights and data to train on, got no data; if {tag!r} is '
            f'the folder of the data, put it in front of the flags.'
        )
    device = resolve_device(config.device)
    dist_context = init_distributed(device)
    train(config, device, dist_context)
    dist_context.shutdown()


if __name__ == '__main__':
    main()
