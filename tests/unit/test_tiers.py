"""Every test is in one tier by rule, and the first tier has a test of every kind."""

import fnmatch
import subprocess
import sys
from pathlib import Path

import pytest
from tiers import FIRST, SECOND_ONLY, tier_of

TESTS = Path(__file__).parents[1]
LIST = """
import sys, pytest

class Lister:
    def pytest_collection_finish(self, session):
        for item in session.items:
            print("TEST", "|".join([item.nodeid.removeprefix("tests/"), *(marker.name for marker in item.iter_markers())]))

sys.exit(pytest.main(["--collect-only", "-q", "-p", "no:warnings", *sys.argv[1:]], plugins=[Lister()]))
"""


@pytest.fixture(scope="module")
def tests() -> dict[str, set[str]]:
    """Markers of every test outside tests/unit, and of the slow ones in it."""
    folders = [str(folder) for folder in TESTS.iterdir() if folder.is_dir() and list(folder.glob("test_*.py"))]
    run = subprocess.run(
        [sys.executable, "-c", LIST, "-m", "slow", *folders], cwd=TESTS.parent, capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, run.stdout + run.stderr
    lines = [line.removeprefix("TEST ") for line in run.stdout.splitlines() if line.startswith("TEST ")]
    return {line.split("|")[0]: set(line.split("|")[1:]) for line in lines}


def test_the_tiers_are_told_apart_by_markers():
    assert tier_of("unit/test_text.py::test_a", ()) == "first"
    assert tier_of("e2e/test_sync.py::test_a", ("slow",)) == "ci"
    assert tier_of("e2e/test_engine.py::test_a", ("slow",)) == "first"
    assert tier_of("e2e/test_engine.py::test_a", ("slow", "matrix")) == "matrix"


def test_every_slow_test_has_one_tier(tests):
    assert len(tests) > 300
    for test, markers in tests.items():
        assert len(markers & {"first", "ci", "matrix"}) == 1, f"{test}: {markers}"


def test_every_pattern_is_of_a_test(tests):
    unused = [pattern for pattern in FIRST if not any(fnmatch.fnmatchcase(test, pattern) for test in tests)]
    assert unused == []
    assert [place for place in SECOND_ONLY if not any(test.startswith(place) for test in tests)] == []


def test_every_file_has_a_test_in_the_first_tier_or_says_why_not(tests):
    files: dict[str, set[str]] = {}
    for test, markers in tests.items():
        files.setdefault(test.partition("::")[0], set()).update(markers & {"first", "ci", "matrix"})
    without = sorted(file for file, tiers in files.items() if "first" not in tiers and tiers != {"matrix"})
    assert [file for file in without if not file.startswith(tuple(SECOND_ONLY))] == []
    for place in SECOND_ONLY:
        assert any(file.startswith(place) for file in without), f"{place} has tests in the first tier"
