//! What a peer of TLS shows and says that is read here and not by the TLS library.

use std::collections::BTreeSet;
use std::time::{Duration, SystemTime};

use pagewarp_wire::misleads;
use rustls::pki_types::CertificateDer;

use super::handshake::{MAX_REASON, Verdict, verdict, wanted};
use super::identity::Identity;

/// Reads `data` as a certificate, or as the destination's word.
///
/// # Panics
///
/// If what is to be printed holds what a terminal obeys, or a word is longer than it may be.
pub fn fuzz_tls(data: &[u8]) {
    let [kind, data @ ..] = data else { return };
    if kind % 2 == 0 { certificate(data) } else { word(data) }
}

fn certificate(data: &[u8]) {
    let cert = CertificateDer::from(data);
    let identity = Identity::of(&cert);
    assert!(!identity.to_string().contains(misleads), "{identity:?}");
    let names: BTreeSet<_> = identity.names.iter().collect();
    assert_eq!(names.len(), identity.names.len(), "a name twice: {identity:?}");
    assert!(identity.names.is_empty() || identity.is_one_of(&identity.names[..1]));
    let day = Duration::from_secs(24 * 3600);
    let times = [0, 1, 20_000, 1 << 20].map(|days| SystemTime::UNIX_EPOCH + day * days);
    for why in times.into_iter().filter_map(|now| Identity::invalid_at(&cert, now)) {
        assert!(!why.contains(misleads), "{why}");
    }
}

fn word(data: &[u8]) {
    let mut word = Vec::new();
    let mut bytes = data.iter().copied();
    while wanted(&word) > word.len() {
        let Some(byte) = bytes.next() else { return };
        word.push(byte);
    }
    assert!(word.len() <= 3 + MAX_REASON);
    if let Verdict::Refused(why) = verdict(&word) {
        assert!(!why.contains(misleads) && why.chars().count() <= MAX_REASON);
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;
    use rcgen::{CertificateParams, DnType, KeyPair};

    /// A certificate with these names, as DER.
    fn certificate(common_name: &str, names: Vec<String>) -> Vec<u8> {
        let mut params = CertificateParams::new(names).unwrap();
        params.distinguished_name.push(DnType::CommonName, common_name);
        params.self_signed(&KeyPair::generate().unwrap()).unwrap().der().to_vec()
    }

    proptest! {
        #[test]
        fn any_bytes_are_read(data in vec(any::<u8>(), 0..1200)) {
            super::fuzz_tls(&data);
        }

        #[test]
        fn a_certificate_with_some_bytes_changed_is_read(
            common_name in ".{0,20}",
            changes in vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
        ) {
            let mut data = vec![0];
            data.extend(certificate(&common_name, vec!["host.example".into(), "other".into()]));
            for (at, value) in changes {
                let at = 1 + at.index(data.len() - 1);
                data[at] = value;
            }
            super::fuzz_tls(&data);
        }
    }
}
