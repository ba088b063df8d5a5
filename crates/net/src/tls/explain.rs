//! What goes wrong in a handshake, in words that say what to do.

use std::path::Path;

use rustls::{AlertDescription, CertificateError, Error, ExtendedKeyPurpose};

use super::identity::date;

/// Who looks at whom.
#[derive(Clone, Copy, Debug)]
pub(super) struct Words<'a> {
    /// The other end: "the source" or "the destination".
    pub(super) peer: &'static str,
    /// The certificate of this end.
    pub(super) cert: &'a Path,
    /// The CAs that this end trusts.
    pub(super) ca: &'a Path,
}

impl Words<'_> {
    /// Why a handshake failed.
    pub(super) fn error(&self, error: &Error) -> String {
        let peer = self.peer;
        match error {
            Error::InvalidCertificate(why) => self.certificate(why),
            Error::AlertReceived(alert) => self.alert(*alert),
            Error::NoCertificatesPresented => {
                format!("{peer} has shown no certificate; it needs one of this CA")
            }
            Error::InvalidMessage(_) => self.not_tls(&[]),
            Error::PeerIncompatible(why) => {
                format!("{peer} speaks no TLS that is spoken here, which is TLS 1.3 ({why:?})")
            }
            Error::NoApplicationProtocol => self.other_program(),
            other => format!("the TLS handshake with {peer} failed: {other}"),
        }
    }

    /// The peer began with these bytes.
    pub(super) fn not_tls(&self, bytes: &[u8]) -> String {
        let seen = match bytes {
            [] => String::new(),
            _ => format!(" (its first bytes are \"{}\")", bytes[..bytes.len().min(4)].escape_ascii()),
        };
        format!(
            "{} does not speak TLS{seen}; pass --tls-dir on both hosts, with the same pagewarp command on the other end",
            self.peer
        )
    }

    /// The peer speaks TLS, and something else in it.
    pub(super) fn other_program(&self) -> String {
        format!(
            "{} speaks TLS, but is not pagewarp, or one that does not fit; see that the port is the right one",
            self.peer
        )
    }

    fn certificate(&self, why: &CertificateError) -> String {
        let what = format!("the certificate of {}", self.peer);
        match why {
            CertificateError::ExpiredContext { time, not_after } => format!(
                "{what} expired at {}, and the clock of this host says {}; renew it, or set the clock",
                date(not_after.as_secs()),
                date(time.as_secs())
            ),
            CertificateError::Expired => {
                format!("{what} has expired; renew it, or set the clock of this host")
            }
            CertificateError::NotValidYetContext { time, not_before } => format!(
                "{what} is not valid before {}, and the clock of this host says {}; set the clocks of both hosts",
                date(not_before.as_secs()),
                date(time.as_secs())
            ),
            CertificateError::NotValidYet => format!("{what} is not valid yet; set the clocks of both hosts"),
            CertificateError::UnknownIssuer => format!(
                "{what} is not signed by a CA in `{}`; both hosts need certificates of the same CA",
                self.ca.display()
            ),
            CertificateError::BadSignature => format!(
                "{what} has a signature that is not that of the CA in `{}`, though the name is the same",
                self.ca.display()
            ),
            CertificateError::NotValidForNameContext { expected, presented } => {
                let expected = expected.to_str();
                let names: Vec<_> = presented.iter().map(|name| plain_name(name)).collect();
                let names = match &names[..] {
                    [] => "has no alternative names at all (its common name does not count)".to_owned(),
                    names => format!("is for {}", names.join(", ")),
                };
                format!(
                    "{what} is not for `{expected}`: it {names}; connect by a name that it has, or say which one to expect with --tls-hostname"
                )
            }
            CertificateError::NotValidForName => format!("{what} is for another host; see --tls-hostname"),
            CertificateError::Revoked => format!("{what} has been revoked by its CA"),
            CertificateError::InvalidPurposeContext { required, .. } => {
                let required = match required {
                    ExtendedKeyPurpose::ClientAuth => "a TLS client, as which the source connects",
                    ExtendedKeyPurpose::ServerAuth => "a TLS server, which the destination is",
                    _ => "this",
                };
                format!("{what} is not meant for {required}: see its extended key usage")
            }
            CertificateError::InvalidPurpose => {
                format!("{what} is not meant for this: see its extended key usage")
            }
            other => format!("{what} cannot be accepted: {other}"),
        }
    }

    /// The peer refused, and said so with this.
    fn alert(&self, alert: AlertDescription) -> String {
        let (peer, cert) = (self.peer, self.cert.display());
        match alert {
            AlertDescription::CertificateExpired => {
                format!(
                    "{peer} says that the certificate `{cert}` of this host has expired or is not valid yet; renew it, or set the clocks of both hosts"
                )
            }
            AlertDescription::UnknownCA => {
                format!(
                    "{peer} does not trust the CA that signed the certificate `{cert}` of this host; both hosts need certificates of the same CA"
                )
            }
            AlertDescription::CertificateRequired => {
                format!("{peer} wants a certificate, and this host has shown none")
            }
            AlertDescription::CertificateRevoked => {
                format!("{peer} says that the certificate `{cert}` of this host has been revoked")
            }
            AlertDescription::BadCertificate
            | AlertDescription::UnsupportedCertificate
            | AlertDescription::CertificateUnknown
            | AlertDescription::AccessDenied
            | AlertDescription::DecryptError => format!(
                "{peer} refused the certificate `{cert}` of this host ({alert:?}): is it for the name by which the destination is reached, and meant for the end that it is used at?"
            ),
            AlertDescription::NoApplicationProtocol => self.other_program(),
            AlertDescription::ProtocolVersion => format!("{peer} does not speak TLS 1.3"),
            other => format!("{peer} refused the TLS handshake ({other:?})"),
        }
    }
}

/// Names come as `DnsName("host")` or `IpAddress(...)`.
fn plain_name(name: &str) -> String {
    let inner = name.split_once('(').and_then(|(_, rest)| rest.strip_suffix(')')).unwrap_or(name);
    format!("`{}`", inner.trim_matches('"'))
}
