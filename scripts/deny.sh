#!/usr/bin/env bash
# Checks licences, banned crates and crate sources with cargo-deny (deny.toml). Installs cargo-deny if it is missing.
set -euo pipefail
cd "$(dirname "$0")/.."

readonly version=0.20.2
tools="${CARGO_TARGET_DIR:-target}/tools"

has_deny() { "$1" --version 2>/dev/null | grep -qx "cargo-deny $version"; }

if has_deny cargo-deny; then
    deny=cargo-deny
else
    deny="$tools/bin/cargo-deny"
    # Unoptimised: it runs for a second, and an optimised build takes minutes longer on two cores.
    has_deny "$deny" || cargo install cargo-deny --version "$version" --locked --debug --quiet --root "$tools"
fi
"$deny" --all-features check licenses bans sources
