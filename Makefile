# Entry points for people and CI. `make help` lists them. What each step does is in scripts/.

CARGO ?= cargo
DEMO_ARGS ?=
BENCH_ARGS ?=

.PHONY: help demo test build fmt lint docs deny unit fuzz-smoke fuzz fuzz-corpus miri nested bench bench-migration bench-tls bench-qemu soak chaos clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: ## set up, build and run the demo (more options: make demo DEMO_ARGS="--memory 4G")
	scripts/setup.sh demo
	$(CARGO) build --release --locked -p pagewarp
	$(CARGO) run --release --locked -q -p pagewarp -- demo $(DEMO_ARGS)

test: ## everything CI checks: set-up, style, docs, licences, tests, fuzz smoke, nested Linux boot
	scripts/check.sh all

build: ## release build of the whole workspace
	scripts/setup.sh build
	$(CARGO) build --release --locked --workspace

fmt: ## format all code
	$(CARGO) fmt --all

lint: ## formatting and clippy
	scripts/check.sh fmt clippy

docs: ## build the API documentation, warnings are errors
	scripts/check.sh docs

deny: ## licences, banned crates and crate sources
	scripts/check.sh deny

unit: ## unit and integration tests of all crates
	scripts/check.sh unit

fuzz-smoke: ## every fuzz target for a short time
	scripts/check.sh fuzz

fuzz: ## every fuzz target for a long time, and a table: make fuzz SECONDS=300 (of CPU time, each)
	scripts/fuzz.sh $(or $(SECONDS),300)

fuzz-corpus: ## make fuzz/corpus anew from seeds and what fuzzers have found here
	scripts/fuzz-corpus.sh

miri: ## interpret the codec and the wire protocol with Miri, scalar and AVX2 (CI: AVX2 only)
	scripts/miri.sh

nested: ## boot and migrate Linux in an emulated machine with nested virtualization
	scripts/check.sh nested

bench: ## measure the codec (docs/codec-performance.md)
	$(CARGO) run --release --locked -p pagewarp-codec --example codec_speed

bench-migration: ## measure migrations in many settings (docs/migration-performance.md; about 15 minutes)
	scripts/setup.sh demo
	scripts/bench-migration.sh

bench-tls: ## measure what encryption and lasting connections cost a migration (docs/migration-performance.md; root; 6 minutes)
	scripts/setup.sh bench-qemu
	$(CARGO) build --release --locked -p pagewarp --bin pagewarp --example bench_tls
	"$${CARGO_TARGET_DIR:-target}/release/examples/bench_tls" --out target/tls-bench.jsonl $(BENCH_ARGS)

bench-qemu: ## measure migrations of QEMU's VMs, by QEMU alone and through pagewarp (docs/qemu-performance.md; root; 2 hours)
	scripts/setup.sh bench-qemu
	$(CARGO) build --release --locked -p pagewarp --bin pagewarp --example bench_qemu
	"$${CARGO_TARGET_DIR:-target}/release/examples/bench_qemu" $(BENCH_ARGS)

soak: ## migrations back and forth, and disturbed ones at random moments (minutes; see docs/testing.md)
	PAGEWARP_TRIALS=$${PAGEWARP_TRIALS:-50} PAGEWARP_SOAK_ROUNDS=$${PAGEWARP_SOAK_ROUNDS:-20} PAGEWARP_QEMU_TRIALS=$${PAGEWARP_QEMU_TRIALS:-50} PAGEWARP_SOAK_DOWNTIME_MS=$${PAGEWARP_SOAK_DOWNTIME_MS:-300} $(CARGO) test --release --locked -p pagewarp --test soak --test trials --test qemu_trials -- --nocapture --test-threads 1

chaos: ## real VMs under faults drawn from a seed: make chaos SEED=1 TRIALS=200 (root; about 10 s a trial)
	PAGEWARP_CHAOS_TRIALS=$(or $(TRIALS),200) $(if $(SEED),PAGEWARP_SEED=$(SEED)) $(CARGO) test --locked --workspace --test chaos -- --nocapture

clean: ## remove build outputs (downloads in PAGEWARP_CACHE stay, if that is set)
	$(CARGO) clean
