//! Runs a test in many orders of its threads.

use std::panic::{AssertUnwindSafe, catch_unwind};

use shuttle::scheduler::{PctScheduler, RandomScheduler};
use shuttle::{Config, MaxSteps, Runner};

use crate::sync::{self, Clock, Defect};

/// Steps of one order. The longest that end by themselves have a tenth of that; who takes more goes round in circles.
const MAX_STEPS: usize = 100_000;
/// How often one thread overtakes another where it matters, for the scheduler that looks for few such places.
const DEPTH: usize = 3;

/// Runs `test` in this many orders drawn at random, and in as many with few changes between threads.
///
/// # Panics
///
/// If the test does in one of them; or if all threads wait, or some of them for ever. What is printed then repeats the order: `shuttle::replay`.
pub fn orders(count: usize, clock: Clock, test: impl Fn() + Send + Sync + Clone + 'static) {
    let mut config = Config::new();
    config.max_steps = MaxSteps::FailAfter(MAX_STEPS);
    config.stack_size = 256 << 10;
    // Of orders of memory: it knows the strictest alone.
    config.silence_warnings = true;
    let run = move || sync::with_clock(clock, &test);
    Runner::new(RandomScheduler::new(count), config.clone()).run(run.clone());
    // Threads that only look whether time has passed are no threads in the sense of that scheduler: it would run nothing else.
    if clock == Clock::Stands {
        Runner::new(PctScheduler::new(DEPTH, count), config).run(run);
    }
}

/// Whether one of the orders fails, where something is broken on purpose.
pub fn some_order_fails(
    defect: Defect,
    clock: Clock,
    test: impl Fn() + Send + Sync + Clone + 'static,
) -> bool {
    let broken = move || {
        sync::break_it(defect);
        test();
    };
    let failed = catch_unwind(AssertUnwindSafe(|| orders(2000, clock, broken))).is_err();
    sync::break_it(Defect::None);
    failed
}
