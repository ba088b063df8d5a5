//! A source bridge and a destination bridge in threads of the test.

#![allow(dead_code, reason = "each test binary uses its own part")]

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::Duration;

use pagewarp_codec::CpuBackend;
use pagewarp_engine::control::MigrationControl;
use pagewarp_engine::error::MigrationError;
use pagewarp_engine::transport::{TcpAcceptor, TcpConnector};
use pagewarp_qemu::bridge::{
    BridgeConfig, DestinationBridge, DestinationBridgeReport, Endpoint, SourceBridge, SourceBridgeReport,
};

/// How long anything may take on a busy machine before the test gives up.
pub(crate) const PATIENCE: Duration = Duration::from_secs(120);

pub(crate) type AtSource = Result<SourceBridgeReport, MigrationError>;
pub(crate) type AtDestination = Result<DestinationBridgeReport, MigrationError>;

/// A destination bridge by itself.
pub(crate) struct Destination {
    pub(crate) address: SocketAddr,
    pub(crate) control: MigrationControl,
    result: Receiver<AtDestination>,
}

impl Destination {
    /// It meets QEMU at `far`.
    pub(crate) fn start(far: Endpoint, config: BridgeConfig) -> Destination {
        let loopback: SocketAddr = "127.0.0.1:0".parse().expect("an address");
        Destination::on(TcpAcceptor::bind(loopback).expect("a port"), far, config, 1)
    }

    /// It serves so many sessions, of which the last counts.
    pub(crate) fn on(
        acceptor: TcpAcceptor,
        far: Endpoint,
        config: BridgeConfig,
        sessions: usize,
    ) -> Destination {
        let address = acceptor.local_addr().expect("it listens");
        let (send, result) = mpsc::channel();
        let control = MigrationControl::new();
        let cancel = control.clone();
        thread::spawn(move || {
            let bridge = DestinationBridge::new(&acceptor, far, config);
            if let Some(last) = (0..sessions).map(|_| bridge.run(None, &cancel)).last() {
                // The test may have failed.
                let _ = send.send(last);
            }
        });
        Destination { address, control, result }
    }

    pub(crate) fn join(self) -> AtDestination {
        self.result.recv_timeout(PATIENCE).expect("the destination bridge ends")
    }
}

/// A source bridge by itself.
pub(crate) struct Source {
    pub(crate) control: MigrationControl,
    result: Receiver<AtSource>,
}

impl Source {
    /// It meets QEMU at `near`, and listens there when this returns.
    pub(crate) fn start(near: Endpoint, to: SocketAddr, config: BridgeConfig) -> Source {
        let connector = TcpConnector { address: to, timeout: PATIENCE };
        let (ready, is_ready) = mpsc::channel();
        let (send, result) = mpsc::channel();
        let control = MigrationControl::new();
        let cancel = control.clone();
        thread::spawn(move || {
            let bridge = SourceBridge::bind(near, &connector, config).expect("a free place");
            ready.send(()).expect("the test waits");
            let _ = send.send(bridge.run([7; 16], &cancel));
        });
        is_ready.recv_timeout(PATIENCE).expect("the source bridge listens");
        Source { control, result }
    }

    pub(crate) fn join(self) -> AtSource {
        self.result.recv_timeout(PATIENCE).expect("the source bridge ends")
    }
}

pub(crate) fn config() -> BridgeConfig {
    BridgeConfig::new(Arc::new(CpuBackend::new()))
}

/// Both bridges.
pub(crate) struct Bridges {
    pub(crate) source: Source,
    pub(crate) destination: Destination,
}

impl Bridges {
    /// The source bridge meets QEMU at `near`, the destination bridge at `far`.
    pub(crate) fn start(near: Endpoint, far: Endpoint, change: impl Fn(&mut BridgeConfig)) -> Bridges {
        let mut config = config();
        change(&mut config);
        let destination = Destination::start(far, config.clone());
        let source = Source::start(near, destination.address, config);
        Bridges { source, destination }
    }

    pub(crate) fn join(self) -> (AtSource, AtDestination) {
        (self.source.join(), self.destination.join())
    }
}
