#!/usr/bin/env bash
# Takes the ELF kernel (vmlinux) out of a Linux bzImage: extract-vmlinux.sh BZIMAGE VMLINUX
#
# The x86 boot protocol (Documentation/arch/x86/boot.rst in the Linux source) says where the compressed kernel
# lies: setup_sects at 0x1f1, payload_offset and payload_length at 0x248 and 0x24c, counted from the end of the
# setup code. The last four bytes of the payload are the decompressed size, which is checked here.
set -euo pipefail

die() { echo "extract-vmlinux: $*" >&2; exit 1; }

[ $# -eq 2 ] || die "usage: extract-vmlinux.sh BZIMAGE VMLINUX"
image=$1 out=$2

number() { od -An -v -t "u$2" -j "$1" -N "$2" "$image" | tr -d ' '; }
hex() { od -An -v -t x1 -j "$1" -N "$2" "$image" | tr -d ' \n'; }

[ "$(hex $((0x202)) 4)" = 48647253 ] || die "$image: not a bzImage (no HdrS at 0x202)"

sectors=$(number $((0x1f1)) 1)
[ "$sectors" -ne 0 ] || sectors=4
start=$(((sectors + 1) * 512 + $(number $((0x248)) 4)))
length=$(number $((0x24c)) 4)
magic=$(hex "$start" 4)
case $magic in
02214c18) unpack=(lz4 -dc) ;;
28b52ffd) unpack=(zstd -dc) ;;
fd377a58) unpack=(xz -dc) ;;
1f8b08*) unpack=(gzip -dc) ;;
*) die "$image: payload starts with $magic; expected lz4, zstd, xz or gzip" ;;
esac
command -v "${unpack[0]}" >/dev/null || die "${unpack[0]} is missing; run scripts/setup.sh test"

# gzip carries the size in its own trailer; behind the other formats the kernel's build appends it.
[ "${unpack[0]}" = gzip ] && trailer=0 || trailer=4
dd if="$image" iflag=skip_bytes,count_bytes skip="$start" count=$((length - trailer)) bs=1M status=none |
    "${unpack[@]}" >"$out.part" || die "$image: ${unpack[0]} could not decompress the payload"

want=$(number $((start + length - 4)) 4)
got=$(stat -c %s "$out.part")
[ "$got" = "$want" ] || die "$image: decompressed to $got bytes, the image says $want"
mv "$out.part" "$out"
