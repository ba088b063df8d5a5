#!/usr/bin/env bash
# Runs the named checks, or all of them, in order; times each; stops at the first that fails.
# Usage: scripts/check.sh all | setup | fmt | clippy | docs | deny | unit | fuzz | miri | nested
set -euo pipefail
cd "$(dirname "$0")/.."

readonly all_steps=(setup fmt clippy docs deny unit fuzz miri nested)
readonly fuzz_seconds=5

die() { echo "check: $*" >&2; exit 1; }

without_kvm() { [ "${PAGEWARP_ALLOW_NO_KVM:-}" = 1 ] && [ ! -e /dev/kvm ]; }

# The tests of the GPU backend run on a software device, with the layer that checks how Vulkan is used.
need_vulkan() {
    local found
    # vulkaninfo complains on standard error about windows that nobody wants.
    found=$(vulkaninfo --summary 2>/dev/null) || die "vulkaninfo does not work: install libvulkan1 and vulkan-tools"
    grep -q PHYSICAL_DEVICE_TYPE_CPU <<<"$found" ||
        die "no software Vulkan device (lavapipe): install mesa-vulkan-drivers; is VK_ICD_FILENAMES or VK_DRIVER_FILES set?"
    grep -q VK_LAYER_KHRONOS_validation <<<"$found" ||
        die "no Vulkan validation layer: install vulkan-validationlayers"
}

step_setup() {
    scripts/setup.sh test
    need_vulkan
    # The VMM is the product: without KVM most of it is not tested, and CI must not pass like that.
    if without_kvm; then
        [ "${CI:-}" != true ] || die "PAGEWARP_ALLOW_NO_KVM is for developers, not for CI"
    elif ! { : <>/dev/kvm; } 2>/dev/null; then
        die "/dev/kvm is missing or not writable. Load kvm_intel or kvm_amd, and join the group that owns it:" \
            "sudo usermod -aG kvm $(id -un). PAGEWARP_ALLOW_NO_KVM=1 leaves out the tests that need it."
    fi
}
step_fmt() { cargo fmt --all --check; }
step_clippy() { cargo clippy --locked --workspace --all-targets -- -D warnings; }
step_docs() { RUSTDOCFLAGS="-D warnings" cargo doc --locked --workspace --no-deps --document-private-items; }
step_deny() { scripts/deny.sh; }
step_unit() {
    cargo test --locked --workspace --no-fail-fast
    unit_binary="${CARGO_TARGET_DIR:-target}/debug/pagewarp"
}
step_fuzz() { scripts/fuzz-smoke.sh "$fuzz_seconds"; }
# The scalar loops, which `make miri` has too, take as long again.
step_miri() { scripts/miri.sh avx2; }
# Building the program by itself selects other features of its dependencies, and so builds much of it again.
step_nested() { tests-nested/run.sh ${unit_binary:+"$unit_binary"}; }

summary=()
total_s=0
report() {
    local status=$?
    [ ${#summary[@]} -gt 0 ] && printf '%s\n' "" "check: summary" "${summary[@]}"
    if [ $status -eq 0 ]; then
        without_kvm && verdict="PASS WITHOUT KVM" || verdict=PASS
        echo "check: $verdict ($total_s s)"
    else
        echo "check: FAIL in step '${step:-?}' (exit status $status)" >&2
    fi
}

[ $# -gt 0 ] || die "usage: scripts/check.sh all | STEP...; steps: ${all_steps[*]}"
[ "$1" = all ] && set -- "${all_steps[@]}"
for step in "$@"; do
    declare -F "step_$step" >/dev/null || die "unknown step '$step'; steps: ${all_steps[*]}"
done

trap report EXIT
for step in "$@"; do
    printf '\n=== %s\n' "$step"
    begin=$SECONDS
    "step_$step"
    took=$((SECONDS - begin))
    total_s=$((total_s + took))
    summary+=("$(printf '  %-8s ok  %5d s' "$step" "$took")")
    echo "=== $step: ok, $took s"
done
