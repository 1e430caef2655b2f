#!/usr/bin/env bash
# Makes the base image from Debian's package archive, where no image registry is reachable:
#   bash docker/base.sh [SUITE [IMAGE]]        default: bookworm localhost/debian:bookworm-slim
# Needs root, debootstrap and one of podman, docker, buildah; MIRROR= names another archive than Debian's. Then:
#   bash docker/build.sh cpu --base localhost/debian:bookworm-slim
set -euo pipefail

suite=${1:-bookworm}
image=${2:-localhost/debian:$suite-slim}
mirror=${MIRROR:-http://deb.debian.org/debian}
security=${SECURITY_MIRROR:-http://deb.debian.org/debian-security}

fail() { printf 'error: %s\n' "$*" >&2; exit 2; }
[ "$(id -u)" = 0 ] || fail "debootstrap needs root: sudo bash docker/base.sh"
command -v debootstrap >/dev/null || fail "debootstrap is not installed (Debian, Ubuntu: apt install debootstrap)"
for tool in docker podman buildah ''; do
    [ -z "$tool" ] || ! "$tool" info >/dev/null 2>&1 || break
done
[ -n "$tool" ] || fail "none of docker, podman, buildah works here"

work=$(mktemp -d "${TMPDIR:-/tmp}/alphamed-base.XXXXXX")
root=$work/root
# debootstrap mounts /proc in there, and leaves it where it is ended before its own end.
clean_up() {
    ! mountpoint --quiet "$root/proc" || umount "$root/proc"
    rm -rf --one-file-system "$work"
}
trap clean_up EXIT
debootstrap --variant=minbase "$suite" "$root" "$mirror" >"$work/log" 2>&1 ||
    { tail -n 5 "$work/log" >&2; fail "debootstrap $suite from $mirror failed"; }
printf 'deb %s %s main\n' "$mirror" "$suite" "$mirror" "$suite-updates" "$security" "$suite-security" \
    >"$root/etc/apt/sources.list"
# What Debian's own slim images leave out, and what differs from one run to the next.
printf 'path-exclude /usr/share/%s/*\n' doc man info locale >"$root/etc/dpkg/dpkg.cfg.d/slim"
rm -rf "$root"/usr/share/{doc,man,info,locale}/* "$root"/var/cache/apt/*.bin "$root"/var/cache/apt/archives/*.deb \
    "$root"/var/lib/apt/lists/* "$root"/var/log/*.log "$root"/var/log/apt "$root"/etc/{hostname,resolv.conf}
tar -C "$root" --one-file-system --exclude='./dev/*' --exclude='./proc/*' --exclude='./sys/*' -cf "$work/root.tar" .
if [ "$tool" = buildah ]; then
    container=$(buildah from scratch)
    buildah add --quiet "$container" "$work/root.tar" / >/dev/null
    buildah config --cmd bash "$container"
    buildah commit --quiet --rm "$container" "$image" >/dev/null
else
    "$tool" import --change 'CMD ["bash"]' "$work/root.tar" "$image" >/dev/null
fi
printf '%s: Debian %s, %s MB as a tar file\n' "$image" "$(cat "$root/etc/debian_version")" \
    $(($(stat -c %s "$work/root.tar") / 1000000))
