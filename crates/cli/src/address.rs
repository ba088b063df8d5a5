//! Addresses: resolved early, and refused where memory would cross a network in the clear.

use std::net::{SocketAddr, ToSocketAddrs};

use anyhow::{Result, bail};

use crate::args::Encryption;
use crate::exit::{Exit, failure};

/// Which end of a connection an address is for; it changes the words only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Use {
    /// To listen on.
    Listen,
    /// To connect to.
    Connect,
}

/// An address that may be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Checked {
    /// The address.
    pub address: SocketAddr,
    /// Whether guest memory crosses a network unencrypted: worth a warning.
    pub exposed: bool,
}

/// Resolves `text` (`HOST:PORT`) and applies the loopback rule: any other address needs TLS, or the word that plaintext will do.
pub fn check(text: &str, usage: Use, encryption: &Encryption) -> Result<Checked> {
    let candidates = resolve(text)?;
    // IPv4 first: where a name has both, the other end listens on 0.0.0.0 or 127.0.0.1 more often than on [::].
    let address = *candidates.iter().find(|a| a.is_ipv4()).unwrap_or(&candidates[0]);
    let exposed = !address.ip().is_loopback() && encryption.tls_dir.is_none();
    if exposed && !encryption.plaintext {
        let what = match usage {
            Use::Listen => "listening on",
            Use::Connect => "sending to",
        };
        bail!(failure(
            Exit::Usage,
            format!(
                "{what} {address} would move guest memory over the network unencrypted; pass --tls-dir to encrypt it (`pagewarp certs` makes \
                 certificates to try), --plaintext if that network is trusted, or use 127.0.0.1 through a tunnel"
            )
        ));
    }
    Ok(Checked { address, exposed })
}

fn resolve(text: &str) -> Result<Vec<SocketAddr>> {
    let Some((host, port)) = text.rsplit_once(':').filter(|(host, _)| !host.is_empty()) else {
        bail!(failure(
            Exit::Usage,
            format!("`{text}` is not an address; write HOST:PORT, for example 127.0.0.1:7474")
        ));
    };
    if port.parse::<u16>().is_err() {
        bail!(failure(
            Exit::Usage,
            format!("`{port}` in `{text}` is not a port; write a number from 0 to 65535")
        ));
    }
    let found: Vec<SocketAddr> = text.to_socket_addrs().map_or_else(|_| Vec::new(), Iterator::collect);
    if found.is_empty() {
        bail!(failure(
            Exit::Environment,
            format!(
                "the host name `{host}` cannot be resolved; check its spelling and this host's name service, or write the IP address"
            )
        ));
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exit::exit_of;

    const NONE: Encryption = Encryption { tls_dir: None, plaintext: false };
    const PLAIN: Encryption = Encryption { tls_dir: None, plaintext: true };

    #[test]
    fn loopback_needs_no_flag() {
        for text in ["127.0.0.1:7474", "[::1]:7474", "localhost:7474", "127.8.8.8:0"] {
            let checked = check(text, Use::Listen, &NONE).unwrap();
            assert!(!checked.exposed, "{text}");
        }
    }

    #[test]
    fn another_address_needs_tls_or_plaintext() {
        let tls = Encryption { tls_dir: Some("dir".into()), plaintext: false };
        for text in ["0.0.0.0:7474", "[::]:7474", "192.0.2.1:7474"] {
            let error = check(text, Use::Connect, &NONE).unwrap_err();
            assert_eq!(exit_of(&error), Exit::Usage);
            for option in ["--tls-dir", "--plaintext"] {
                assert!(error.to_string().contains(option), "{error}");
            }
            assert!(check(text, Use::Connect, &PLAIN).unwrap().exposed, "{text}");
            assert!(!check(text, Use::Connect, &tls).unwrap().exposed, "{text}");
        }
    }

    #[test]
    fn what_is_no_address_is_refused() {
        for text in ["", "7474", ":7474", "host", "127.0.0.1:", "127.0.0.1:99999", "127.0.0.1:http"] {
            assert_eq!(exit_of(&check(text, Use::Connect, &PLAIN).unwrap_err()), Exit::Usage, "{text}");
        }
    }
}
