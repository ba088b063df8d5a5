//! The files of a host, and what they say about whom it trusts.

use std::fs::{File, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use rustls::client::{Resumption, WebPkiServerVerifier};
use rustls::crypto::CryptoProvider;
use rustls::crypto::ring::{cipher_suite, default_provider};
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer, ServerName};
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::version::TLS13;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use thiserror::Error;
use tracing::warn;

use super::identity::Identity;
use super::renew::{FromFiles, Stamp};

/// What the two ends agree to speak inside TLS. A certificate may serve QEMU and others as well: nobody can make one end talk to such a program instead.
pub(super) const PROTOCOL: &[u8] = b"pagewarp/1";

/// Bits of a file's mode that let others than its owner read it.
const OTHERS_READ: u32 = 0o044;

/// The names of the files in a [`TlsDir`]: those that QEMU and libvirt use.
#[derive(Debug)]
pub struct FileNames;

impl FileNames {
    /// Certificates of the CAs that sign the certificates of peers.
    pub const CA_CERT: &str = "ca-cert.pem";
    /// What these CAs have revoked. It may be missing.
    pub const CA_CRL: &str = "ca-crl.pem";
    /// The destination's certificate.
    pub const SERVER_CERT: &str = "server-cert.pem";
    /// The destination's private key.
    pub const SERVER_KEY: &str = "server-key.pem";
    /// The source's certificate.
    pub const CLIENT_CERT: &str = "client-cert.pem";
    /// The source's private key.
    pub const CLIENT_KEY: &str = "client-key.pem";
}

/// What is wrong with the files, or with the name of the peer.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum TlsError {
    /// A file is missing, or this user may not read it.
    #[error(
        "cannot read {what} `{path}`: {source}; a directory for TLS holds {needed}, and `pagewarp certs` makes a set to try"
    )]
    File {
        /// What it holds.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
        /// The files that this host needs.
        needed: String,
    },
    /// A file holds something else.
    #[error("`{path}` is not {what} in PEM form: {why}")]
    Content {
        /// What it should hold.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What was seen.
        why: String,
    },
    /// Certificate and key are of different pairs.
    #[error(
        "the private key `{key}` does not belong to the certificate `{cert}`; copy both again from where they were made"
    )]
    Mismatch {
        /// The key's file.
        key: PathBuf,
        /// The certificate's file.
        cert: PathBuf,
    },
    /// No name that a certificate could be for.
    #[error(
        "`{0}` is neither a host name nor an IP address, so no certificate can be for it; name the destination with --tls-hostname"
    )]
    Name(String),
}

/// A directory with certificates and keys.
#[derive(Clone, Debug)]
pub struct TlsDir {
    dir: PathBuf,
}

/// How a source connects.
#[derive(Clone, Debug)]
pub(super) struct TlsClient {
    files: TlsDir,
    stamp: Stamp,
    pub(super) config: Arc<ClientConfig>,
    /// For messages.
    pub(super) ca: PathBuf,
    pub(super) cert: PathBuf,
}

/// How a destination accepts.
#[derive(Clone, Debug)]
pub struct TlsServer {
    files: TlsDir,
    stamp: Stamp,
    pub(super) config: Arc<ServerConfig>,
    /// Names that a source may have; none: any that the CA vouches for.
    pub(super) allowed: Vec<String>,
    /// For messages.
    pub(super) ca: PathBuf,
    pub(super) cert: PathBuf,
}

impl TlsDir {
    /// The files in `dir`. They are read when they are needed.
    pub fn new(dir: impl Into<PathBuf>) -> TlsDir {
        TlsDir { dir: dir.into() }
    }

