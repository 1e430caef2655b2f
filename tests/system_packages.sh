#!/usr/bin/env bash
# Debian packages that tests need beside Python, one list a purpose:  bash tests/system_packages.sh [PURPOSE ...]
# Installs what is missing where it is run by root with apt; elsewhere it only reports, and the tests concerned skip.
set -euo pipefail

declare -A packages=(
    [containers]="buildah debootstrap podman runc"
    [slurm]="iproute2 munge openssh-client openssh-server slurm-wlm util-linux"
)

missing=()
for purpose in "${@:-${!packages[@]}}"; do
    [ -n "${packages[$purpose]:-}" ] || { echo "error: purpose '$purpose' is none of ${!packages[*]}" >&2; exit 2; }
    for package in ${packages[$purpose]}; do
        dpkg-query --show --showformat='${Status}' "$package" 2>/dev/null | grep -q '^install ok' || missing+=("$package")
    done
done
[ ${#missing[@]} -gt 0 ] || exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "not installed, tests that need them skip: ${missing[*]}" >&2
    exit 0
fi
log=$(mktemp)
export DEBIAN_FRONTEND=noninteractive
if ! { apt-get update && apt-get install -y --no-install-recommends "${missing[@]}"; } >"$log" 2>&1; then
    echo "could not be installed (see $log), tests that need them skip: ${missing[*]}" >&2
    exit 0
fi
rm "$log"
