//! TLS: version 1.3 only, client certificates required. The peer's principal and the session key come from here.

use crate::config;
use holdfast_shared::auth::{EXPORTER_LABEL, Secret, SessionKey};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig, ServerConnection};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

/// Longest name of a principal, bytes.
const PRINCIPAL_BYTES_MAX: usize = 255;

/// Why TLS cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A PEM file cannot be read.
    #[error("{path}: {source}")]
    Pem {
        /// Which.
        path: PathBuf,
        /// Why.
        source: rustls::pki_types::pem::Error,
    },
    /// It holds no certificate.
    #[error("{0}: no certificate in it")]
    Empty(PathBuf),
    /// The authorities cannot be used.
    #[error("client_ca: {0}")]
    ClientCa(String),
    /// Certificate and key do not fit.
    #[error("certificate and key: {0}")]
    Rustls(#[from] rustls::Error),
}

/// Why an authenticated peer is nobody.
#[derive(Debug, thiserror::Error)]
pub enum PeerError {
    /// It sent no certificate.
    #[error("no client certificate")]
    NoCertificate,
    /// The certificate cannot be read.
    #[error("the client certificate cannot be parsed")]
    Certificate,
    /// The certificate has no usable name.
    #[error(
        "the client certificate names nobody: neither a DNS name, URI or e-mail address in its SAN, nor a CN"
    )]
    Nameless,
    /// The session key cannot be derived.
    #[error("no keying material: {0}")]
    Exporter(#[from] rustls::Error),
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let pem = |source| TlsError::Pem { path: path.to_owned(), source };
    let found: Result<Vec<_>, _> = CertificateDer::pem_file_iter(path).map_err(pem)?.collect();
    let found = found.map_err(pem)?;
    if found.is_empty() { Err(TlsError::Empty(path.to_owned())) } else { Ok(found) }
}

/// The server's side of TLS.
///
/// # Errors
/// See [`TlsError`].
pub fn server_config(tls: &config::Tls) -> Result<Arc<ServerConfig>, TlsError> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut roots = RootCertStore::empty();
    for certificate in certificates(&tls.client_ca)? {
        roots.add(certificate)?;
    }
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone())
        .build()
        .map_err(|error| TlsError::ClientCa(error.to_string()))?;
    let key = PrivateKeyDer::from_pem_file(&tls.key)
        .map_err(|source| TlsError::Pem { path: tls.key.clone(), source })?;
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(verifier)
        .with_single_cert(certificates(&tls.certificate)?, key)?;
    // Each session proves its certificate anew: nothing to resume, nothing to keep.
    config.send_tls13_tickets = 0;
    config.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
    Ok(Arc::new(config))
}

/// Who the peer is, from its verified certificate.
///
/// # Errors
/// See [`PeerError`].
pub fn principal(connection: &ServerConnection) -> Result<String, PeerError> {
    let chain = connection.peer_certificates().ok_or(PeerError::NoCertificate)?;
    principal_of(chain.first().ok_or(PeerError::NoCertificate)?)
}

fn principal_of(der: &[u8]) -> Result<String, PeerError> {
    let (_, certificate) = X509Certificate::from_der(der).map_err(|_| PeerError::Certificate)?;
    let san = certificate.subject_alternative_name().map_err(|_| PeerError::Certificate)?;
    let from_san = san.and_then(|san| {
        san.value.general_names.iter().find_map(|name| match name {
            GeneralName::DNSName(name) | GeneralName::URI(name) | GeneralName::RFC822Name(name) => {
                Some((*name).to_owned())
            }
            _ => None,
        })
    });
    let from_cn = || {
        let cn = certificate.subject().iter_common_name().next()?;
        cn.as_str().ok().map(str::to_owned)
    };
    from_san
        .or_else(from_cn)
        .filter(|name| !name.is_empty() && name.len() <= PRINCIPAL_BYTES_MAX)
        .filter(|name| !name.contains(char::is_control))
        .ok_or(PeerError::Nameless)
}

/// K1, the session key.
///
/// # Errors
/// [`PeerError::Exporter`] if the handshake is not finished.
pub fn session_key(connection: &ServerConnection) -> Result<SessionKey, PeerError> {
    let mut exported = connection.export_keying_material([0; 32], EXPORTER_LABEL, None)?;
    let key = SessionKey::new(Secret::new(exported));
    zeroize::Zeroize::zeroize(&mut exported);
    Ok(key)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn certificate(sans: &[&str], cn: Option<&str>) -> Vec<u8> {
        let mut params =
            rcgen::CertificateParams::new(sans.iter().map(|s| (*s).to_owned()).collect::<Vec<_>>()).unwrap();
        params.distinguished_name = rcgen::DistinguishedName::new();
        if let Some(cn) = cn {
            params.distinguished_name.push(rcgen::DnType::CommonName, cn);
        }
        let key = rcgen::KeyPair::generate().unwrap();
        params.self_signed(&key).unwrap().der().to_vec()
    }

    #[test]
    fn the_san_comes_before_the_cn() {
        assert_eq!(principal_of(&certificate(&["host.example"], Some("cn"))).unwrap(), "host.example");
        assert_eq!(principal_of(&certificate(&[], Some("cn"))).unwrap(), "cn");
        assert_eq!(principal_of(&certificate(&["127.0.0.1"], Some("cn"))).unwrap(), "cn");
    }

    #[test]
    fn no_name_is_nobody() {
        assert!(matches!(principal_of(&certificate(&[], None)), Err(PeerError::Nameless)));
        assert!(matches!(principal_of(&certificate(&[], Some("a\nb"))), Err(PeerError::Nameless)));
        assert!(matches!(principal_of(b"not a certificate"), Err(PeerError::Certificate)));
    }
}
