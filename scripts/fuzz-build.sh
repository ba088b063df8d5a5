# shellcheck shell=bash
# To be sourced, with the targets that are wanted as arguments (all of them if there are none). Builds them and sets `bin`, the directory they are in, and `targets`.
# PAGEWARP_FUZZ_BIN: a directory of targets that are built already.

bin=${PAGEWARP_FUZZ_BIN:-}
if [ -z "$bin" ]; then
    # The code under test is the optimised code that ships; overflow and debug assertions stay on.
    cargo +nightly fuzz build --release --debug-assertions
    bin=fuzz/target/$(rustc -vV | sed -n 's/^host: //p')/release
fi
# Who sources this uses both.
# shellcheck disable=SC2034
if [ $# -gt 0 ]; then
    targets=("$@")
else
    mapfile -t targets < <(sed -n 's/^name = "\([a-z_]*\)"$/\1/p' fuzz/Cargo.toml | sort)
fi
