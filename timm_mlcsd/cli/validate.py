"""validate.py and ``mlcsd-validate``: accuracy and cost of every exit of a trained network."""

from typing import Optional, Sequence

from ..engine.validate_config import ValidateConfig
from ..engine.validation import validate
from ..errors import run_script
from .config_file import parse_args
from .flags import validate_parser

__all__ = ['main', 'read_config']


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Entry point of validate.py and mlcsd-validate."""
    run_script('validate.py', lambda: validate(read_config(argv)))


def read_config(argv: Optional[Sequence[str]] = None) -> ValidateConfig:
    """The configuration that a command line of validate.py describes.

    Args:
        argv: Arguments, None for those of the process.

    Raises:
        UserError: A flag is wrong.
    """
    return ValidateConfig.from_dict(vars(parse_args(validate_parser(), argv)))


if __name__ == '__main__':
    main()