    /// Reads what a source needs.
    pub(super) fn client(&self) -> Result<TlsClient, TlsError> {
        let files = Files { dir: &self.dir, cert: FileNames::CLIENT_CERT, key: FileNames::CLIENT_KEY };
        let stamp = files.stamp();
        let provider = provider();
        let verifier = WebPkiServerVerifier::builder_with_provider(files.roots()?, provider.clone())
            .with_crls(files.crls()?)
            .allow_unknown_revocation_status()
            .build()
            .map_err(|e| files.content("a CA certificate", FileNames::CA_CERT, e))?;
        let (cert, key) = files.pair()?;
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&TLS13])
            .map_err(|e| files.content("a certificate", files.cert, e))?
            .with_webpki_verifier(verifier)
            .with_client_auth_cert(cert, key)
            .map_err(|e| files.refused(e))?;
        config.resumption = Resumption::disabled();
        config.alpn_protocols = vec![PROTOCOL.to_vec()];
        Ok(TlsClient {
            files: self.clone(),
            stamp,
            config: Arc::new(config),
            ca: files.path(FileNames::CA_CERT),
            cert: files.path(files.cert),
        })
    }

    /// Reads what a destination needs. With names in `allowed`, only sources are accepted whose certificate has one of them.
    ///
    /// # Errors
    ///
    /// What is wrong with the files.
    pub fn server(&self, allowed: Vec<String>) -> Result<TlsServer, TlsError> {
        let files = Files { dir: &self.dir, cert: FileNames::SERVER_CERT, key: FileNames::SERVER_KEY };
        let stamp = files.stamp();
        let provider = provider();
        let verifier = WebPkiClientVerifier::builder_with_provider(files.roots()?, provider.clone())
            .with_crls(files.crls()?)
            .allow_unknown_revocation_status()
            // Whoever connects would be told them.
            .clear_root_hint_subjects()
            .build()
            .map_err(|e| files.content("a CA certificate", FileNames::CA_CERT, e))?;
        let (cert, key) = files.pair()?;
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&TLS13])
            .map_err(|e| files.content("a certificate", files.cert, e))?
            .with_client_cert_verifier(verifier)
            .with_single_cert(cert, key)
            .map_err(|e| files.refused(e))?;
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        config.alpn_protocols = vec![PROTOCOL.to_vec()];
        Ok(TlsServer {
            files: self.clone(),
            stamp,
            config: Arc::new(config),
            allowed,
            ca: files.path(FileNames::CA_CERT),
            cert: files.path(files.cert),
        })
    }
}

impl FromFiles for TlsClient {
    fn dir(&self) -> &Path {
        &self.files.dir
    }

    fn stamp(&mut self) -> &mut Stamp {
        &mut self.stamp
    }

    fn stamp_now(&self) -> Stamp {
        Files { dir: &self.files.dir, cert: FileNames::CLIENT_CERT, key: FileNames::CLIENT_KEY }.stamp()
    }

    fn read_again(&self) -> Result<TlsClient, TlsError> {
        self.files.client()
    }
}

impl FromFiles for TlsServer {
    fn dir(&self) -> &Path {
        &self.files.dir
    }

    fn stamp(&mut self) -> &mut Stamp {
        &mut self.stamp
    }

    fn stamp_now(&self) -> Stamp {
        Files { dir: &self.files.dir, cert: FileNames::SERVER_CERT, key: FileNames::SERVER_KEY }.stamp()
    }

    fn read_again(&self) -> Result<TlsServer, TlsError> {
        self.files.server(self.allowed.clone())
    }
}

/// The name that the certificate of a host has to have, whatever else it has.
pub(super) fn server_name(host: &str) -> Result<ServerName<'static>, TlsError> {
    ServerName::try_from(host.to_owned()).map_err(|_| TlsError::Name(host.to_owned()))
}

/// Ring's cryptography. AES with keys of 128 bits first: no weaker where it matters, and cheaper for every byte of the VM.
fn provider() -> Arc<CryptoProvider> {
    let suites = vec![
        cipher_suite::TLS13_AES_128_GCM_SHA256,
        cipher_suite::TLS13_AES_256_GCM_SHA384,
        cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
    ];
    Arc::new(CryptoProvider { cipher_suites: suites, ..default_provider() })
}

/// The files of one end.
struct Files<'a> {
    dir: &'a Path,
    cert: &'static str,
    key: &'static str,
}

