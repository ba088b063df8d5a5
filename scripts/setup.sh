#!/usr/bin/env bash
# Installs the Debian/Ubuntu packages that a target needs and are missing, and checks the Rust toolchain.
# Usage: scripts/setup.sh build|demo|bench-qemu|test
# Runs apt-get only if something is missing; with sudo when not root.
# The demo needs no package for a GPU: its driver brings all there is. Only `--backend gpu` on a host without one wants a software
# device: mesa-vulkan-drivers and libvulkan1, which `test` installs.
set -euo pipefail
cd "$(dirname "$0")/.."

die() { echo "setup: $*" >&2; exit 1; }

goal=${1:-test}
packages=(gcc libc6-dev)
case $goal in
build | demo) ;;
# Virtual machines to migrate, and a link between two network namespaces.
bench-qemu) packages+=(qemu-system-x86 iproute2 util-linux) ;;
test)
    # The nested test: an emulator, a userland and archive tools for the initramfs, and unpackers for the kernel.
    packages+=(qemu-system-x86 busybox-static cpio lz4 xz-utils zstd)
    # Migrations over a link between two network namespaces.
    packages+=(iproute2)
    # The GPU backend: a software device to run on, and the layer that checks how it is used.
    packages+=(libvulkan1 mesa-vulkan-drivers vulkan-tools vulkan-validationlayers)
    ;;
*) die "unknown goal '$goal'; use build, demo, bench-qemu or test" ;;
esac

command -v apt-get >/dev/null ||
    die "no apt-get here; install by hand what provides: ${packages[*]}"

missing=()
for package in "${packages[@]}"; do
    state=$(dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null || true)
    [ "$state" = installed ] || missing+=("$package")
done
if [ ${#missing[@]} -gt 0 ]; then
    echo "setup: installing ${missing[*]}"
    as_root=()
    if [ "$(id -u)" -ne 0 ]; then
        command -v sudo >/dev/null || die "not root and no sudo; as root: apt-get install ${missing[*]}"
        as_root=(sudo)
    fi
    "${as_root[@]}" apt-get update -q
    # Where qemu-utils of another version is installed, apt removes it: qemu-system-x86 conflicts with it.
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
        apt-get install -y -q --no-install-recommends "${missing[@]}"
fi

command -v cargo >/dev/null || die "no cargo in PATH; install Rust from https://rustup.rs, then run this again"
if ! version=$(rustc --version 2>&1); then
    # rustup finds the pinned version in rust-toolchain.toml; installing must sometimes be asked for.
    command -v rustup >/dev/null || die "rustc does not run: $version"
    rustup toolchain install || die "rustup could not install the toolchain of rust-toolchain.toml"
    version=$(rustc --version)
fi
echo "setup: $version; all packages for '$goal' are installed"
