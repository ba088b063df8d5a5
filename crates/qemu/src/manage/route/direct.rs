//! The direct route: one connection between pagewarp's hosts, whose ends are given to the QEMU processes.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use pagewarp_engine::error::MigrationError;
use pagewarp_engine::greeter::{Greeter, HELLO_TIMEOUT};
use pagewarp_engine::transport::{Acceptor, Connector, OneDestination, Stream, same_peer};
use rustix::net::Shutdown;

use super::probe::Bare;
use crate::bridge::Awaited;
use crate::bridge::destination::{BUSY, Greeted};
use crate::bridge::source::link::connect_while;
use crate::manage::ManageError;
use crate::protocol::hello::{Hello, Purpose, Terms};
use crate::qmp::{QmpError, Vm};

/// What the socket is called in either QEMU.
const NAME: &str = "pagewarp";
/// How long a single wait for the source's connection takes, and one for those that are going to be turned away.
const LOOK: Duration = Duration::from_millis(20);
const GLANCE: Duration = Duration::from_millis(1);
/// How long the peer's host may take to acknowledge what QEMU sends. The kernel also counts the time in which that host is there and its QEMU takes nothing.
const DEAD: Duration = Duration::from_secs(30);

/// A connection that QEMU was given.
pub(in crate::manage) struct Given(OwnedFd);

impl Given {
    /// Ends it. QEMU may be too busy to be told anything, and must not complete a migration that was given up.
    pub(in crate::manage) fn cut(&self) {
        // Fails only where it has ended.
        let _ = rustix::net::shutdown(&self.0, Shutdown::Both);
    }
}

/// Opens the connection and gives it to the source QEMU, which sends itself over it from here on.
pub(in crate::manage) fn give_to_source(
    vm: &mut Vm,
    connector: &dyn Connector,
    hello: &Hello,
    destination: &OneDestination,
    timeout: Duration,
    go_on: &(dyn Fn() -> bool + Sync),
) -> Result<Given, ManageError> {
    let (link, ..) = connect_while(&Bare(connector), hello, destination, timeout, go_on)?;
    let broken = |e| MigrationError::of_connection(&connector.peer(), "setting up the connection", e);
    let socket = bare(&*link.stream).map_err(broken)?;
    let given = Given(socket.ok_or_else(|| broken(io::ErrorKind::Unsupported.into()))?);
    let told = vm.give_socket(NAME, given.0.as_fd()).and_then(|()| vm.migrate(&format!("fd:{NAME}")));
    if let Err(error) = told {
        // Whatever QEMU makes of it later.
        given.cut();
        if matches!(error, QmpError::Refused { .. }) {
            let _ = vm.take_back_socket(NAME);
        }
        return Err(error.into());
    }
    Ok(given)
}

/// The socket of a connection, for QEMU, which knows no timeouts.
fn bare(stream: &dyn Stream) -> io::Result<Option<OwnedFd>> {
    stream.set_timeouts(None, None)?;
    stream.detect_death(DEAD)?;
    stream.bare_socket()
}

/// The destination: waits for the source's connection, and turns away all others.
pub(in crate::manage) struct Receiving<'a> {
    acceptor: &'a dyn Acceptor,
    awaited: &'a Awaited,
    terms: Terms,
    greeter: Greeter<Greeted>,
    given: Option<Given>,
}

impl<'a> Receiving<'a> {
    /// From here on the source's pagewarp is not waited for where it is lost: its QEMU goes on without it.
    pub(in crate::manage) fn new(
        acceptor: &'a dyn Acceptor,
        awaited: &'a Awaited,
        terms: Terms,
    ) -> Receiving<'a> {
        let greeter = Greeter::new(HELLO_TIMEOUT, |stream| Greeted::read(stream).map(Some));
        acceptor.limit_outage(Some(Duration::ZERO));
        Receiving { acceptor, awaited, terms, greeter, given: None }
    }

    /// QEMU has the VM, and the source QEMU does not go on by itself any more: to hear what is to become of it is worth waiting for.
    pub(in crate::manage) fn arrived(&self) {
        self.acceptor.limit_outage(None);
    }

    /// Nobody gets a connection any more, and who has one loses it.
    pub(in crate::manage) fn end(&self) {
        if let Some(given) = &self.given {
            given.cut();
        }
    }

    /// Waits a moment for a connection. The right one goes to the QEMU of this host.
    pub(in crate::manage) fn look(&mut self, vm: &mut Vm) -> Result<(), ManageError> {
        // QEMU is given it soon, or everything else can wait.
        let patience = if self.given.is_none() { LOOK } else { GLANCE };
        let link = |source| {
            let peer = format!("the source, at {}", self.acceptor.local());
            MigrationError::Link { peer, doing: "waiting for its connection".into(), source }
        };
        let Some(greeted) = self.greeter.accept(self.acceptor, patience).map_err(link)? else {
            return Ok(());
        };
        let why = if greeted.hello.session != self.awaited.session {
            BUSY.to_owned()
        } else if let Err(why) = same_peer(self.awaited.identity.as_deref(), &*greeted.stream) {
            why.0
        } else if greeted.hello.purpose != Purpose::Direct || self.given.is_some() {
            "the source has chosen the direct route, which has one connection".to_owned()
        } else {
            self.given = Some(self.give(vm, greeted)?);
            return Ok(());
        };
        greeted.dismiss(&mut self.greeter, why);
        Ok(())
    }

    fn give(&self, vm: &mut Vm, mut greeted: Greeted) -> Result<Given, ManageError> {
        let link = |source| {
            let peer = "a source".into();
            MigrationError::Link { peer, doing: "setting up its connection".into(), source }
        };
        let Some(socket) = bare(&*greeted.stream).map_err(link)? else {
            let why = "a connection that is encrypted or mended cannot be given to QEMU";
            greeted.refuse(why);
            return Err(MigrationError::Peer(why.into()).into());
        };
        let told =
            vm.give_socket(NAME, socket.as_fd()).and_then(|()| vm.migrate_incoming(&format!("fd:{NAME}")));
        if let Err(error) = told {
            greeted.refuse(&error.to_string());
            return Err(error.into());
        }
        // QEMU reads from it when something comes, which is after this, and writes nothing before.
        greeted.acknowledge(self.terms.agree(greeted.hello.terms))?;
        Ok(Given(socket))
    }
}
