#!/usr/bin/env bash
# Runs the demo in the settings of docs/migration-performance.md and keeps the raw JSON. Wants an otherwise idle machine with /dev/kvm and
# 10 GiB of free memory; takes about 15 minutes.
# Usage: scripts/bench-migration.sh [OUTPUT_DIRECTORY]
set -euo pipefail
cd "$(dirname "$0")/.."

out=${1:-target/bench-migration}
mkdir -p "$out"
cargo build --release --locked -q -p pagewarp
pagewarp="${CARGO_TARGET_DIR:-target}/release/pagewarp"

bench() {
    local name=$1
    shift
    echo "=== $name: pagewarp demo $*"
    # A mode that does not converge is a result, not a failure of the benchmark.
    "$pagewarp" demo "$@" --output "$out/$name.json" 2>"$out/$name.log" | tee "$out/$name.txt" || cat "$out/$name.log"
}

bench default-1g
bench downtime-20-runs --runs 20 --modes pipelined-compressed
bench kv-4g --memory 4G --rate 25000 --modes sequential,pipelined-compressed
bench kv-4g-unshaped --memory 4G --link none --modes sequential,pipelined,pipelined-compressed
bench fast-writer-1g --rate 150000 --modes sequential,pipelined-compressed
bench slow-writer-1g --rate 10000 --modes sequential,pipelined-compressed
bench graph-1g --workload graph --modes sequential,pipelined-compressed
bench idle-4g --workload idle --memory 4G --modes sequential,pipelined-compressed
