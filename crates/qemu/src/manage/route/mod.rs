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

use super::ManageConfig;
use crate::bridge::Compression;
use crate::protocol::control::Route;
use crate::protocol::hello::{Hello, Purpose, SessionId, Terms};

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

/// Whether the source says that it could do without the bridge.
///
/// # Errors
///
/// What was asked for contradicts itself.
pub(super) fn may_be_direct(config: &ManageConfig) -> Result<bool, MigrationError> {
    match (config.route, needs_the_bridge(config)) {
        (RouteWish::Bridge, _) | (RouteWish::Auto, Some(_)) => Ok(false),
        (RouteWish::Direct | RouteWish::Auto, None) => Ok(true),
        (RouteWish::Direct, Some(why)) => Err(MigrationError::Config(format!(
            "--route direct does without the bridge, but {why}; leave one of both out"
        ))),
    }
}

/// With less than this in use a migration is over soon on either route, and to measure the link costs more than it gains.
const WORTH_MEASURING: u64 = 512 << 20;

/// Decides, after measuring where that is needed. `terms` were agreed on over the control connection, and `used` are the bytes of memory that QEMU has.
///
/// # Errors
///
/// The route that was asked for is not possible.
pub(super) fn decide(
    config: &ManageConfig,
    connector: &dyn Connector,
    session: SessionId,
    destination: &OneDestination,
    terms: Terms,
    used: u64,
    control: &MigrationControl,
) -> Result<RouteReport, MigrationError> {
    let started = Instant::now();
    let report = match config.route {
        RouteWish::Bridge => RouteReport::because(Route::Bridge, "it was asked for (--route bridge)"),
        RouteWish::Direct if !terms.direct => {
            let why = "it knows no direct route (--route direct): its pagewarp is older than this one";
            return Err(MigrationError::Refused(why.into()));
        }
        RouteWish::Direct => RouteReport::because(Route::Direct, "it was asked for (--route direct)"),
        RouteWish::Auto => match needs_the_bridge(config) {
            Some(why) => RouteReport::because(Route::Bridge, why),
            None if !terms.direct => {
                RouteReport::because(Route::Bridge, "the destination knows no other route")
            }
            None if used < WORTH_MEASURING => {
                RouteReport::because(Route::Bridge, "the VM has little memory in use")
            }
            None => {
                let hello = Hello { session, purpose: Purpose::Probe, terms: config.bridge.offer() };
                measured(config, connector, &hello, destination, control)
            }
        },
    };
    info!(route = ?report.route, report.reason, "the route");
    Ok(RouteReport { decision_ms: ms(started.elapsed()), ..report })
}

fn measured(
    config: &ManageConfig,
    connector: &dyn Connector,
    hello: &Hello,
    destination: &OneDestination,
    control: &MigrationControl,
) -> RouteReport {
    let go_on = || !control.is_cancelled();
    let timeout = config.bridge.peer_timeout;
    match probe::measure(connector, hello, destination, timeout, &go_on) {
        Ok(Some(rates)) => {
            debug!(?rates, "measured");
            choose(&rates)
        }
        Ok(None) => {
            RouteReport::because(Route::Bridge, "connections are encrypted, which QEMU by itself does not do")
        }
        // Whatever it is, it will show again where it matters.
        Err(error) => RouteReport::because(Route::Bridge, format!("the link could not be measured: {error}")),
    }
}
