//! A scripted control server for tests: real TLS on loopback, and answers as the test gives them.

use crate::Config;
use crate::config::{Recovery, Tls, Transport};
use holdfast_shared::auth::{EXPORTER_LABEL, MacPolicy, Secret, SessionKey};
use holdfast_shared::types::{
    Access, CONTROL_MESSAGE_BYTES_MAX, FileTime, HandleId, HoldClass, OpenId, SessionId, ShareMode, Status,
    Verdict, VolumeId,
};
use holdfast_shared::wire::control::{
    Attributes, FileKind, KeyGrant, Opened, Place, Refusal, Reply, ReplyMessage, Request, RequestMessage,
    Resume, Resumed, VERSION, Welcome,
};
use holdfast_shared::wire::service::{Endpoint, ServiceBlob, TransportKind};
use holdfast_shared::wire::{data, from_cbor, to_cbor};
use rcgen::{CertificateParams, Issuer, KeyPair};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

pub(crate) type Stream = TlsStream<TcpStream>;

/// A CA of its own, one certificate for both sides.
pub(crate) struct Pki {
    dir: tempfile::TempDir,
}

impl Pki {
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let ca_key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(Vec::<String>::new()).unwrap();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let ca = params.self_signed(&ca_key).unwrap();
        let issuer = Issuer::new(params, ca_key);
        let key = KeyPair::generate().unwrap();
        let leaf =
            CertificateParams::new(vec!["localhost".to_owned()]).unwrap().signed_by(&key, &issuer).unwrap();
        std::fs::write(dir.path().join("ca"), ca.pem()).unwrap();
        std::fs::write(dir.path().join("cert"), leaf.pem()).unwrap();
        std::fs::write(dir.path().join("key"), key.serialize_pem()).unwrap();
        Self { dir }
    }

    pub(crate) fn path(&self, name: &str) -> std::path::PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn acceptor(&self) -> TlsAcceptor {
        let certificate = |path: &Path| CertificateDer::from_pem_file(path).unwrap();
        let mut roots = RootCertStore::empty();
        roots.add(certificate(&self.path("ca"))).unwrap();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
            .build()
            .unwrap();
        let config = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_client_cert_verifier(verifier)
            .with_single_cert(
                vec![certificate(&self.path("cert"))],
                PrivateKeyDer::from_pem_file(self.path("key")).unwrap(),
            )
            .unwrap();
        TlsAcceptor::from(Arc::new(config))
    }

    pub(crate) fn config(&self, server: SocketAddr) -> Config {
        Config {
            one_sided: crate::OneSided::Auto,
            server: server.to_string(),
            server_name: "localhost".into(),
            transport: Transport::Auto,
            connect_ms_max: 10_000,
            request_ms_max: 10_000,
            recovery: Recovery::Hard,
            soft_ms: 1,
            in_flight_max: 16,
            tls: Tls { ca: self.path("ca"), certificate: self.path("cert"), key: self.path("key") },
        }
    }
}

pub(crate) async fn take(stream: &mut Stream) -> Option<RequestMessage> {
    let length = stream.read_u32_le().await.ok()?;
    let mut body = vec![0; length as usize];
    stream.read_exact(&mut body).await.ok()?;
    Some(from_cbor(&body, CONTROL_MESSAGE_BYTES_MAX).unwrap())
}

pub(crate) async fn give(stream: &mut Stream, id: u64, reply: Reply) {
    let body = to_cbor(&ReplyMessage { id, reply });
    stream.write_u32_le(u32::try_from(body.len()).unwrap()).await.unwrap();
    stream.write_all(&body).await.unwrap();
    stream.flush().await.unwrap();
}

pub(crate) fn welcome(version: u8, session: u8) -> Reply {
    Reply::Welcome(Welcome {
        version,
        session: SessionId([session; 16]),
        principal: "me".into(),
        opens_max: 5,
    })
}

pub(crate) fn opened(open: OpenId) -> Reply {
    Reply::Opened(opened_as(open, 1))
}

/// What an open is told of a first or later life.
pub(crate) fn opened_as(open: OpenId, epoch: u64) -> Opened {
    let time = FileTime { seconds: 0, nanos: 0 };
    Opened {
        open,
        handle: HandleId([2; 16]),
        access: Access::READ | Access::WRITE,
        created: false,
        hold_ms: 60_000,
        attributes: Attributes {
            kind: FileKind::File,
            size: 0,
            allocated: 0,
            mode: 0o644,
            inode: 1,
            links: 1,
            accessed: time,
            modified: time,
            changed: time,
            uid: 0,
            gid: 0,
        },
        key: KeyGrant {
            resume_key: vec![u8::try_from(epoch).unwrap()],
            service_blob: Vec::new(),
            challenge: [4; 32],
            volume: VolumeId([6; 16]),
            policy: MacPolicy::Header,
        },
        class: HoldClass::Hold,
        epoch,
    }
}

/// A place on the scripted server.
pub(crate) fn file() -> Place {
    Place { volume: "v".into(), path: "file".into() }
}

/// Longest wait for what must happen.
pub(crate) const SOON: Duration = Duration::from_secs(10);

