"""The commands, one module each, and their flags; the rest of the package takes configurations."""
