"""``python -m timm_mlcsd.adaptive.export``, which is ``mlcsd-export``."""

import sys

from ...cli.export import main

main(sys.argv[1:])
