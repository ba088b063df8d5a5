//! In the place of `engine/src/sync.rs`: the same names, of the scheduler.
//!
//! **Time.** Threads of a migration wake up now and then to look whether they should stop. If they always did, a notification that somebody forgot would never be
//! noticed. So there are two kinds of tests: in those where the clock stands ([`Clock::Stands`]) a wait of 50 ms or more ends by what it waits for, or never; in those where
//! it runs ([`Clock::Runs`]), a wait may also be over at any moment. Shorter waits are over soon in both.

use std::cell::{Cell, RefCell};
use std::sync::{LockResult, Weak};

use shuttle::rand::{Rng, thread_rng};
pub use shuttle::sync::{Arc, Mutex, MutexGuard};
use time::Duration;

pub mod channel;

pub use std::sync::PoisonError;

/// Atomics.
pub mod atomic {
    pub use shuttle::sync::atomic::{AtomicBool, AtomicU64, Ordering};
}

/// Waits that last as long are there for the case that somebody should stop.
const LOOK: Duration = Duration::from_millis(50);

/// Whether long waits may be over before what they wait for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Clock {
    /// They may not.
    Stands,
    /// They may, at any moment.
    Runs,
}

/// What is broken on purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Defect {
    /// Nothing.
    None,
    /// Of all that wait for a condition one is woken.
    WakesOne,
    /// A queue that nobody fills any more does not say so.
    SilentEnd,
}

thread_local! {
    // All threads of the scheduler are one of the system.
    static CLOCK: Cell<Clock> = const { Cell::new(Clock::Stands) };
    static DEFECT: Cell<Defect> = const { Cell::new(Defect::None) };
    static NOW: Cell<Duration> = const { Cell::new(Duration::ZERO) };
    static WAITED_FOR: RefCell<Vec<Weak<shuttle::sync::Condvar>>> = const { RefCell::new(Vec::new()) };
}

/// From now on this is broken.
pub(crate) fn break_it(defect: Defect) {
    DEFECT.set(defect);
}

pub(crate) fn is_broken(defect: Defect) -> bool {
    DEFECT.get() == defect
}

/// Runs a test once, with a clock that stands or runs.
pub(crate) fn with_clock(clock: Clock, test: &(impl Fn() + Send + Sync + Clone + 'static)) {
    CLOCK.set(clock);
    NOW.set(Duration::ZERO);
    WAITED_FOR.take();
    if clock == Clock::Stands {
        return test();
    }
    let over = Arc::new(atomic::AtomicBool::new(false));
    let until = over.clone();
    let ticking = shuttle::thread::spawn(move || {
        while !until.load(atomic::Ordering::SeqCst) {
            pass(LOOK);
            let all: Vec<_> = WAITED_FOR.with_borrow(|all| all.iter().filter_map(Weak::upgrade).collect());
            all.iter().for_each(|condvar| condvar.notify_all());
            shuttle::thread::yield_now();
        }
    });
    test();
    over.store(true, atomic::Ordering::SeqCst);
    ticking.join().expect("the clock");
}

fn pass(time: Duration) {
    NOW.set(NOW.get() + time);
}

/// A condition to wait for.
#[derive(Debug)]
pub struct Condvar {
    inner: Arc<shuttle::sync::Condvar>,
}

impl Default for Condvar {
    fn default() -> Condvar {
        Condvar::new()
    }
}

impl Condvar {
    /// A new one.
    pub fn new() -> Condvar {
        let inner = Arc::new(shuttle::sync::Condvar::new());
        WAITED_FOR.with_borrow_mut(|all| all.push(Arc::downgrade(&inner)));
        Condvar { inner }
    }

    /// Waits until somebody notifies, or for so long.
    pub fn wait_timeout<'a, T>(
        &self,
        guard: MutexGuard<'a, T>,
        time: Duration,
    ) -> LockResult<(MutexGuard<'a, T>, bool)> {
        assert!(time >= LOOK, "shorter waits of this kind are not known here");
        let before = NOW.get();
        let is_late = || NOW.get() > before;
        match self.inner.wait(guard) {
            Ok(guard) => Ok((guard, is_late())),
            Err(poisoned) => Err(PoisonError::new((poisoned.into_inner(), is_late()))),
        }
    }

    /// Wakes all who wait.
    pub fn notify_all(&self) {
        if is_broken(Defect::WakesOne) { self.inner.notify_one() } else { self.inner.notify_all() }
    }
}

/// Threads.
pub mod thread {
    use std::io;

    use shuttle::thread::ScopedJoinHandle;
    pub use shuttle::thread::{Scope, yield_now};

    use super::Arc;
    use super::time::Duration;

    /// Threads that end before this returns. What starts them is one too: the scheduler takes the end of the last of them for what its starter waits for, whatever that is.
    pub fn scope<'env, T: Send + 'env>(
        work: impl for<'scope> FnOnce(&'scope Scope<'scope, 'env>) -> T + Send + 'env,
    ) -> T {
        let result = Arc::new(std::sync::Mutex::new(None));
        let to = result.clone();
        shuttle::thread::scope(|scope| {
            scope.spawn(move || {
                let worked = work(scope);
                *to.lock().expect("nobody else has it") = Some(worked);
            });
        });
        let worked = result.lock().expect("nobody else has it").take();
        worked.expect("it has come to its end")
    }

    /// Others run meanwhile.
    pub fn sleep(time: Duration) {
        super::pass(time);
        yield_now();
    }

    /// Whether this thread is on its way out.
    pub fn panicking() -> bool {
        std::thread::panicking()
    }

    /// Starts threads.
    #[derive(Debug)]
    pub struct Builder;

    impl Builder {
        /// With nothing said about them.
        #[allow(clippy::new_without_default, reason = "as in the standard library")]
        pub fn new() -> Builder {
            Builder
        }

        /// Starts one.
        pub fn spawn_scoped<'scope, T: Send + 'scope>(
            self,
            scope: &'scope Scope<'scope, '_>,
            work: impl FnOnce() -> T + Send + 'scope,
        ) -> io::Result<ScopedJoinHandle<'scope, T>> {
            Ok(scope.spawn(work))
        }
    }
}

/// The clock.
pub mod time {
    use std::ops::Add;
    pub use std::time::Duration;

    /// A moment, as the time since the test began.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
    pub struct Instant(Duration);

    impl Instant {
        /// This one.
        pub fn now() -> Instant {
            Instant(super::NOW.get())
        }

        /// How long after the other one it is.
        pub fn saturating_duration_since(self, earlier: Instant) -> Duration {
            self.0.saturating_sub(earlier.0)
        }
    }

    impl Add<Duration> for Instant {
        type Output = Instant;

        fn add(self, time: Duration) -> Instant {
            Instant(self.0 + time)
        }
    }
}

/// Whether a choice that is up to chance comes out so; one in `many` times.
pub fn chance(many: u32) -> bool {
    thread_rng().gen_range(0..many) == 0
}

/// One of so many.
pub fn any(many: usize) -> usize {
    thread_rng().gen_range(0..many)
}
