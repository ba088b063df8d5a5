//! A set of certificates to try TLS with, or for a lab: a CA that signs both certificates and is then forgotten.

use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose,
};
use thiserror::Error;

use super::config::FileNames;

/// The certificates are valid from so long ago: clocks differ.
const SLACK: Duration = Duration::from_secs(24 * 3600);
const DAY: Duration = Duration::from_secs(24 * 3600);

/// What to make.
#[derive(Clone, Debug)]
pub struct LabSet {
    /// The names and IP addresses by which destinations are reached.
    pub hosts: Vec<String>,
    /// The name in the certificate of sources.
    pub client: String,
    /// How many days from now it is valid.
    pub days: u32,
}

/// Why there is no set.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum LabError {
    /// There is one already.
    #[error("`{0}` is there already; name another directory, or pass --force to replace the whole set")]
    Exists(PathBuf),
    /// A file could not be written.
    #[error("cannot write `{path}`: {source}")]
    File {
        /// The file or directory.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// A name that cannot be in a certificate.
    #[error("no certificate can be made for these names: {0}")]
    Names(#[from] rcgen::Error),
}

/// Makes a set in `dir`, which is made if it is not there. Returns the files. The CA's key is not among them: nobody can sign more with it.
///
/// # Errors
///
/// There is a set already (unless `force`), or a file cannot be written.
pub fn make(dir: &Path, set: &LabSet, force: bool) -> Result<Vec<PathBuf>, LabError> {
    let ca = CertifiedIssuer::self_signed(ca_params(set), KeyPair::generate()?)?;
    let (server_cert, server_key) = signed(&set.hosts, ExtendedKeyUsagePurpose::ServerAuth, set, &ca)?;
    let client = std::slice::from_ref(&set.client);
    let (client_cert, client_key) = signed(client, ExtendedKeyUsagePurpose::ClientAuth, set, &ca)?;
    let files = [
        (FileNames::CA_CERT, ca.pem(), 0o644),
        (FileNames::SERVER_CERT, server_cert, 0o644),
        (FileNames::SERVER_KEY, server_key, 0o600),
        (FileNames::CLIENT_CERT, client_cert, 0o644),
        (FileNames::CLIENT_KEY, client_key, 0o600),
    ];
    let failed = |path: &Path, source| LabError::File { path: path.to_owned(), source };
    DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(|e| failed(dir, e))?;
    let paths: Vec<_> = files.iter().map(|(name, ..)| dir.join(name)).collect();
    // All or none: a set of parts of two is of no use.
    if let Some(there) = paths.iter().find(|path| !force && path.symlink_metadata().is_ok()) {
        return Err(LabError::Exists(there.clone()));
    }
    for (path, (_, text, mode)) in paths.iter().zip(&files) {
        match fs::remove_file(path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(failed(path, e)),
            _ => {}
        }
        let file = OpenOptions::new().write(true).create_new(true).mode(*mode).open(path);
        file.and_then(|mut file| file.write_all(text.as_bytes())).map_err(|e| failed(path, e))?;
    }
    Ok(paths)
}

fn params(names: &[String], common_name: &str, set: &LabSet) -> Result<CertificateParams, rcgen::Error> {
    let mut params = CertificateParams::new(names)?;
    let now = SystemTime::now();
    params.not_before = (now - SLACK).into();
    params.not_after = (now + DAY * set.days).into();
    params.distinguished_name.push(DnType::CommonName, common_name);
    params.use_authority_key_identifier_extension = true;
    Ok(params)
}

fn ca_params(set: &LabSet) -> CertificateParams {
    // Without names there is nothing that could be wrong with them.
    let mut params = params(&[], "pagewarp lab CA", set).unwrap_or_default();
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params
}

/// A certificate for these names and this use, and its key.
fn signed(
    names: &[String],
    usage: ExtendedKeyUsagePurpose,
    set: &LabSet,
    ca: &CertifiedIssuer<'_, KeyPair>,
) -> Result<(String, String), rcgen::Error> {
    // As an address is typed where there is a port.
    let names: Vec<_> = names.iter().map(|name| name.trim_matches(['[', ']']).to_owned()).collect();
    let common_name = names.first().map_or("", String::as_str);
    let mut params = params(&names, common_name, set)?;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![usage];
    let key = KeyPair::generate()?;
    let cert = params.signed_by(&key, ca)?;
    Ok((cert.pem(), key.serialize_pem()))
}
