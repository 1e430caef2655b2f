"""The arguments of `alphamed study`."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE.yaml")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--dry-run", action="store_true", help="check the grid and show the table of runs, start nothing")
    mode.add_argument("--slurm", action="store_true", help="write batch scripts for the unfinished runs, start nothing")
    mode.add_argument(
        "--collect", action="store_true", help="start nothing, compare the finished runs (--slurm does this in its last job)"
    )
