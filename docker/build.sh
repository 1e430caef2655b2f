#!/usr/bin/env bash
# Builds an image with docker, podman or buildah, whichever is there:
#   bash docker/build.sh cpu|cuda [--base IMAGE] [--tag NAME] [--wheels DIR] [--apex DIR] [-- ARGUMENTS OF THE BUILDER]
#   --base IMAGE    in place of debian:bookworm-slim (docker/base.sh makes one without a registry)
#   --tag NAME      default: localhost/alphamed:cpu, localhost/alphamed:cuda
#   --wheels DIR    wheels that are installed before the index is asked; default: the folder of pip's find-links
#   --apex DIR      a checkout of NVIDIA's apex, where the build cannot clone it (cuda)
# Proxies, certificates and pip's settings of this shell reach the build on its command line and stay out of the image.
# BUILDER=docker|buildah|podman chooses the builder.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
fail() { printf 'error: %s\n' "$*" >&2; exit 2; }
usage() { sed -n '2,9s/^# \?//p' "${BASH_SOURCE[0]}"; }

kind=${1:-}
case $kind in
    cpu) dockerfile=$root/docker/Dockerfile.cpu ;;
    cuda) dockerfile=$root/docker/Dockerfile ;;
    -h | --help) usage; exit 0 ;;
    *) usage >&2; fail "the first argument is '$kind'; give cpu or cuda" ;;
esac
shift
base= tag=localhost/alphamed:$kind wheels= apex= more=()
while [ $# -gt 0 ]; do
    case $1 in
        --base | --tag | --wheels | --apex)
            [ -n "${2:-}" ] || fail "$1 needs a value"
            printf -v "${1#--}" %s "$2"
            shift ;;
        --) shift; more=("$@"); break ;;
        *) usage >&2; fail "unknown argument '$1'" ;;
    esac
    shift
done

# The first that is there and answers; docker needs BuildKit (buildx) and its daemon.
works() { command -v "$1" && "$1" info && { [ "$1" != docker ] || docker buildx version; }; }
for builder in ${BUILDER:-docker buildah podman} ''; do
    [ -z "$builder" ] || ! works "$builder" >/dev/null 2>&1 || break
done
[ -n "$builder" ] ||
    fail "no working ${BUILDER:-docker with buildx, buildah or podman} (Debian, Ubuntu: apt install buildah)"

# A setting of pip, from its environment variables (listed first) and files; several values are separated by blanks.
pip_settings=$(python3 -m pip config list 2>/dev/null || true)
pip_setting() { sed -nE "s/^(global|:env:)\.$1='(.*)'$/\2/p" <<<"$pip_settings" | head -n 1 | sed 's/\\n/ /g'; }

work=$(mktemp -d "${TMPDIR:-/tmp}/alphamed-build.XXXXXX")
trap 'rm -rf "$work"' EXIT
arguments=(--network host --file "$dockerfile" --tag "$tag")

# What is on this machine's disk is not there for the build: folders of wheels go in as a context, the rest is left out.
printf '[global]\n' >"$work/pip.conf"
for setting in index-url extra-index-url find-links trusted-host timeout; do
    remote=
    for value in $(pip_setting "$setting"); do
        if [ "$setting" = find-links ] && [ -d "${value#file://}" ]; then
            wheels=${wheels:-${value#file://}}
        elif [[ $value != file:* && $value != /* ]]; then
            remote+=" $value"
        fi
    done
    [ -z "$remote" ] || printf '%s =%s\n' "$setting" "$remote" >>"$work/pip.conf"
done
arguments+=(--secret "id=pip,src=$work/pip.conf")
for certificates in "${PIP_CERT:-}" "$(pip_setting cert)" "${SSL_CERT_FILE:-}" "${REQUESTS_CA_BUNDLE:-}"; do
    if [ -f "$certificates" ]; then
        arguments+=(--secret "id=certificates,src=$certificates")
        break
    fi
done
for name in http_proxy https_proxy ftp_proxy no_proxy HTTP_PROXY HTTPS_PROXY FTP_PROXY NO_PROXY; do
    [ -z "${!name:-}" ] || arguments+=(--build-arg "$name=${!name}")
done
for name in wheels apex; do
    [ -z "${!name}" ] || { [ -d "${!name}" ] || fail "--$name: no folder ${!name}"; }
    [ -z "${!name}" ] || arguments+=(--build-context "$name=$(cd "${!name}" && pwd)")
done
[ -z "$base" ] || arguments+=(--build-arg "BASE=$base")
if revision=$(git -C "$root" rev-parse HEAD 2>/dev/null); then
    [ -z "$(git -C "$root" status --porcelain)" ] || revision+=-modified
    arguments+=(--build-arg "REVISION=$revision")
fi

# HEALTHCHECK is in Docker's image format only. chroot isolation needs no right to start containers (inside one, say).
[ "$builder" = docker ] || arguments+=(--format docker --layers)
[ "$builder" != buildah ] || arguments+=(--isolation "${BUILDAH_ISOLATION:-chroot}")
started_s=$SECONDS
"$builder" build "${arguments[@]}" ${more[@]+"${more[@]}"} "$root"
printf '%s: built with %s in %d s\n' "$tag" "$builder" $((SECONDS - started_s))
