#!/usr/bin/env bash
# The tests in the quickstart's environment:  bash tests/run.sh [--all] [pytest arguments]
#   (nothing)        all but the long matrices, at most 20 min on 2 cores
#   -m "not slow"    the fast ones, at most 3 min
#   --all            the long matrices (kills, resumes, studies, several hosts) as well, at most 120 min
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash examples/setup_env.sh
bash tests/system_packages.sh

limit_s=1800
chosen='not matrix'
arguments=()
while [ $# -gt 0 ]; do
    case $1 in
        --all) chosen='' limit_s=7500 ;;
        -m) chosen="${chosen:+$chosen and }($2)"; shift ;;
        *) arguments+=("$1") ;;
    esac
    shift
done
# A test that hangs must not hang the machine. The whole group of pytest's processes is ended.
exec timeout --kill-after=30 "$limit_s" .venv/bin/python -m pytest -m "$chosen" ${arguments[@]+"${arguments[@]}"}
