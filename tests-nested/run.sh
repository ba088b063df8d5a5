#!/usr/bin/env bash
# Boots Linux under pagewarp, and migrates it live, inside an emulated machine with nested virtualization.
# Needs no /dev/kvm of its own: the outer machine is emulated by QEMU (TCG) with AMD's SVM, and has stock KVM in it.
# Usage: tests-nested/run.sh [PAGEWARP_BINARY]   (builds the debug one if none is given)
# PAGEWARP_CACHE: where the kernel is kept, default target/nested. See docs/testing.md.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
cd "$here/.."

# A good run takes 60 to 140 s on two CPUs.
readonly boot_limit_s=400
readonly attempts=3
target=${CARGO_TARGET_DIR:-target}
cache=${PAGEWARP_CACHE:-$target/nested}
mkdir -p "$target/nested" "$cache"
work=$(cd "$target/nested" && pwd)
cache=$(cd "$cache" && pwd)

die() { echo "nested: $*" >&2; exit 1; }

for tool in qemu-system-x86_64 busybox cpio gzip lz4 xz zstd dpkg; do
    command -v "$tool" >/dev/null || die "$tool is missing; run scripts/setup.sh test"
done
if [ $# -ge 1 ]; then
    pagewarp=$1
else
    cargo build --locked -p pagewarp
    pagewarp=$target/debug/pagewarp
fi
[ -x "$pagewarp" ] || die "$pagewarp is not an executable file"
"$here/check-console-test.sh"
"$here/fetch-kernel.sh" "$cache/linux"

archive() { (cd "$1" && find . | LC_ALL=C sort | cpio -o -H newc -R 0:0 --quiet); }

# new_root DIR: what both root file systems have in common.
new_root() {
    rm -rf "$1"
    mkdir -p "$1"/{bin,dev,proc,sys,tmp}
    cp "$(command -v busybox)" "$1/bin/busybox"
}

inner=$work/inner
new_root "$inner"
install -m 755 "$here/inner-init" "$inner/init"

outer=$work/outer
new_root "$outer"
install -m 755 "$here/outer-init" "$outer/init"
install -m 644 "$here/check-console.awk" "$outer/"
mkdir -p "$outer"/{boot,lib/modules}
cp "$cache"/linux/*.ko "$outer/lib/modules/"
cp "$cache"/linux/{bzImage,vmlinux} "$outer/boot/"
archive "$inner" | gzip -1 >"$outer/inner.cpio.gz"
strip -o "$outer/bin/pagewarp" "$pagewarp"
# The very binary that the other tests use, with the libraries that it names; so it need not be built twice.
ldd "$pagewarp" | grep -o '/[^ ]*' | while read -r library; do
    mkdir -p "$outer$(dirname "$library")"
    cp -L "$library" "$outer$library"
done
# Not compressed: unpacking would take the emulated machine longer than reading.
archive "$outer" >"$work/outer.cpio"

log=$work/console.log
echo "nested: $(cat "$cache/linux/complete"); console in $log"

# emulate: boots the outer machine; true if it passed. On a failure, `verdict` says what it came to.
emulate() {
    # qemu64 with SVM has no AVX: this also tests that pagewarp runs on such a CPU.
    timeout --foreground "$boot_limit_s" qemu-system-x86_64 -accel tcg,thread=multi -machine pc \
        -cpu qemu64,+svm,+npt,+nrip-save,+x2apic -smp 2 -m 1536 \
        -nodefaults -no-user-config -nic none -display none -no-reboot -serial stdio \
        -kernel "$cache/linux/bzImage" -initrd "$work/outer.cpio" \
        -append "console=ttyS0 quiet panic=-1 mitigations=off nokaslr tsc=reliable" \
        </dev/null 2>&1 | tr -d '\r' | tee "$log" || echo "nested: the emulator ended with status ${PIPESTATUS[0]}" >&2
    grep -qx 'NESTED-TEST: PASS' "$log" && return
    verdict=$(grep '^NESTED-TEST:' "$log" || echo "no verdict: time is up after $boot_limit_s s")
    return 1
}

# On a busy host the emulated machine sometimes stands still, at boot already; probably because QEMU before 10.2 changes the
# interrupts that a CPU has pending from several threads without a lock when it emulates SVM. Only a standstill gets another try; wrong data never does.
for attempt in $(seq "$attempts"); do
    emulate && break
    case $verdict in
        *"time is up"*) echo "nested: STANDSTILL in attempt $attempt of $attempts: $verdict" >&2 ;;
        *) die "$verdict, see $log" ;;
    esac
    [ "$attempt" -lt "$attempts" ] || die "$verdict, in each of $attempts attempts, see $log"
done
echo "nested: PASS in attempt $attempt"
