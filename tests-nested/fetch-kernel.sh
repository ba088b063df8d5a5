#!/usr/bin/env bash
# Puts Debian's cloud kernel into DIR: bzImage, vmlinux (the ELF inside it) and the KVM modules. Usage: fetch-kernel.sh DIR
# The package comes from apt, or from the file that PAGEWARP_NESTED_DEB names. What is there already is not fetched again.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)

die() { echo "fetch-kernel: $*" >&2; exit 1; }

[ $# -eq 1 ] || die "usage: fetch-kernel.sh DIR"
mkdir -p "$1"
cd "$1"
[ -e complete ] && exit 0

# The package linux-image-cloud-amd64 is empty and depends on the current kernel.
readonly meta=linux-image-cloud-amd64
download() {
    local package
    package=$(apt-cache depends "$meta" 2>/dev/null | awk '$1 == "Depends:" { print $2; exit }')
    [ -n "$package" ] || return 1
    rm -f linux-image-*.deb
    echo "fetch-kernel: downloading $package"
    # As root apt would fetch as user _apt, which may not write here, and warn about it.
    apt-get download -q -o APT::Sandbox::User="$(id -un)" "$package"
}

if [ -n "${PAGEWARP_NESTED_DEB:-}" ]; then
    deb=$PAGEWARP_NESTED_DEB
else
    # Old package lists name versions that the mirror no longer has.
    if ! download; then
        echo "fetch-kernel: updating the package lists"
        as_root=()
        [ "$(id -u)" -eq 0 ] || as_root=(sudo)
        "${as_root[@]}" apt-get update -q
        download || die "apt has no $meta; on another distribution than Debian set PAGEWARP_NESTED_DEB to a .deb of it"
    fi
    deb=$(ls linux-image-*.deb)
fi

rm -rf tree
dpkg -x "$deb" tree
cp tree/boot/vmlinuz-* bzImage
for module in virt/lib/irqbypass.ko arch/x86/kvm/kvm.ko arch/x86/kvm/kvm-amd.ko; do
    found=$(find tree -path "*/kernel/$module*")
    [ -n "$found" ] || die "no $module in $deb"
    case $found in
    *.ko) cp "$found" . ;;
    *.ko.xz) xz -dc "$found" >"$(basename "$module")" ;;
    *) die "$found: expected .ko or .ko.xz" ;;
    esac
done
"$here/extract-vmlinux.sh" bzImage vmlinux
rm -rf tree
basename "$deb" >complete
