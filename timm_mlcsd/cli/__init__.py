"""The commands: one module each, with its flags; nothing below them knows of argparse."""
