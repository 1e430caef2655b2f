"""The arguments of `alphamed study`."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE.yaml", help="the study")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument(
        "--dry-run", action="store_true", help="check the grid and print the table of runs without starting any"
    )
    mode.add_argument(
        "--slurm", action="store_true", help="write batch scripts for the unfinished runs without starting them"
    )
    mode.add_argument(
        "--collect",
        action="store_true",
        help="compare the finished runs without starting any (the last Slurm job does this)",
    )
