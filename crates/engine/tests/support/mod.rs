//! Both ends of a migration in one process.
#![allow(dead_code, reason = "each test file uses its own part")]

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use pagewarp_codec::CpuBackend;
use pagewarp_engine::config::{DestinationConfig, SourceConfig};
use pagewarp_engine::control::MigrationControl;
use pagewarp_engine::error::MigrationError;
use pagewarp_engine::report::{DestinationReport, SourceReport};
use pagewarp_engine::transport::{Acceptor, Connector};
use pagewarp_engine::vm::SourceVm;
use pagewarp_engine::{migrate, receive};
use pagewarp_testkit::memory::first_difference;
use pagewarp_testkit::memory_vm::{MemoryDestination, MemoryVm};
use pagewarp_testkit::pipe::memory_link;

/// A migration about to happen.
pub(crate) struct Lab {
    pub(crate) vm: MemoryVm,
    pub(crate) destination: MemoryDestination,
    pub(crate) source_config: SourceConfig,
    pub(crate) destination_config: DestinationConfig,
    pub(crate) source_control: MigrationControl,
    pub(crate) destination_control: MigrationControl,
}

/// How both ends saw it.
pub(crate) struct Outcome {
    pub(crate) vm: MemoryVm,
    pub(crate) destination: MemoryDestination,
    pub(crate) sent: Result<SourceReport, MigrationError>,
    pub(crate) received: Result<DestinationReport, MigrationError>,
}

impl Lab {
    pub(crate) fn new(vm: MemoryVm) -> Lab {
        let destination = MemoryDestination::new(&vm.probe());
        let backend = Arc::new(CpuBackend::new());
        let mut source_config = SourceConfig::new(backend.clone());
        source_config.batch_pages = 16;
        source_config.peer_timeout = Duration::from_secs(5);
        source_config.max_epochs = Some(200);
        let mut destination_config = DestinationConfig::new(backend);
        destination_config.peer_timeout = Duration::from_secs(5);
        destination_config.accept_timeout = Duration::from_secs(5);
        Lab {
            vm,
            destination,
            source_config,
            destination_config,
            source_control: MigrationControl::new(),
            destination_control: MigrationControl::new(),
        }
    }

    /// Migrates over connections within the process.
    pub(crate) fn run(self) -> Outcome {
        let (connector, acceptor) = memory_link();
        self.run_over(connector, acceptor)
    }

    pub(crate) fn run_over(mut self, connector: impl Connector, acceptor: impl Acceptor) -> Outcome {
        let (sent, received) = thread::scope(|scope| {
            let destination = scope.spawn(|| {
                receive(&mut self.destination, &acceptor, &self.destination_config, &self.destination_control)
            });
            let sent = migrate(&mut self.vm, &connector, &self.source_config, &self.source_control);
            // A destination that nobody connected to need not wait any longer.
            drop(connector);
            (sent, destination.join().expect("the destination does not panic"))
        });
        Outcome { vm: self.vm, destination: self.destination, sent, received }
    }
}

impl Outcome {
    /// Both ends succeeded, exactly the destination runs, and its memory is the source's to the last byte.
    pub(crate) fn assert_migrated(&self) -> &SourceReport {
        let report = self.sent.as_ref().expect("the source succeeded");
        self.received.as_ref().expect("the destination succeeded");
        assert!(!self.vm.probe().is_running() && self.destination.probe().is_running());
        assert_eq!(self.vm.probe().ledger().most_running(), 1, "two VMs ran at once");
        let memory = self.destination.memory().expect("prepared");
        assert_eq!(first_difference(&*self.vm.memory(), &*memory).unwrap(), None);
        report
    }

    /// Both ends failed and exactly the source runs, with its log off.
    pub(crate) fn assert_stayed(&self) -> (&MigrationError, &MigrationError) {
        let sent = self.sent.as_ref().expect_err("the source failed");
        let received = self.received.as_ref().expect_err("the destination failed");
        assert!(self.vm.probe().is_running(), "the VM does not run on the source after: {sent} / {received}");
        assert!(
            !self.destination.probe().is_running(),
            "the VM runs on the destination after: {sent} / {received}"
        );
        assert_eq!(self.vm.probe().ledger().most_running(), 1, "two VMs ran at once");
        assert!(!self.vm.is_logging());
        (sent, received)
    }
}
