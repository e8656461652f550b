"""The commands, one module each; argparse is used here only."""
