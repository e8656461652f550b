"""Run the command ``mlcsd-cost`` as ``python -m timm_mlcsd.cost``."""

import sys

from ..cli.cost import main

main(sys.argv[1:])
