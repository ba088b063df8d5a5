//! New connections, up to what they are for.

use std::io;
use std::time::Duration;

use pagewarp_engine::error::MigrationError;
use pagewarp_engine::greeter::{Greeter, HELLO_TIMEOUT};
use pagewarp_engine::transport::{SPEAKS_TLS, Stream};
use tracing::info;

use crate::bridge::link::{Receiving, Sending, peer_error, settle};
use crate::protocol::frame::Kind;
use crate::protocol::hello::{Hello, Terms, encode_ack};

/// A connection that has said what it is for.
pub(crate) struct Greeted {
    pub(crate) stream: Box<dyn Stream>,
    pub(crate) sending: Sending,
    pub(crate) receiving: Receiving,
    pub(crate) hello: Hello,
}

impl Greeted {
    /// Reads the first frame of a new connection.
    pub(crate) fn read(stream: Box<dyn Stream>) -> Result<Greeted, MigrationError> {
        const PEER: &str = "a source";
        let link = |source: io::Error| MigrationError::Link {
            peer: PEER.into(),
            doing: "setting up its connection".into(),
            source,
        };
        stream.set_timeouts(Some(HELLO_TIMEOUT), Some(HELLO_TIMEOUT)).map_err(link)?;
        let mut sending = Sending::new(stream.try_clone_stream().map_err(link)?, PEER.into());
        let mut receiving = Receiving::new(stream.try_clone_stream().map_err(link)?, PEER.into());
        let mut body = Vec::new();
        let first = receiving.receive(&mut body);
        if matches!(&first, Err(MigrationError::Peer(why)) if why == SPEAKS_TLS) {
            // It does not read frames, but sees that these bytes are none of TLS.
            let _ = sending.send_error(SPEAKS_TLS);
        }
        match first?.map(|header| header.kind) {
            Some(Kind::Hello) => {
                let hello = Hello::decode(&body).map_err(peer_error)?;
                Ok(Greeted { stream, sending, receiving, hello })
            }
            Some(kind) => Err(MigrationError::Peer(format!("a {kind:?} frame, expected Hello"))),
            None => Err(link(io::ErrorKind::UnexpectedEof.into())),
        }
    }

    /// Agrees.
    pub(crate) fn acknowledge(&mut self, terms: Terms) -> Result<(), MigrationError> {
        self.sending.send(Kind::HelloAck, &encode_ack(terms), &[])
    }

    /// Agrees, and waits for as long as it takes from now on, but not for a peer that is gone.
    pub(crate) fn accept(&mut self, terms: Terms, timeout: Duration) -> Result<(), MigrationError> {
        self.acknowledge(terms)?;
        settle(&*self.stream, timeout).map_err(|source| MigrationError::Link {
            peer: "a source".into(),
            doing: "setting up its connection".into(),
            source,
        })
    }

    /// Says why not.
    pub(crate) fn refuse(mut self, why: &str) {
        info!(why, "refused a connection");
        // It may be gone.
        let _ = self.sending.send_error(why);
    }

    /// The same, and does not wait until it is said.
    pub(crate) fn dismiss(self, greeter: &mut Greeter<Greeted>, why: String) {
        if let Ok(handle) = self.stream.try_clone_stream() {
            greeter.dismiss(handle, move |_| self.refuse(&why));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::net::TcpStream;
    use std::time::Instant;

    use pagewarp_codec::EncodingSet;
    use pagewarp_engine::greeter::MAX_SILENT;
    use pagewarp_engine::transport::TcpAcceptor;

    use super::*;
    use crate::protocol::hello::Purpose;

    const PATIENCE: Duration = Duration::from_secs(60);

    fn hello() -> Hello {
        let terms =
            Terms { encodings: EncodingSet::ALL, zstd: true, verify: false, direct: false, history_slots: 7 };
        Hello { session: [3; 16], purpose: Purpose::Control, terms }
    }

    #[test]
    fn nobody_waits_for_connections_that_say_nothing() {
        let acceptor = TcpAcceptor::bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let address = acceptor.local_addr().unwrap();
        let mut greeter = Greeter::new(HELLO_TIMEOUT, |stream| Greeted::read(stream).map(Some));
        let silent: Vec<_> = (0..MAX_SILENT + 20).map(|_| TcpStream::connect(address).unwrap()).collect();
        (&silent[0]).write_all(b"PW").unwrap();
        let mut sending = Sending::new(Box::new(TcpStream::connect(address).unwrap()), "us".into());
        sending.send(Kind::Hello, &hello().encode(), &[]).unwrap();
        let started = Instant::now();
        let greeted = loop {
            match greeter.accept(&acceptor, Duration::from_millis(50)).unwrap() {
                Some(greeted) => break greeted,
                None => assert!(started.elapsed() < PATIENCE, "the one that speaks is heard"),
            }
        };
        assert_eq!(greeted.hello, hello());
        assert!(greeter.silent() <= MAX_SILENT + 1);
        drop(greeter);
        silent[silent.len() - 1].set_read_timeout(Some(PATIENCE)).unwrap();
        // All are ended.
        for mut stream in silent {
            let n = io::Read::read(&mut stream, &mut [0]);
            assert!(matches!(n, Ok(0)) || n.is_err_and(|e| e.kind() != io::ErrorKind::WouldBlock));
        }
    }

    #[test]
    fn a_connection_that_drips_is_ended() {
        let acceptor = TcpAcceptor::bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let mut dripping = TcpStream::connect(acceptor.local_addr().unwrap()).unwrap();
        let mut greeter = Greeter::new(HELLO_TIMEOUT, |stream| Greeted::read(stream).map(Some));
        let started = Instant::now();
        // Each byte comes before a read would time out.
        while dripping.write_all(b"P").is_ok() {
            assert!(greeter.accept(&acceptor, Duration::from_millis(500)).unwrap().is_none());
            assert!(started.elapsed() < PATIENCE, "it is still listened to");
        }
    }
}
