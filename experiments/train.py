"""train.py with the candidates of `experiments.candidates` among its choices: ``python -m experiments.train FLAGS``."""

from timm_mlcsd.cli.train import main

from .candidates import register

if __name__ == '__main__':
    register()
    main()
