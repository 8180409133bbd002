"""``mmkw info``: what is installed, and what computes."""

import argparse
from collections.abc import Sequence

from ..info import report


def main(argv: Sequence[str]) -> None:
    """Prints the report of :func:`mmkw.info.report`.

    Args:
        argv: The arguments after ``info``: none.
    """
    argparse.ArgumentParser(
        prog='mmkw info', description='Show what is installed, and what computes'
    ).parse_args(argv)
    print(report())
