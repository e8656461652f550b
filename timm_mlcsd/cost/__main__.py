"""``python -m timm_mlcsd.cost``, which is ``mlcsd-cost``."""

import sys

from ..cli.cost import main

main(sys.argv[1:])
