//! The migration engine: stages, epochs, convergence, transports, metrics. No hypervisor type in sight.
#![forbid(unsafe_code)]

pub mod available;
pub mod backends;
pub mod bitmap;
mod channel;
mod compute;
pub mod config;
pub mod control;
mod convergence;
mod destination;
mod digest;
pub mod error;
pub mod flow;
#[doc(hidden)]
pub mod fuzzing;
pub mod greeter;
mod history;
mod limiter;
mod link;
pub mod metrics;
pub mod patience;
mod pool;
pub mod report;
pub mod seldom;
mod source;
mod stage_trace;
pub mod sync;
pub mod transport;
pub mod unix_socket;
pub mod vm;

use config::{DestinationConfig, SourceConfig};
use control::MigrationControl;
use error::MigrationError;
use report::{DestinationReport, SourceReport};
use transport::{Acceptor, Connector};
use vm::{DestinationVm, SourceVm};

/// Migrates `vm` to the destination that `connector` reaches, live, and returns when it runs there.
///
/// On any error the VM runs on the source as before, but for [`MigrationError::InDoubt`] and [`MigrationError::StillPaused`], which say what to do. After
/// `Ok` and after `InDoubt` it is paused and must not be resumed by itself.
pub fn migrate(
    vm: &mut dyn SourceVm,
    connector: &dyn Connector,
    config: &SourceConfig,
    control: &MigrationControl,
) -> Result<SourceReport, MigrationError> {
    source::migrate(vm, connector, config, control)
}

/// Receives one VM from the first source that connects to `acceptor`, and returns when the VM runs here.
///
/// On any error the VM does not run here and never will.
pub fn receive(
    vm: &mut dyn DestinationVm,
    acceptor: &dyn Acceptor,
    config: &DestinationConfig,
    control: &MigrationControl,
) -> Result<DestinationReport, MigrationError> {
    destination::receive(vm, acceptor, config, control)
}
