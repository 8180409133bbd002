"""Writes a network to a file: ``export.py CONFIG CHECKPOINT OUT``, the same as ``mmkw export``."""

from mmkw.cli.export import main

if __name__ == '__main__':
    main()
