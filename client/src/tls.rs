//! TLS 1.3 with both certificates, and the session key that comes of it.

use crate::config::Config;
use crate::error::{Ended, Error, Result};
use holdfast_shared::auth::{EXPORTER_LABEL, Secret, SessionKey};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use std::path::Path;
use std::sync::Arc;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

/// Shakes hands on a connected socket.
pub(crate) async fn handshake(
    config: &Config,
    socket: TcpStream,
) -> Result<(TlsStream<TcpStream>, SessionKey)> {
    let name = ServerName::try_from(config.server_name.clone())
        .map_err(|_| Error::Usage(format!("'{}' is not a server name", config.server_name)))?;
    let connector = TlsConnector::from(client_config(config)?);
    let stream = connector.connect(name, socket).await.map_err(refine)?;
    let (_, connection) = stream.get_ref();
    let exported = connection
        .export_keying_material([0; 32], EXPORTER_LABEL, None)
        .map_err(|error| Error::Incompatible(format!("TLS gives no session key: {error}")))?;
    Ok((stream, SessionKey::new(Secret::new(exported))))
}

/// Says what a failed handshake means for the operator.
pub(crate) fn refine(error: std::io::Error) -> Error {
    let context = match error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
        Some(rustls::Error::InvalidCertificate(_)) => {
            "the server's certificate is not trusted (check [tls] ca and server_name in client.toml)"
        }
        Some(rustls::Error::AlertReceived(_)) => {
            "the server did not accept this client's certificate (check [tls] certificate and key in client.toml, \
             and client_ca in the server's control.toml)"
        }
        _ if error.kind() == std::io::ErrorKind::UnexpectedEof => return Error::session(Ended::Disconnected),
        _ => "TLS handshake",
    };
    Error::io(context, error)
}

fn client_config(config: &Config) -> Result<Arc<ClientConfig>> {
    let bad = |path: &Path, reason: String| Error::Config { path: path.into(), reason };
    let mut roots = RootCertStore::empty();
    for certificate in certificates(&config.tls.ca)? {
        roots.add(certificate).map_err(|error| bad(&config.tls.ca, error.to_string()))?;
    }
    let chain = certificates(&config.tls.certificate)?;
    let key = PrivateKeyDer::from_pem_file(&config.tls.key)
        .map_err(|error| bad(&config.tls.key, format!("no private key can be read from it: {error}")))?;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let client = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|_| Error::Internal("TLS 1.3 is not in the provider"))?
        .with_root_certificates(roots)
        .with_client_auth_cert(chain, key)
        .map_err(|error| bad(&config.tls.certificate, format!("it does not fit the key: {error}")))?;
    Ok(Arc::new(client))
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>> {
    let bad = |reason: String| Error::Config { path: path.into(), reason };
    let all: Vec<_> = CertificateDer::pem_file_iter(path)
        .and_then(Iterator::collect)
        .map_err(|error| bad(format!("no certificate can be read from it: {error}")))?;
    if all.is_empty() { Err(bad("there is no certificate in it".into())) } else { Ok(all) }
}
