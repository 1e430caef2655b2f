"""The arguments of `alphamed study`."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE.yaml")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--dry-run", action="store_true", help="check the grid and show the table of runs, start nothing")
    how.add_argument("--slurm", action="store_true", help="write batch scripts for the runs that are left, start nothing")
    how.add_argument(
        "--collect", action="store_true", help="start nothing, only compare what is there (what --slurm's last job does)"
    )
