//! Certificates of all kinds, and connections made with them.
#![allow(dead_code, reason = "each test program uses some of it")]

use std::fs;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, SystemTime};

use pagewarp_engine::transport::{Acceptor, Connector, Stream, TcpAcceptor, TcpConnector, Untrusted};
use pagewarp_net::tls::{FileNames, TlsAcceptor, TlsConnector, TlsDir};
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
};
use tempfile::TempDir;

pub(crate) const PATIENCE: Duration = Duration::from_secs(60);
/// How long nobody is expected.
pub(crate) const MOMENT: Duration = Duration::from_millis(500);
const DAY: Duration = Duration::from_secs(24 * 3600);

/// When a certificate is valid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum When {
    Now,
    Past,
    Future,
}

pub(crate) struct Ca(CertifiedIssuer<'static, KeyPair>);

impl Ca {
    pub(crate) fn new() -> Ca {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, "a test");
        Ca(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    pub(crate) fn pem(&self) -> String {
        self.0.pem()
    }

    /// A certificate and its key.
    pub(crate) fn sign(
        &self,
        names: &[&str],
        usage: ExtendedKeyUsagePurpose,
        when: When,
    ) -> (String, String) {
        let names: Vec<_> = names.iter().map(|name| (*name).to_owned()).collect();
        let mut params = CertificateParams::new(names.clone()).unwrap();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, format!("common {}", names.join(" ")));
        params.extended_key_usages = vec![usage];
        let now = SystemTime::now();
        let (from, to) = match when {
            When::Now => (now - DAY, now + DAY),
            When::Past => (now - 2 * DAY, now - DAY),
            When::Future => (now + DAY, now + 2 * DAY),
        };
        (params.not_before, params.not_after) = (from.into(), to.into());
        let key = KeyPair::generate().unwrap();
        (params.signed_by(&key, &self.0).unwrap().pem(), key.serialize_pem())
    }
}

/// A directory for TLS, with parts that can be replaced.
pub(crate) struct Set {
    pub(crate) dir: TempDir,
}

pub(crate) const SERVER: ExtendedKeyUsagePurpose = ExtendedKeyUsagePurpose::ServerAuth;
pub(crate) const CLIENT: ExtendedKeyUsagePurpose = ExtendedKeyUsagePurpose::ClientAuth;

impl Set {
    /// A good one, for 127.0.0.1 and localhost.
    pub(crate) fn new(ca: &Ca) -> Set {
        let set = Set { dir: TempDir::new().unwrap() };
        set.write(FileNames::CA_CERT, &ca.pem());
        set.server(ca.sign(&["127.0.0.1", "localhost"], SERVER, When::Now));
        set.client(ca.sign(&["source.example"], CLIENT, When::Now));
        set
    }

    pub(crate) fn write(&self, name: &str, text: &str) {
        use std::os::unix::fs::PermissionsExt;
        fs::write(self.path(name), text).unwrap();
        fs::set_permissions(self.path(name), fs::Permissions::from_mode(0o600)).unwrap();
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn server(&self, (cert, key): (String, String)) {
        self.write(FileNames::SERVER_CERT, &cert);
        self.write(FileNames::SERVER_KEY, &key);
    }

    pub(crate) fn client(&self, (cert, key): (String, String)) {
        self.write(FileNames::CLIENT_CERT, &cert);
        self.write(FileNames::CLIENT_KEY, &key);
    }

    pub(crate) fn tls(&self) -> TlsDir {
        TlsDir::new(self.dir.path())
    }

    pub(crate) fn acceptor(&self, allowed: &[&str]) -> TlsAcceptor {
        let tcp = TcpAcceptor::bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let allowed = allowed.iter().map(|name| (*name).to_owned()).collect();
        TlsAcceptor::new(tcp, self.tls().server(allowed).unwrap()).unwrap()
    }

    pub(crate) fn connector(&self, address: SocketAddr, host: &str) -> TlsConnector {
        let tcp = TcpConnector { address, timeout: PATIENCE };
        TlsConnector::new(tcp, &self.tls(), host).unwrap()
    }
}

/// Both ends of a connection.
pub(crate) fn connect(
    acceptor: &TlsAcceptor,
    connector: &TlsConnector,
) -> (Box<dyn Stream>, Box<dyn Stream>) {
    thread::scope(|scope| {
        let near = scope.spawn(|| connector.connect().unwrap());
        let far = acceptor.accept(PATIENCE).unwrap();
        (near.join().unwrap(), far)
    })
}

/// A good pair.
pub(crate) fn pair() -> (Box<dyn Stream>, Box<dyn Stream>) {
    let set = Set::new(&Ca::new());
    let acceptor = set.acceptor(&[]);
    connect(&acceptor, &set.connector(acceptor.local_addr().unwrap(), "localhost"))
}

/// Why the source does not get through. The destination must accept nobody.
pub(crate) fn refused(acceptor: &TlsAcceptor, connector: &TlsConnector) -> String {
    thread::scope(|scope| {
        let near = scope.spawn(|| connector.connect().err().expect("a refusal"));
        let accepted = acceptor.accept(MOMENT).err().expect("nobody is accepted");
        assert_eq!(accepted.kind(), io::ErrorKind::TimedOut);
        while !near.is_finished() {
            assert!(acceptor.accept(MOMENT).is_err());
        }
        let error = near.join().unwrap();
        assert!(error.get_ref().is_some_and(|inner| inner.is::<Untrusted>()), "{error:?}");
        error.to_string()
    })
}
