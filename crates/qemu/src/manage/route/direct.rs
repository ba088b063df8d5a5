//! The direct route: one connection between pagewarp's hosts, whose ends are given to the QEMU processes.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use pagewarp_engine::error::MigrationError;
use pagewarp_engine::greeter::{Greeter, HELLO_TIMEOUT};
use pagewarp_engine::transport::{Acceptor, Connector, OneDestination, Stream, same_peer};

use super::probe::connect_bare;
use crate::bridge::Awaited;
use crate::bridge::destination::Greeted;
use crate::manage::ManageError;
use crate::protocol::hello::{Hello, Purpose, Terms};
use crate::qmp::{QmpError, Vm};

/// What the socket is called in either QEMU.
const NAME: &str = "pagewarp";
/// How long the peer's host may take to acknowledge what QEMU sends. The kernel also counts the time in which that host is there and its QEMU takes nothing.
const DEAD: Duration = Duration::from_secs(30);

/// Opens the connection and gives it to the source QEMU, which sends itself over it from here on.
pub(in crate::manage) fn give_to_source(
    vm: &mut Vm,
    connector: &dyn Connector,
    hello: &Hello,
    destination: &OneDestination,
    timeout: Duration,
    go_on: &(dyn Fn() -> bool + Sync),
) -> Result<(), ManageError> {
    let opened = connect_bare(connector, hello, destination, timeout, go_on)?;
    let encrypted = || {
        MigrationError::Config(
            "--route direct leaves QEMU alone with the connection, which cannot be encrypted then; leave it out, or give --plaintext on both hosts".into(),
        )
    };
    let (link, _) = opened.ok_or_else(encrypted)?;
    let broken = |e| MigrationError::of_connection(&connector.peer(), "setting up the connection", e);
    let socket = bare(&*link.stream).map_err(broken)?.ok_or_else(encrypted)?;
    vm.give_socket(NAME, socket.as_fd())?;
    vm.migrate(&format!("fd:{NAME}")).inspect_err(|_| {
        // Unless it is the monitor that failed.
        let _ = vm.take_back_socket(NAME);
    })?;
    Ok(())
}

/// The socket of a connection, for QEMU, which knows no timeouts.
fn bare(stream: &dyn Stream) -> io::Result<Option<OwnedFd>> {
    stream.set_timeouts(None, None)?;
    stream.detect_death(DEAD)?;
    stream.bare_socket()
}

/// The destination, until the source's connection has come.
pub(in crate::manage) struct Receiving<'a> {
    pub(in crate::manage) acceptor: &'a dyn Acceptor,
    pub(in crate::manage) awaited: &'a Awaited,
    pub(in crate::manage) terms: Terms,
    greeter: Greeter<Greeted>,
}

impl<'a> Receiving<'a> {
    pub(in crate::manage) fn new(
        acceptor: &'a dyn Acceptor,
        awaited: &'a Awaited,
        terms: Terms,
    ) -> Receiving<'a> {
        let greeter = Greeter::new(HELLO_TIMEOUT, |stream| Greeted::read(stream).map(Some));
        Receiving { acceptor, awaited, terms, greeter }
    }

    /// Waits a moment for the connection, and gives it to the QEMU of this host. Returns whether it has it.
    pub(in crate::manage) fn look(&mut self, vm: &mut Vm, patience: Duration) -> Result<bool, ManageError> {
        let link = |source| {
            let peer = format!("the source, at {}", self.acceptor.local());
            MigrationError::Link { peer, doing: "waiting for its connection".into(), source }
        };
        let Some(greeted) = self.greeter.accept(self.acceptor, patience).map_err(link)? else {
            return Ok(false);
        };
        let why = if greeted.hello.session != self.awaited.session {
            "this destination is busy with another migration, and takes one at a time".to_owned()
        } else if let Err(why) = same_peer(self.awaited.identity.as_deref(), &*greeted.stream) {
            why.0
        } else if greeted.hello.purpose != Purpose::Direct {
            "the source has chosen the direct route, which has one connection".to_owned()
        } else {
            return self.give(vm, greeted);
        };
        greeted.dismiss(&mut self.greeter, why);
        Ok(false)
    }

    fn give(&self, vm: &mut Vm, mut greeted: Greeted) -> Result<bool, ManageError> {
        let link = |source| {
            let peer = "a source".into();
            MigrationError::Link { peer, doing: "setting up its connection".into(), source }
        };
        let Some(socket) = bare(&*greeted.stream).map_err(link)? else {
            let why = "a connection that is encrypted or mended cannot be given to QEMU";
            greeted.refuse(why);
            return Err(MigrationError::Peer(why.into()).into());
        };
        if let Err(error) = give_to_destination(vm, &socket) {
            greeted.refuse(&error.to_string());
            return Err(error.into());
        }
        // QEMU reads from it when something comes, which is after this, and writes nothing before.
        let terms = self.terms.agree(greeted.hello.terms);
        greeted.acknowledge(terms)?;
        Ok(true)
    }
}

fn give_to_destination(vm: &mut Vm, socket: &OwnedFd) -> Result<(), QmpError> {
    vm.give_socket(NAME, socket.as_fd())?;
    vm.migrate_incoming(&format!("fd:{NAME}"))
}
