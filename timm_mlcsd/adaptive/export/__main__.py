"""Entry point of ``python -m timm_mlcsd.adaptive.export``, the same command as ``mlcsd-export``."""

import sys

from ...cli.export import main

main(sys.argv[1:])
