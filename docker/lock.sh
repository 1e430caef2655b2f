#!/usr/bin/env bash
# Resolves requirements.txt to requirements-cuda-py311.txt and -py312.txt (uv, from PyPI):  bash docker/lock.sh [package ...]
# Packages named are taken to their newest allowed version; all others keep the version they are locked at.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

for version in 3.11 3.12; do
    lock=requirements-cuda-py${version/./}.txt
    work=$(mktemp)
    [ ! -f "$lock" ] || cp "$lock" "$work"
    grep -v '^apex' requirements.txt |
        uv pip compile - --constraints docker/constraints-cuda.txt --output-file "$work" --no-config --no-annotate --quiet \
            --python-version "$version" --python-platform x86_64-unknown-linux-gnu "${@/#/--upgrade-package=}" >/dev/null
    {
        echo "# The cluster set for Python $version: a complete lock of requirements.txt but for apex, which is built from source."
        echo "# Made by docker/lock.sh; docker/Dockerfile installs it with --no-deps."
        grep -v '^#' "$work"
    } >"$lock"
    rm "$work"
done
