#!/usr/bin/env bash
# Runs every fuzz target for a bounded time, from the inputs in fuzz/corpus on. Needs a nightly compiler; without one, runs the property tests, which call the
# same functions, and says so.
# Usage: scripts/fuzz-smoke.sh [SECONDS_PER_TARGET]
set -euo pipefail
cd "$(dirname "$0")/.."

readonly seconds=${1:-20}
readonly cargo_fuzz_version=0.13.2

[[ $seconds =~ ^[1-9][0-9]*$ ]] || { echo "fuzz-smoke: '$seconds' is not a number of seconds" >&2; exit 2; }

property_tests_only() {
    cat >&2 <<END
################################################################################
# NOT FUZZED: $1
# Only the property tests run, which call the same functions on random input.
# To fuzz: rustup toolchain install nightly --profile minimal
#          cargo install cargo-fuzz --version $cargo_fuzz_version --locked
################################################################################
END
    cargo test --locked -p pagewarp-wire -p pagewarp-codec
    cargo test --locked -p pagewarp-engine -p pagewarp-kvm -p pagewarp-net -p pagewarp-qemu --lib fuzzing
    cargo test --locked -p pagewarp-qemu --test stream
    cargo test --locked -p pagewarp-replay
    echo "fuzz-smoke: only property tests ran ($1)" >&2
    exit 0
}

cargo +nightly --version >/dev/null 2>&1 || property_tests_only "there is no nightly toolchain"
if ! cargo fuzz --version >/dev/null 2>&1; then
    cargo install cargo-fuzz --version "$cargo_fuzz_version" --locked || property_tests_only "cargo-fuzz cannot be installed"
fi

# Freed memory that is kept back, to find who still uses it, is no finding.
export ASAN_OPTIONS="quarantine_size_mb=16:${ASAN_OPTIONS:-}"
# The code under test is the optimised code that ships; overflow and debug assertions stay on.
cargo +nightly fuzz build --release --debug-assertions
for target in $(cargo +nightly fuzz list); do
    echo "--- fuzz-smoke: $target, $seconds s"
    # What it finds does not belong into the repository.
    mkdir -p "fuzz/target/corpus/$target"
    cargo +nightly fuzz run --release --debug-assertions "$target" "fuzz/target/corpus/$target" "fuzz/corpus/$target" -- \
        -max_total_time="$seconds" -max_len=8192 -timeout=10 -rss_limit_mb=2048 -malloc_limit_mb=256 -print_final_stats=1
done
echo "fuzz-smoke: ok, $(cargo +nightly fuzz list | wc -l) targets, $seconds s each"
