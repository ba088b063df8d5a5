#!/usr/bin/env bash
# Interprets the codec and the wire protocol with Miri, which sees every wrong use of memory: inputs of the fuzzers' corpus, with the scalar inner loops and with those
# for AVX2. (Miri does not know what the loops for AVX-512 need.)
# Usage: scripts/miri.sh [avx2]; avx2: with those for AVX2 only, which have the `unsafe` in them.
set -euo pipefail
cd "$(dirname "$0")/.."

not_checked() {
    cat >&2 <<END_OF_MESSAGE
################################################################################
# NOT CHECKED WITH MIRI: $1
# The same inputs run as ordinary tests, which see only what comes out.
# To check: rustup toolchain install nightly --profile minimal --component miri,rust-src
################################################################################
END_OF_MESSAGE
    cargo test --locked -p pagewarp-replay
    echo "miri: not checked ($1)" >&2
    exit 0
}

cargo +nightly --version >/dev/null 2>&1 || not_checked "there is no nightly toolchain"
if ! cargo +nightly miri --version >/dev/null 2>&1; then
    rustup component add --toolchain nightly miri rust-src || not_checked "the component cannot be installed"
fi
cargo +nightly miri setup || not_checked "its standard library cannot be built"

# A directory of its own: flags differ between the two runs, and from everything else.
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-target}/miri
# The inputs are files.
export MIRIFLAGS="-Zmiri-disable-isolation ${MIRIFLAGS:-}"
flags=${RUSTFLAGS:-}
kinds=("" "-C target-feature=+avx2,+bmi1,+bmi2,+popcnt,+lzcnt")
[ "${1:-}" = avx2 ] && kinds=("${kinds[1]}")
for features in "${kinds[@]}"; do
    [[ -z $features || $(uname -m) == x86_64 ]] || continue
    echo "--- miri: ${features:-scalar}"
    RUSTFLAGS="$flags $features" cargo +nightly miri test --locked -p pagewarp-replay --test replay -- --nocapture
done
echo "miri: ok"
