"""Time and peak memory of `alphamed data build` and `decontaminate` on many questions; the limits of the project beside.

    .venv/bin/python benchmarks/data_scale.py [--questions 200000] [--cores 2]

The questions are written by the shipped generator (medfacts) with seed 0: as many copies of its facts as it takes. The
benchmark is its set held out by fact, together with 2,000 training questions whose options are put in another order and
whose stems begin otherwise: they are what decontamination has to find. Every command is a process of its own, bound to
`--cores` cores. Templates repeat far more than real stems do, which is the hard case for a search by shared words.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from alphamed.data.option_order import shuffle_options
from alphamed.data.output import question_writer
from alphamed.lab.datasets import medfacts
from alphamed.records import Question

LIMIT_S = 180
LIMIT_BYTES = 4 << 30
PLANTED = 2_000
DEADLINE_S = 900
COPIES = 45  # questions of a fact and level that give 200,000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--questions", type=int, default=200_000)
    parser.add_argument("--cores", type=int, default=2)
    options = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train, planted, against = _questions(options.questions)
        question_writer(folder / "train.jsonl", train)(folder / "train.jsonl")
        question_writer(folder / "against.jsonl", against)(folder / "against.jsonl")
        print(
            f"{len(train):,} training questions, {len(against):,} in the benchmark, {len(planted):,} of them planted; "
            f"{options.cores} cores"
        )
        _command(
            "build",
            folder,
            [
                "build",
                "--out",
                str(folder / "set.parquet"),
                "--from",
                str(folder / "train.jsonl"),
                "shuffle_options=true",
                "drop_repeats=true",
                "filter.max_words=400",
            ],
        )
        _command(
            "decontaminate",
            folder,
            [
                "decontaminate",
                "--train",
                str(folder / "set.parquet"),
                "--against",
                str(folder / "against.jsonl"),
                "--out",
                str(folder / "clean.parquet"),
                "--report",
                str(folder / "report.json"),
            ],
        )
        hits = json.loads((folder / "report.json").read_text(encoding="utf-8"))["hits"]
        found = {hit["against"]["id"] for hit in hits}
        print(f"planted questions found: {len(found & planted):,} of {len(planted):,}")


def _questions(count: int) -> tuple[list[Question], set[str], list[Question]]:
    """Training questions, the ids of planted ones, and the benchmark that holds them."""
    copies = max(1, round(COPIES * count / 200_000))
    while len((splits := medfacts.build(0, copies=copies)).train) < count:
        copies = round(1.2 * copies) + 1
    train = list(splits.train[:count])
    step = max(1, len(train) // PLANTED)
    planted = [_reworded(question, number) for number, question in enumerate(train[::step][:PLANTED])]
    return train, {question.id for question in planted}, [*splits.heldout_fact[:10_000], *planted]


def _reworded(question: Question, number: int) -> Question:
    """The question with other letters and another beginning, under an id of its own."""
    front = ("Please choose: ", "In clinical practice, ", "")[number % 3]
    changed = shuffle_options(question, number, 0)
    return replace(changed, id=f"planted-{number}", question=front + changed.question.replace("?", " ?"))


def _command(name: str, folder: Path, arguments: list[str]) -> None:
    began = time.monotonic()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", "alphamed.cli", "data", *arguments],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        cwd=folder,
    )
    if done.returncode:
        sys.exit(f"{name} failed: {done.stderr.strip()}")
    seconds, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    peak = after.ru_maxrss * 1024  # of the largest child so far
    print(
        f"{name}: {seconds:.1f} s (limit {LIMIT_S}), {cpu:.1f} s of CPU, peak of the commands so far {peak / 2**30:.2f} "
        f"GiB (limit {LIMIT_BYTES >> 30})"
    )
    print("  " + done.stdout.strip().replace("\n", "\n  "))


if __name__ == "__main__":
    main()
