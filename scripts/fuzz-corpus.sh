#!/usr/bin/env bash
# Makes fuzz/corpus anew: seeds that are written by a program, what fuzzers have found here (fuzz/target/corpus) and what was there, and of all that inputs
# that together reach much. Needs a nightly compiler and cargo-fuzz.
# Usage: scripts/fuzz-corpus.sh [TARGET...]
#
# PAGEWARP_FUZZ_BIN: a directory of targets that are built already.
set -euo pipefail
cd "$(dirname "$0")/.."

# All of it is to stay below 200 KiB, which a test checks.
readonly bytes_per_target=11000 files_per_target=60 longest=8192

# shellcheck source=scripts/fuzz-build.sh
. scripts/fuzz-build.sh "$@"

cargo test --locked -q --workspace --test seeds -- --ignored
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for target in "${targets[@]}"; do
    found=fuzz/target/corpus/$target kept=fuzz/corpus/$target
    mkdir -p "$found" "$kept" "$work/$target"
    # As `cargo fuzz cmin` does, which merges one directory with itself.
    "$bin/$target" -merge=1 -max_len=$longest "$work/$target" "$found" "$kept" >"$work/log" 2>&1 ||
        { tail "$work/log" >&2; exit 1; }
    rm -f "$kept"/*
    # The seeds, and of the others some of every size.
    {
        find "$found" -name 'seed-*' -type f -printf '%s %p\n' | sort -k2
        find "$work/$target" -type f -printf '%s %p\n' | sort -n |
            awk -v files=$files_per_target '{ line[NR] = $0 }
                END { step = NR > files ? NR / files : 1; for (at = 1; at <= NR; at += step) print line[int(at)] }'
    } | awk -v most=$bytes_per_target 'sum + $1 <= most { sum += $1; print $2 }' |
        while read -r file; do cp "$file" "$kept/"; done
    echo "fuzz-corpus: $target: $(find "$kept" -type f | wc -l) of $(find "$work/$target" -type f | wc -l) inputs, $(cat "$kept"/* | wc -c) bytes"
done
echo "fuzz-corpus: $(cat fuzz/corpus/*/* | wc -c) bytes in all"
