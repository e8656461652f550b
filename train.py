#!/usr/bin/env python3
"""Train a multi-exit network: ./train.py --help lists the flags, timm's under timm's names."""

from timm_mlcsd.cli.train import main

if __name__ == '__main__':
    main()
