#!/usr/bin/env bash
# Shows that check-console.awk accepts a good console and finds each kind of damage.
set -euo pipefail
cd "$(dirname "$0")"

check() { busybox awk -f check-console.awk; }
good=$(printf '%s\n' 'inner: Linux 6.1, cpus=1 clock=kvm-clock' \
    'tick 1 up=2.50 date=100 check=ok' 'tick 2 up=3.50 date=101 check=ok' 'tick 3 up=10.25 date=108 check=ok')

expect_bad() {
    local want=$1 console=$2 got
    if got=$(check <<<"$console"); then
        echo "check-console-test: not found: $want" >&2
        exit 1
    fi
    [[ $got == *"$want"* ]] || { echo "check-console-test: expected '$want', got '$got'" >&2; exit 1; }
}

check <<<"$good" || { echo "check-console-test: a good console was refused" >&2; exit 1; }
check <<<"${good//$'\n'/$'\r\n'}" || { echo "check-console-test: line ends of a serial line were refused" >&2; exit 1; }
expect_bad 'after tick 1 came: tick 3' "${good/tick 2*tick 3/tick 3}"
expect_bad 'after tick 2 came: tick 2' "${good/tick 3/tick 2}"
expect_bad 'a clock went back' "${good/up=10.25/up=1.25}"
expect_bad 'a clock went back' "${good/date=108/date=99}"
expect_bad 'check=BAD-seed' "${good/check=ok/check=BAD-seed}"
expect_bad 'a damaged line: titick 2' "${good/tick 2/titick 2}"
expect_bad 'rcu_sched self-detected stall' "$good"$'\nrcu: INFO: rcu_sched self-detected stall on CPU'
expect_bad 'booted 2 times' "$good"$'\ninner: Linux 6.1'
expect_bad 'no tick' 'inner: Linux 6.1'
