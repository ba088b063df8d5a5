//! Whether QEMU's stream goes through the bridge, or whether the bridge steps aside: where the processors carry less than the link does, nobody who stands in between is as fast as
//! the two QEMU processes by themselves.
//!
//! On the *direct* route both QEMU processes get an end of one connection between pagewarp's hosts, and pagewarp does what is left: it prepares both sides, follows the migration
//! and hands the VM over. docs/bridge-policy.md, section 5, says what is decided by, and what the direct route lacks.

mod choice;
mod direct;
mod host;
mod probe;

use std::time::Instant;

use pagewarp_engine::control::MigrationControl;
use pagewarp_engine::error::MigrationError;
use pagewarp_engine::metrics::ms;
use pagewarp_engine::transport::{Connector, OneDestination};
use serde::{Deserialize, Serialize};
use tracing::{debug, info};

use super::{ManageConfig, ManageError};
use crate::bridge::Compression;
use crate::protocol::control::Route;
use crate::protocol::hello::{Hello, Purpose, SessionId, Terms};
use crate::qmp::Vm;

use self::choice::choose;

pub use self::choice::RouteWish;
pub(super) use self::direct::{Receiving, give_to_source};
pub(super) use self::probe::answer;

/// Which route was taken, and why.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct RouteReport {
    /// The route.
    pub route: Route,
    /// Why, in words.
    pub reason: String,
    /// Bytes a second that the link was seen to carry; absent if that was not measured.
    pub link_bytes_per_s: Option<f64>,
    /// Bytes a second of QEMU's stream that the bridge is expected to carry on these processors; absent as above.
    pub bridge_bytes_per_s: Option<f64>,
    /// How long the decision took; it is part of the total.
    pub decision_ms: f64,
}

impl RouteReport {
    fn because(route: Route, reason: impl Into<String>) -> RouteReport {
        RouteReport { route, reason: reason.into(), ..RouteReport::default() }
    }
}

/// What only the bridge can do, of what was asked for.
fn needs_the_bridge(config: &ManageConfig) -> Option<&'static str> {
    if config.wish.multifd.is_some() {
        Some("--multifd was asked for: QEMU opens these connections itself")
    } else if config.bridge.verify {
        Some("--verify was asked for")
    } else if !matches!(config.bridge.compression, Compression::Auto) {
        Some("--compression was asked for")
    } else if !config.bridge.backend.is_cpu() {
        Some("a GPU compresses")
    } else {
        None
    }
}

/// Why the source uses the bridge whatever the link is like; `None`: it can do without.
///
/// # Errors
///
/// What was asked for contradicts itself, or is not possible.
pub(super) fn bound_to_bridge(
    config: &ManageConfig,
    connector: &dyn Connector,
    vm: &mut Vm,
) -> Result<Option<&'static str>, ManageError> {
    let why = match needs_the_bridge(config) {
        _ if config.route == RouteWish::Bridge => "it was asked for (--route bridge)",
        Some(why) => why,
        None if !connector.opens_bare() => "connections are encrypted, which QEMU by itself does not do",
        None if !vm.takes_sockets()? => "the source QEMU takes no socket from its monitor (`getfd`)",
        None => return Ok(None),
    };
    if config.route == RouteWish::Direct {
        let what = format!("--route direct does without the bridge, but {why}; leave one of both out");
        return Err(MigrationError::Config(what).into());
    }
    Ok(Some(why))
}

/// With less than this in use a migration is over soon on either route, and to measure the link costs more than it gains.
const WORTH_MEASURING: u64 = 512 << 20;

/// What it is decided by.
pub(super) struct Deciding<'a> {
    pub(super) config: &'a ManageConfig,
    pub(super) connector: &'a dyn Connector,
    pub(super) destination: &'a OneDestination,
    pub(super) session: SessionId,
    /// What was agreed on over the control connection.
    pub(super) terms: Terms,
    /// Bytes of memory that QEMU has.
    pub(super) used: u64,
    pub(super) control: &'a MigrationControl,
}

impl Deciding<'_> {
    /// Decides, after measuring where that is needed. `bound` is what [`bound_to_bridge`] says.
    ///
    /// # Errors
    ///
    /// The route that was asked for is not possible, or somebody cancelled.
    pub(super) fn decide(&self, bound: Option<&'static str>) -> Result<RouteReport, MigrationError> {
        let started = Instant::now();
        let is_asked = self.config.route == RouteWish::Direct;
        let report = match bound {
            Some(why) => RouteReport::because(Route::Bridge, why),
            None if !self.terms.direct && is_asked => {
                let why = "it offers no direct route (--route direct): its pagewarp is older than this one, or its QEMU takes no socket from its monitor (`getfd`)";
                return Err(MigrationError::Refused(why.into()));
            }
            None if !self.terms.direct => {
                RouteReport::because(Route::Bridge, "the destination offers no other route")
            }
            None if is_asked => RouteReport::because(Route::Direct, "it was asked for (--route direct)"),
            None if self.used < WORTH_MEASURING => {
                RouteReport::because(Route::Bridge, "the VM has little memory in use")
            }
            None => self.measured(),
        };
        // The destination has not prepared anything yet.
        if self.control.is_cancelled() {
            return Err(MigrationError::Cancelled);
        }
        info!(route = ?report.route, report.reason, "the route");
        Ok(RouteReport { decision_ms: ms(started.elapsed()), ..report })
    }

    fn measured(&self) -> RouteReport {
        let hello =
            Hello { session: self.session, purpose: Purpose::Probe, terms: self.config.bridge.offer() };
        let go_on = || !self.control.is_cancelled();
        let timeout = self.config.bridge.peer_timeout;
        match probe::measure(self.connector, &hello, self.destination, timeout, &go_on) {
            Ok(rates) => {
                debug!(?rates, "measured");
                choose(&rates)
            }
            // Whatever it is, it will show again where it matters.
            Err(error) => {
                RouteReport::because(Route::Bridge, format!("the link could not be measured: {error}"))
            }
        }
    }
}
