"""Entry point of ``python -m timm_mlcsd.cost``, the same command as ``mlcsd-cost``."""

import runpy

# by name, because the library does not import its commands
runpy.run_module('timm_mlcsd.cli.cost', run_name='__main__')
