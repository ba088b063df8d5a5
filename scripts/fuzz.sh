#!/usr/bin/env bash
# Runs fuzz targets, one after another, each for a number of seconds of CPU time, and prints a table. Needs a nightly compiler and cargo-fuzz.
# Usage: scripts/fuzz.sh SECONDS_PER_TARGET [TARGET...]
#
# CPU time, not the clock: on a busy machine every target gets as much as on an idle one. What is found is kept in fuzz/artifacts, new inputs in
# fuzz/target/corpus; fuzz/corpus is only read. PAGEWARP_FUZZ_BIN: a directory of targets that are built already.
set -euo pipefail
cd "$(dirname "$0")/.."

readonly seconds=${1:-}
[[ $seconds =~ ^[1-9][0-9]*$ ]] || { echo "usage: scripts/fuzz.sh SECONDS_PER_TARGET [TARGET...]" >&2; exit 2; }
shift

# Freed memory that is kept back, to find who still uses it, is no finding.
export ASAN_OPTIONS="quarantine_size_mb=16:${ASAN_OPTIONS:-}"
readonly corpus=fuzz/target/corpus logs=fuzz/target/logs artifacts=fuzz/artifacts
# shellcheck source=scripts/fuzz-build.sh
. scripts/fuzz-build.sh "$@"

ticks=$(getconf CLK_TCK)
readonly ticks

# CPU time that a process has used, in seconds. What stands before the last parenthesis of its line may hold spaces.
cpu_seconds() {
    local stat
    stat=$(cat "/proc/$1/stat" 2>/dev/null) || return 1
    # shellcheck disable=SC2086
    set -- ${stat##*) }
    echo $(((${12} + ${13}) / ticks))
}

running=
trap '[ -z "$running" ] || kill "$running" 2>/dev/null || true' EXIT

# Runs a target until it has used so many seconds in all. Sets `used`.
fuzz() {
    local target=$1 log=$2 limit=$3 now
    mkdir -p "$corpus/$target" "$artifacts/$target"
    local seeds=()
    [ -d "fuzz/corpus/$target" ] && seeds=("fuzz/corpus/$target")
    "$bin/$target" "$corpus/$target" "${seeds[@]}" -artifact_prefix="$artifacts/$target/" \
        -max_len=8192 -timeout=10 -rss_limit_mb=2048 -malloc_limit_mb=256 -print_final_stats=1 >>"$log" 2>&1 &
    running=$!
    used=0
    while now=$(cpu_seconds $running); do
        used=$now
        # It ends by itself, and tells what it has done.
        if [ "$used" -ge "$limit" ]; then kill -USR1 $running 2>/dev/null || true; fi
        sleep 1
    done
    local status=0
    wait $running || status=$?
    running=
    return $status
}

# Of inputs that took too long, those that do so again: the machine may have stood still.
still_too_slow() {
    local input slow=1
    for input in "$artifacts/$1"/timeout-*; do
        [ -e "$input" ] || continue
        if "$bin/$1" -timeout=10 "$input" >/dev/null 2>&1; then rm "$input"; else slow=0; fi
    done
    return $slow
}

mkdir -p "$logs"
rows=() total=0 found=0
for target in "${targets[@]}"; do
    echo "--- fuzz: $target, $seconds s of CPU time ($(date -u +%H:%M:%S))"
    log=$logs/$target.log
    : >"$log"
    left=$seconds spent=0 begun=$SECONDS
    while [ "$left" -gt 0 ]; do
        status=0
        fuzz "$target" "$log" "$left" || status=$?
        spent=$((spent + used)) left=$((left - used))
        [ $status -ne 0 ] || break
        if tail -n 40 "$log" | grep -q 'libFuzzer: timeout' && ! still_too_slow "$target"; then continue; fi
        break
    done
    findings=$(find "$artifacts/$target" -type f ! -name 'slow-unit-*' | wc -l)
    executions=$(sed -n 's/^stat::number_of_executed_units: *//p' "$log" | awk '{ n += $1 } END { print n + 0 }')
    reached=$(grep -o 'cov: [0-9]* ft: [0-9]*' "$log" | tail -1 | awk '{ print $2, $4 }')
    # shellcheck disable=SC2086
    rows+=("$(printf '| `%s` | %d | %d | %d | %s | %s | %d |' \
        "$target" "$spent" $((SECONDS - begun)) "$executions" ${reached:-0 0} "$findings")")
    echo "${rows[-1]}"
    total=$((total + spent)) found=$((found + findings))
    [ $status -eq 0 ] || [ "$findings" -gt 0 ] || { echo "fuzz: $target ended with status $status: $log" >&2; exit 1; }
done
printf '%s\n' "" "| target | CPU seconds | seconds | executions | coverage | features | findings |" "|---|---|---|---|---|---|---|" "${rows[@]}"
echo "fuzz: ${#targets[@]} targets, $total s of CPU time, $found findings"
[ "$found" -eq 0 ] || { echo "fuzz: run a target with a file of $artifacts to see what is wrong" >&2; exit 1; }
