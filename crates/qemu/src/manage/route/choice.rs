//! Which route is the faster one. Pure: it is told what was measured, and answers.

use super::RouteReport;
use crate::protocol::control::Route;
use crate::protocol::hello::Host;

/// What a caller wants.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RouteWish {
    /// The faster one.
    #[default]
    Auto,
    /// The bridge, however fast the link is.
    Bridge,
    /// No bridge. Whatever only the bridge can do must not be asked for.
    Direct,
}

/// What an end of the bridge costs for each byte, its QEMU included, in passes through a local socket: 1.47 s of CPU time for 1 GB at the source and 1.37 s at the destination,
/// where a pass took 0.6 s (docs/bridge-policy.md, section 5).
const PASSES: f64 = 2.5;
/// The passes that one thread does: no end is faster than that, however many processors it has. Nor is QEMU, which sends everything from one thread.
const PASSES_OF_A_THREAD: f64 = 1.0;
/// The direct route has to be so many times as fast, because it lacks what the bridge has.
const MARGIN: f64 = 1.1;
/// A short look at the link is enough where the bridge is so many times as fast.
const SLOW: f64 = 3.0;

/// What was measured.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rates {
    /// What the link carries.
    pub(super) link_bytes_per_s: f64,
    /// The source.
    pub(super) here: Host,
    /// The destination.
    pub(super) there: Host,
}

impl Rates {
    /// Bytes of QEMU's stream that the bridge carries in a second, as far as the processors go. A page that compresses costs the link less, and the processors hardly.
    fn bridge(&self) -> f64 {
        // Both ends want the same processors if they are on the same machine.
        let ends = if self.here.machine == self.there.machine { 2.0 } else { 1.0 };
        let end = |host: Host| {
            let processors = f64::from(host.processors) / ends;
            (processors / PASSES).min(1.0 / PASSES_OF_A_THREAD) * passes_per_s(host)
        };
        end(self.here).min(end(self.there))
    }

    /// Whether the bridge is much faster than the link, so that this need not be measured any better.
    pub(super) fn is_link_slow(&self) -> bool {
        self.link_bytes_per_s * SLOW < self.bridge()
    }

    /// The same without the bridge.
    fn direct(&self) -> f64 {
        self.link_bytes_per_s.min(passes_per_s(self.here) / PASSES_OF_A_THREAD)
    }
}

/// Bytes a second that one processor passes through a local socket.
fn passes_per_s(host: Host) -> f64 {
    f64::from(1u32 << 20) * 1e9 / host.pass_ns_per_mib.max(1) as f64
}

/// Decides by what was measured.
pub(super) fn choose(rates: &Rates) -> RouteReport {
    let (bridge, direct) = (rates.bridge(), rates.direct());
    let (route, reason) = if direct > bridge * MARGIN {
        (
            Route::Direct,
            "the link is faster than a bridge on these processors (--route bridge uses it nevertheless)",
        )
    } else {
        (Route::Bridge, "it is not slower than the link")
    };
    RouteReport {
        link_bytes_per_s: Some(rates.link_bytes_per_s),
        bridge_bytes_per_s: Some(bridge),
        ..RouteReport::because(route, reason)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A processor of 2026.
    const PASS: u64 = 500_000;

    fn host(processors: u32, machine: u64) -> Host {
        Host { processors, pass_ns_per_mib: PASS, machine }
    }

    fn of(gbit: f64, here: Host, there: Host) -> Route {
        choose(&Rates { link_bytes_per_s: gbit * 1e9 / 8.0, here, there }).route
    }

    #[test]
    fn a_slow_link_is_bridged_and_one_that_the_processors_cannot_follow_is_not() {
        let shared = host(2, 1);
        assert_eq!(of(1.0, shared, shared), Route::Bridge);
        assert_eq!(of(10.0, shared, shared), Route::Direct);
        // Each end has these processors for itself.
        assert_eq!(of(1.0, host(2, 1), host(2, 2)), Route::Bridge);
        assert_eq!(of(10.0, host(4, 1), host(4, 2)), Route::Bridge);
        assert_eq!(of(10.0, host(1, 1), host(1, 2)), Route::Direct);
    }

    #[test]
    fn the_weaker_end_counts() {
        assert_eq!(of(10.0, host(16, 1), host(1, 2)), Route::Direct);
        assert_eq!(of(10.0, host(1, 1), host(16, 2)), Route::Direct);
        let slow = Host { pass_ns_per_mib: 4 * PASS, ..host(4, 2) };
        assert_eq!(of(10.0, host(16, 1), slow), Route::Direct);
    }

    #[test]
    fn a_link_that_qemu_cannot_fill_is_no_reason_to_leave_the_bridge() {
        assert_eq!(of(100.0, host(16, 1), host(16, 2)), Route::Bridge);
        assert_eq!(of(100.0, host(2, 1), host(16, 2)), Route::Direct);
    }

    #[test]
    fn what_a_peer_makes_up_is_no_trouble() {
        let nothing = Host::default();
        let choice = choose(&Rates { link_bytes_per_s: f64::INFINITY, here: host(2, 1), there: nothing });
        assert_eq!(choice.route, Route::Direct);
        assert_eq!(choice.bridge_bytes_per_s, Some(0.0));
        let everything = Host { processors: u32::MAX, pass_ns_per_mib: 0, machine: 2 };
        assert_eq!(of(1.0, host(2, 1), everything), Route::Bridge);
    }
}
