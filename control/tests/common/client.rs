//! A control client, as plain as can be.

use super::{Authority, Server};
use holdfast_shared::auth::{EXPORTER_LABEL, Secret, SessionKey};
use holdfast_shared::types::{
    Access, CreateId, Disposition, HoldClass, LockItem, LockKind, LockRange, OpenId, ProcessId, SessionId,
    ShareMode, Status,
};
use holdfast_shared::wire::control::{
    Hello, Lock, Open, Opened, Place, Reply, ReplyMessage, Request, RequestMessage, Resume, Resumed,
};
use holdfast_shared::wire::{from_cbor, to_cbor};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use std::sync::Arc;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

pub struct Client {
    pub stream: TlsStream<TcpStream>,
    pub key: SessionKey,
    pub session: SessionId,
    last: u64,
}

pub fn tls(trust: &Authority, identity: Option<&(String, String)>) -> TlsConnector {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(trust.pem.as_bytes()).unwrap()).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots);
    let config = match identity {
        None => config.with_no_client_auth(),
        Some((certificate, key)) => config
            .with_client_auth_cert(
                vec![CertificateDer::from_pem_slice(certificate.as_bytes()).unwrap()],
                PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap(),
            )
            .unwrap(),
    };
    TlsConnector::from(Arc::new(config))
}

impl Client {
    /// TLS without a hello.
    pub async fn handshake(
        server: &Server,
        identity: Option<&(String, String)>,
    ) -> std::io::Result<TlsStream<TcpStream>> {
        let tcp = TcpStream::connect(server.address).await?;
        tcp.set_nodelay(true)?;
        tls(&server.ca, identity).connect(ServerName::try_from("localhost").unwrap(), tcp).await
    }

    /// A session of a principal.
    pub async fn connect(server: &Server, principal: &str) -> Self {
        let stream = Self::handshake(server, Some(&server.ca.client(principal))).await.unwrap();
        let exported = stream.get_ref().1.export_keying_material([0; 32], EXPORTER_LABEL, None).unwrap();
        let key = SessionKey::new(Secret::new(exported));
        let mut client = Self { stream, key, session: SessionId::NONE, last: 0 };
        match client.ask(hello()).await {
            Reply::Welcome(welcome) => {
                assert_eq!(welcome.principal, principal);
                client.session = welcome.session;
            }
            other => panic!("no welcome: {other:?}"),
        }
        client
    }

    pub async fn resumed(&mut self, opened: &Opened) -> Resumed {
        match self.ask(resume(opened)).await {
            Reply::Resumed(resumed) => resumed,
            other => panic!("not resumed: {other:?}"),
        }
    }

    pub async fn send(&mut self, request: Request) -> u64 {
        self.last += 1;
        send_frame(&mut self.stream, &to_cbor(&RequestMessage { id: self.last, request })).await;
        self.last
    }

    pub async fn receive(&mut self) -> Option<ReplyMessage> {
        receive(&mut self.stream).await
    }

    pub async fn ask(&mut self, request: Request) -> Reply {
        let id = self.send(request).await;
        let reply = self.receive().await.expect("an answer");
        assert_eq!(reply.id, id);
        reply.reply
    }

    pub async fn refused(&mut self, request: Request) -> Status {
        match self.ask(request).await {
            Reply::Refused(refusal) => refusal.status,
            other => panic!("not refused: {other:?}"),
        }
    }

    pub async fn open(&mut self, request: Open) -> Opened {
        match self.ask(Request::Open(request)).await {
            Reply::Opened(opened) => opened,
            other => panic!("not opened: {other:?}"),
        }
    }

    pub async fn close(&mut self, open: OpenId) {
        assert_eq!(self.ask(Request::Close(open)).await, Reply::Done);
    }
}

pub fn hello() -> Request {
    let (version_min, version_max, process) = (1, 1, ProcessId(7));
    Request::Hello(Hello { version_min, version_max, client: "test".into(), process })
}

pub async fn send_frame(stream: &mut TlsStream<TcpStream>, body: &[u8]) {
    let length = u32::try_from(body.len()).unwrap();
    // A server that has hung up already is found out by the read that follows.
    let _ = stream.write_all(&length.to_le_bytes()).await;
    let _ = stream.write_all(body).await;
    let _ = stream.flush().await;
}

/// The next answer; `None` at the end.
pub async fn receive(stream: &mut TlsStream<TcpStream>) -> Option<ReplyMessage> {
    let read = async {
        let mut length = [0; 4];
        stream.read_exact(&mut length).await.ok()?;
        let mut body = vec![0; u32::from_le_bytes(length) as usize];
        stream.read_exact(&mut body).await.ok()?;
        Some(from_cbor(&body, body.len()).unwrap())
    };
    tokio::time::timeout(std::time::Duration::from_secs(20), read).await.expect("an answer in time")
}

pub fn at(path: &str) -> Place {
    Place { volume: "data".into(), path: path.into() }
}

/// An open request with a new create id: opens or creates for reading and writing, shares everything.
pub fn open(path: &str) -> Open {
    static LAST: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(1);
    let mut id = [0; 16];
    id[..8].copy_from_slice(&LAST.fetch_add(1, std::sync::atomic::Ordering::Relaxed).to_le_bytes());
    Open {
        create_id: CreateId(id),
        place: at(path),
        access: Access::READ | Access::WRITE,
        share: ShareMode::ALL,
        disposition: Disposition::OpenOrCreate,
        mode: 0o640,
        // Closed with its session, so that tests of something else leave nothing behind.
        hold_ms: Some(0),
        class: HoldClass::Hold,
        wait_ms: None,
        delete_on_close: false,
        process: None,
    }
}

/// The same, held for a minute when its session is lost.
pub fn held(path: &str) -> Open {
    Open { hold_ms: Some(60_000), ..open(path) }
}

/// A resume of what an earlier session opened.
pub fn resume(opened: &Opened) -> Request {
    let resume_key = opened.key.resume_key.clone();
    Request::Resume(Resume { resume_key, supersede: None, keep: Vec::new() })
}

/// An exclusive lock.
pub fn lock(open: OpenId, sequence: u64, offset: u64, length: u64) -> Request {
    let item = LockItem { range: LockRange::new(offset, length).unwrap(), kind: LockKind::Exclusive };
    Request::Lock(Lock { open, sequence, owner: 1, locks: vec![item], wait_ms: None })
}

impl Client {
    /// A session of whomever the connector is for, if the server takes connections.
    pub async fn try_connect(
        address: std::net::SocketAddr,
        connector: &TlsConnector,
    ) -> std::io::Result<Self> {
        let tcp = TcpStream::connect(address).await?;
        tcp.set_nodelay(true)?;
        let stream = connector.connect(ServerName::try_from("localhost").unwrap(), tcp).await?;
        let exported = stream.get_ref().1.export_keying_material([0; 32], EXPORTER_LABEL, None).unwrap();
        let key = SessionKey::new(Secret::new(exported));
        let mut client = Self { stream, key, session: SessionId::NONE, last: 0 };
        match client.ask(hello()).await {
            Reply::Welcome(welcome) => client.session = welcome.session,
            other => panic!("no welcome: {other:?}"),
        }
        Ok(client)
    }
}
