//! Who a certificate is for.

use std::fmt::{Display, Formatter};
use std::time::SystemTime;

use pagewarp_wire::misleads;
use ring::digest::{SHA256, digest};
use rustls::pki_types::CertificateDer;
use x509_cert::Certificate;
use x509_cert::der::{DateTime, Decode};
use x509_cert::ext::pkix::SubjectAltName;
use x509_cert::ext::pkix::name::GeneralName;

/// Whom a certificate names, and which one it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Identity {
    /// Its common name and its DNS names, each once.
    pub(super) names: Vec<String>,
    fingerprint: String,
}

impl Identity {
    /// Of a certificate whose signature has been checked. One whose names cannot be read has none.
    pub(super) fn of(cert: &CertificateDer<'_>) -> Identity {
        let fingerprint = digest(&SHA256, cert).as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
        let names = Certificate::from_der(cert).map(|cert| names(&cert)).unwrap_or_default();
        Identity { names, fingerprint }
    }

    /// Whether one of its names is among these.
    pub(super) fn is_one_of(&self, allowed: &[String]) -> bool {
        self.names.iter().any(|name| allowed.iter().any(|allowed| allowed.eq_ignore_ascii_case(name)))
    }

    /// What is wrong with the dates of a certificate at this time, as words that follow its name.
    pub(super) fn invalid_at(cert: &CertificateDer<'_>, now: SystemTime) -> Option<String> {
        let cert = Certificate::from_der(cert).ok()?;
        let validity = cert.tbs_certificate().validity();
        if now < validity.not_before.to_system_time() {
            return Some(format!("is not valid before {}", validity.not_before.to_date_time()));
        }
        if now > validity.not_after.to_system_time() {
            return Some(format!("expired at {}", validity.not_after.to_date_time()));
        }
        None
    }
}

impl Display for Identity {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        let names = if self.names.is_empty() { "no name".to_owned() } else { self.names.join(", ") };
        write!(f, "{names} (SHA-256 {})", self.fingerprint)
    }
}

/// A time as people write it.
pub(super) fn date(seconds: u64) -> String {
    DateTime::from_unix_duration(std::time::Duration::from_secs(seconds))
        .map_or_else(|_| format!("second {seconds} of 1970"), |date| date.to_string())
}

fn names(cert: &Certificate) -> Vec<String> {
    let tbs = cert.tbs_certificate();
    let mut names = Vec::new();
    if let Ok(Some(name)) = tbs.subject().common_name() {
        names.push(printable(&name.value()));
    }
    if let Ok(Some((_, SubjectAltName(alternatives)))) = tbs.get_extension::<SubjectAltName>() {
        for alternative in alternatives {
            if let GeneralName::DnsName(name) = alternative {
                let name = printable(name.as_str());
                if !names.contains(&name) {
                    names.push(name);
                }
            }
        }
    }
    names
}

/// A name goes into messages and logs, whatever a CA has let through.
pub(super) fn printable(name: &str) -> String {
    name.chars().map(|c| if misleads(c) { '?' } else { c }).collect()
}
