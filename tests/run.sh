#!/usr/bin/env bash
# The tests in the quickstart's environment:  bash tests/run.sh [--ci | --all] [pytest arguments]
#   (nothing)        the unit tests, one real run of each kind, one case of each parity family; at most 8 min on 2 cores
#   -m "not slow"    the fast ones, at most 3 min
#   --ci             all but the long matrices, at most 25 min: what CI runs
#   --all            the long matrices (kills, resumes, studies, several hosts, the CPU image) as well, at most 120 min
# Which test is in which tier: tests/tiers.py.
# As root it installs the Debian packages of tests/system_packages.sh: Slurm for the tests on several hosts, with --all also
# what builds images.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash examples/setup_env.sh
bash tests/system_packages.sh slurm
# Linters and schemas that only tests need; the stamp says which are installed.
stamp=.venv/.test_requirements
if ! cmp -s tests/requirements.txt "$stamp"; then
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r tests/requirements.txt &&
        cp tests/requirements.txt "$stamp" ||
        echo "tests/requirements.txt could not be installed; tests that need it skip" >&2
fi

limit_s=1200
chosen='first'
arguments=()
while [ $# -gt 0 ]; do
    case $1 in
        --ci) chosen='first or ci' limit_s=2400 ;;
        --all) chosen='' limit_s=7500; bash tests/system_packages.sh ;;
        -m) chosen="${chosen:+($chosen) and }($2)"; shift ;;
        *) arguments+=("$1") ;;
    esac
    shift
done
# A test that hangs must not hang the machine. The whole group of pytest's processes is ended.
exec timeout --kill-after=30 "$limit_s" .venv/bin/python -m pytest -m "$chosen" ${arguments[@]+"${arguments[@]}"}