impl Files<'_> {
    fn stamp(&self) -> Stamp {
        Stamp::of(self.dir, &[FileNames::CA_CERT, FileNames::CA_CRL, self.cert, self.key])
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    fn missing(&self, what: &'static str, name: &str, source: io::Error) -> TlsError {
        let needed = format!("{}, {} and {}", FileNames::CA_CERT, self.cert, self.key);
        TlsError::File { what, path: self.path(name), source, needed }
    }

    fn content(&self, what: &'static str, name: &str, why: impl ToString) -> TlsError {
        TlsError::Content { what, path: self.path(name), why: why.to_string() }
    }

    fn pem_error(&self, what: &'static str, name: &str, error: pem::Error) -> TlsError {
        match error {
            pem::Error::Io(source) => self.missing(what, name, source),
            pem::Error::NoItemsFound => self.content(what, name, "it holds none"),
            other => self.content(what, name, other),
        }
    }

    fn certificates(&self, what: &'static str, name: &str) -> Result<Vec<CertificateDer<'static>>, TlsError> {
        let failed = |error| self.pem_error(what, name, error);
        let found: Result<Vec<_>, _> =
            CertificateDer::pem_file_iter(self.path(name)).map_err(failed)?.collect();
        let found = found.map_err(failed)?;
        if found.is_empty() {
            return Err(self.content(what, name, "it holds none"));
        }
        Ok(found)
    }

    fn roots(&self) -> Result<Arc<RootCertStore>, TlsError> {
        const WHAT: &str = "the CA certificate";
        let mut roots = RootCertStore::empty();
        for cert in self.certificates(WHAT, FileNames::CA_CERT)? {
            roots.add(cert).map_err(|e| self.content(WHAT, FileNames::CA_CERT, e))?;
        }
        Ok(Arc::new(roots))
    }

    fn crls(&self) -> Result<Vec<CertificateRevocationListDer<'static>>, TlsError> {
        const WHAT: &str = "the list of revoked certificates";
        let failed = |error| self.pem_error(WHAT, FileNames::CA_CRL, error);
        match CertificateRevocationListDer::pem_file_iter(self.path(FileNames::CA_CRL)) {
            Ok(lists) => lists.collect::<Result<_, _>>().map_err(failed),
            Err(pem::Error::Io(e)) if e.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            Err(error) => Err(failed(error)),
        }
    }

    /// The certificate of this host, with those between it and the CA, and its key.
    fn pair(&self) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>), TlsError> {
        const KEY: &str = "the private key";
        let certificates = self.certificates("the certificate", self.cert)?;
        self.warn_of_dates(&certificates[0]);
        let path = self.path(self.key);
        // Before it is read, so that the message about a missing file is the same for all.
        let mode =
            File::open(&path).and_then(|file| file.metadata()).map(|m| Permissions::mode(&m.permissions()));
        let mode = mode.map_err(|e| self.missing(KEY, self.key, e))?;
        if mode & OTHERS_READ != 0 {
            warn!(
                "others than its owner can read the private key `{}` (mode {:03o}); `chmod 600` it",
                path.display(),
                mode & 0o777
            );
        }
        let key = PrivateKeyDer::from_pem_file(&path).map_err(|e| match e {
            pem::Error::NoItemsFound => self.content(
                KEY,
                self.key,
                "it holds none that is not encrypted; keys with a password cannot be used",
            ),
            other => self.pem_error(KEY, self.key, other),
        })?;
        Ok((certificates, key))
    }

    /// The peer will refuse a certificate that is not valid now. It is told here as well, where it can be changed; but the clock of this host may be what is wrong.
    fn warn_of_dates(&self, cert: &CertificateDer<'_>) {
        if let Some(why) = Identity::invalid_at(cert, SystemTime::now()) {
            warn!("the certificate `{}` {why}: peers will refuse it", self.path(self.cert).display());
        }
    }

    fn refused(&self, error: rustls::Error) -> TlsError {
        match error {
            rustls::Error::InconsistentKeys(_) => {
                TlsError::Mismatch { key: self.path(self.key), cert: self.path(self.cert) }
            }
            rustls::Error::InvalidCertificate(why) => {
                self.content("a certificate", self.cert, format!("{why:?}"))
            }
            other => self.content("a private key of a kind that is known here", self.key, other),
        }
    }
}
