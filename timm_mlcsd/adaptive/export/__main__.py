"""Entry point of ``python -m timm_mlcsd.adaptive.export``, the same command as ``mlcsd-export``."""

import runpy

# by name, because the library does not import its commands
runpy.run_module('timm_mlcsd.cli.export', run_name='__main__')
