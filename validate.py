#!/usr/bin/env python3
"""What every exit of a network costs and gets right: ./validate.py --help lists the flags."""

from timm_mlcsd.cli.validate import main

if __name__ == '__main__':
    main()