/// A control server whose sessions a test plays itself.
pub(crate) struct Control {
    pki: Pki,
    listener: Option<TcpListener>,
    address: SocketAddr,
    sessions: u8,
}

/// One session of it.
pub(crate) struct Peer {
    stream: Stream,
    pub(crate) session: SessionId,
    pub(crate) key: SessionKey,
}

impl Control {
    pub(crate) async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        Self { pki: Pki::new(), listener: Some(listener), address, sessions: 0 }
    }

    pub(crate) fn config(&self) -> Config {
        self.pki.config(self.address)
    }

    /// The next session, when it has said hello.
    pub(crate) async fn accept(&mut self) -> Peer {
        let listener = self.listener.as_ref().unwrap();
        let (socket, _) = tokio::time::timeout(SOON, listener.accept()).await.expect("nobody came").unwrap();
        let mut stream = self.pki.acceptor().accept(socket).await.unwrap();
        let hello = take(&mut stream).await.unwrap();
        assert!(matches!(hello.request, Request::Hello(_)));
        self.sessions += 1;
        give(&mut stream, 0, welcome(VERSION, self.sessions)).await;
        let key = stream.get_ref().1.export_keying_material([0; 32], EXPORTER_LABEL, None).unwrap();
        let session = SessionId([self.sessions; 16]);
        Peer { stream, session, key: SessionKey::new(Secret::new(key)) }
    }

    /// Nobody listens any more.
    pub(crate) fn away(&mut self) {
        self.listener = None;
    }

    pub(crate) async fn back(&mut self) {
        self.listener = Some(TcpListener::bind(self.address).await.unwrap());
    }
}

impl Peer {
    /// The next request, or `None` at the end.
    pub(crate) async fn next(&mut self) -> Option<RequestMessage> {
        tokio::time::timeout(SOON, take(&mut self.stream)).await.expect("nothing was asked")
    }

    pub(crate) async fn give(&mut self, id: u64, reply: Reply) {
        give(&mut self.stream, id, reply).await;
    }

    pub(crate) async fn refuse(&mut self, id: u64, status: Status) {
        self.give(id, Reply::Refused(Refusal { status, detail: String::new(), retry_ms: None })).await;
    }

    /// Ends the connection.
    pub(crate) async fn hang_up(&mut self) {
        let _ = self.stream.shutdown().await;
        let (socket, _) = self.stream.get_mut();
        let _ = socket.shutdown().await;
    }

    /// Answers an open.
    pub(crate) async fn open(&mut self, open: OpenId) -> holdfast_shared::wire::control::Open {
        let asked = self.next().await.unwrap();
        let Request::Open(request) = asked.request else { panic!("{:?}", asked.request) };
        self.give(asked.id, opened(open)).await;
        request
    }

    /// Takes a resume request.
    pub(crate) async fn resume(&mut self) -> (u64, Resume) {
        let asked = self.next().await.unwrap();
        let Request::Resume(resume) = asked.request else { panic!("{:?}", asked.request) };
        (asked.id, resume)
    }

    /// Grants a resume of the open, and hears that the answer has come.
    pub(crate) async fn resumed(&mut self, id: u64, open: OpenId, verdict: Verdict, kept: &[HandleId]) {
        self.resumed_unheard(id, open, verdict, kept).await;
        let asked = self.next().await.unwrap();
        assert!(matches!(asked.request, Request::QueryKey(heard) if heard == open), "{:?}", asked.request);
        let epoch = u64::from(self.session.0[0]);
        self.give(asked.id, Reply::Key(opened_as(open, epoch).key)).await;
    }

    /// Grants a resume of the open.
    pub(crate) async fn resumed_unheard(
        &mut self,
        id: u64,
        open: OpenId,
        verdict: Verdict,
        kept: &[HandleId],
    ) {
        let epoch = u64::from(self.session.0[0]);
        let resumed = Resumed {
            opened: opened_as(open, epoch),
            verdict,
            locks_kept: true,
            kept: kept.to_vec(),
            lock_sequence: 0,
            share: ShareMode::ALL,
        };
        self.give(id, Reply::Resumed(resumed)).await;
    }

    /// Answers questions for the key with a data plane at this port until something else is asked.
    pub(crate) async fn keys(&mut self, port: Option<(u16, u8)>) -> Option<RequestMessage> {
        loop {
            let asked = take(&mut self.stream).await?;
            match asked.request {
                Request::QueryKey(_) => {
                    let mut grant = opened_as(OpenId([8; 16]), u64::from(self.session.0[0])).key;
                    grant.service_blob = port.map_or(Vec::new(), |(port, instance)| blob(port, instance));
                    self.give(asked.id, Reply::Key(grant)).await;
                }
                _ => return Some(asked),
            }
        }
    }
}

/// Says where a data plane is.
pub(crate) fn blob(port: u16, instance: u8) -> Vec<u8> {
    let tcp = Endpoint { transport: TransportKind::Tcp, address: None, port, boot_id: None };
    let blob = ServiceBlob {
        instance: [instance; 16],
        boot_ms: 0,
        version_min: data::VERSION,
        version_max: data::VERSION,
        endpoints: vec![tcp],
        transfer_max: 1 << 20,
    };
    blob.encode()
}
