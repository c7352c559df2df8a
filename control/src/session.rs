//! One control connection: from its hello to its end.
//!
//! Reading and writing go on at once. A request takes one of a fixed number of places and frees it when its answer is
//! written; without a free place nothing more is read. So a peer that does not take its answers stops
//! being served, and after a time loses its connection.
//!
//! A request that may wait for others (a lock or an open with a time to wait) gives its place back at once and takes one of
//! another kind, or is refused: else those that wait would keep from being read what they wait for.

use crate::accept::{Front, Place};
use crate::driver::{Answer, Event, random};
use crate::errno::refusal;
use crate::throttle::Throttle;
use crate::tls;
use holdfast_shared::state::SessionBegan;
use holdfast_shared::types::{CONTROL_MESSAGE_BYTES_MAX, SessionId, Status};
use holdfast_shared::wire::control::{Hello, Reply, ReplyMessage, Request, RequestMessage, VERSION};
use holdfast_shared::wire::{WireError, from_cbor, to_cbor};
use parking_lot::Mutex;
use std::collections::HashSet;
use std::net::SocketAddr;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::{Semaphore, mpsc};
use tokio::time::Instant;
use tokio_rustls::server::TlsStream;

/// Requests of one session that may wait for others.
const WAITS_MAX: usize = 256;

/// Why a session ends, other than by the client's wish.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// The connection broke.
    #[error("connection: {0}")]
    Connection(#[from] std::io::Error),
    /// The peer is nobody.
    #[error("{0}")]
    Peer(#[from] tls::PeerError),
    /// No hello in time.
    #[error("no hello in time")]
    Silent,
    /// Its place was needed for a newer connection before it said hello.
    #[error("gave way to a newer connection before hello")]
    Evicted,
    /// A message was begun and not finished in time, or an answer not taken.
    #[error("the peer is too slow")]
    Slow,
    /// A message that is not one.
    #[error("{0}")]
    Message(#[from] WireError),
    /// The first message was not hello.
    #[error("the first message was not hello")]
    NotHello,
    /// No version in common.
    #[error("the peer speaks versions {0} to {1}; this server {VERSION}")]
    Version(u8, u8),
    /// The random number generator failed.
    #[error("{0}")]
    Random(anyhow::Error),
}

impl SessionError {
    /// True if it ended before the peer was anybody.
    pub(crate) const fn before_hello(&self) -> bool {
        matches!(self, Self::Peer(_) | Self::Silent | Self::Evicted | Self::NotHello | Self::Version(..))
    }

    /// What the peer is told, if it is to be told anything.
    const fn status(&self) -> Option<Status> {
        match self {
            Self::Connection(_) | Self::Slow | Self::Evicted => None,
            Self::Peer(_) => Some(Status::AccessDenied),
            Self::Silent => Some(Status::TimedOut),
            Self::Message(_) | Self::NotHello => Some(Status::Protocol),
            Self::Version(..) => Some(Status::Version),
            Self::Random(_) => Some(Status::Internal),
        }
    }
}

/// Serves one connection whose TLS handshake is done.
///
/// # Errors
/// See [`SessionError`]; for the log only, everything else is done.
pub async fn run(
    stream: TlsStream<TcpStream>,
    deadline: Instant,
    place: Place,
    front: &Front,
) -> Result<(), SessionError> {
    let who = tls::principal(stream.get_ref().1);
    let key = tls::session_key(stream.get_ref().1);
    let address = stream.get_ref().0.peer_addr()?;
    let (mut reader, mut writer) = tokio::io::split(stream);
    let hello = async {
        let (who, key) = (who?, key?);
        let read = read_message(&mut reader, message_wait(front));
        let first = tokio::time::timeout_at(deadline, read).await.map_err(|_| SessionError::Silent)??;
        let Some(RequestMessage { id, request }) = first else { return Ok(None) };
        front.gauges.request(&request);
        let Request::Hello(Hello { version_min, version_max, client, process }) = request else {
            return Err(SessionError::NotHello);
        };
        if !(version_min..=version_max).contains(&VERSION) {
            return Err(SessionError::Version(version_min, version_max));
        }
        let mut session = [0; 16];
        random(&mut session).map_err(SessionError::Random)?;
        let session = SessionId::from_random(session);
        let client: String = client.chars().filter(|c| !c.is_control()).take(128).collect();
        static LINES: Throttle = Throttle::new();
        if let Some(left_out) = LINES.admit() {
            tracing::info!(principal = %who, %session, %client, left_out, "session begins");
        }
        Ok(Some(SessionBegan { session, request: id, principal: who, key, process }))
    };
    let hello = async {
        tokio::select! { began = hello => began, () = place.evicted() => Err(SessionError::Evicted) }
    };
    let began = match hello.await {
        Ok(Some(began)) => began,
        Ok(None) => return Ok(()),
        Err(error) => {
            front.gauges.handshakes_failed_total.fetch_add(1, Relaxed);
            farewell(&mut writer, &error, front).await;
            return Err(error);
        }
    };
    drop(place);
    serve(reader, writer, began, address, front).await
}

async fn serve<S>(
    mut reader: tokio::io::ReadHalf<S>,
    mut writer: tokio::io::WriteHalf<S>,
    began: SessionBegan,
    address: SocketAddr,
    front: &Front,
) -> Result<(), SessionError>
where
    S: AsyncRead + AsyncWrite,
{
    let session = began.session;
    let places = front.limits.requests_per_session;
    let (permits, waits) = (Semaphore::new(places), Semaphore::new(WAITS_MAX));
    // Numbers of the requests that have a place among those that wait.
    let waiting = Mutex::new(HashSet::new());
    // One more for the answer to hello, and one for the end.
    let (answers, mut queue) = mpsc::channel(places + WAITS_MAX + 2);
    let (refuse, mut refused) = mpsc::channel(places);
    if front.events.send(Event::Begin(Box::new(began), address, answers)).await.is_err() {
        return Ok(());
    }
    let read = async {
        loop {
            match permits.acquire().await {
                Ok(permit) => permit.forget(),
                Err(_) => return Ok(()),
            }
            let Some(RequestMessage { id, request }) = read_message(&mut reader, message_wait(front)).await?
            else {
                return Ok(());
            };
            if may_wait(&request) {
                match waits.try_acquire() {
                    // A number that is in use already stays an ordinary request.
                    Ok(place) if waiting.lock().insert(id) => {
                        place.forget();
                        permits.add_permits(1);
                    }
                    Ok(_) => {}
                    Err(_) => {
                        front.gauges.refused(Status::TooMany);
                        let reply = Reply::Refused(refusal(Status::TooMany, "too many requests wait"));
                        if refuse.send(ReplyMessage { id, reply }).await.is_err() {
                            return Ok(());
                        }
                        continue;
                    }
                }
            }
            if front.events.send(Event::Request(session, id, Box::new(request))).await.is_err() {
                return Ok(());
            }
        }
    };
    let write = async {
        let mut hello = true;
        loop {
            let reply = tokio::select! {
                answer = queue.recv() => match answer {
                    Some(Answer::Reply(reply)) => *reply,
                    _ => return Ok::<(), SessionError>(()),
                },
                Some(refusal) = refused.recv() => {
                    write_message(&mut writer, &refusal, message_wait(front)).await?;
                    permits.add_permits(1);
                    continue;
                }
            };
            write_message(&mut writer, &reply, message_wait(front)).await?;
            let waited = waiting.lock().remove(&reply.id);
            match (std::mem::take(&mut hello), waited) {
                (true, _) => {}
                (false, true) => waits.add_permits(1),
                (false, false) => permits.add_permits(1),
            }
        }
    };
    let result: Result<(), SessionError> =
        tokio::select! { result = read => result, result = write => result };
    let _ = front.events.send(Event::Lost(session)).await;
    if let Err(error) = &result {
        farewell(&mut writer, error, front).await;
    }
    let _ = tokio::time::timeout(Duration::from_secs(1), writer.shutdown()).await;
    result
}

/// True for a request whose answer may have to wait for another one of this very session.
const fn may_wait(request: &Request) -> bool {
    match request {
        Request::Lock(lock) => lock.wait_ms.is_some(),
        Request::Open(open) => open.wait_ms.is_some(),
        _ => false,
    }
}

fn message_wait(front: &Front) -> Duration {
    Duration::from_millis(front.limits.message_ms)
}

/// The next message; `None` if the peer has ended the connection between messages. Its length is checked before a byte
/// is allocated for it.
async fn read_message(
    reader: &mut (impl AsyncRead + Unpin),
    wait: Duration,
) -> Result<Option<RequestMessage>, SessionError> {
    let mut prefix = [0; 4];
    // Between messages a peer may be silent as long as it likes: the kernel's keepalive watches over it.
    let got = match reader.read(&mut prefix).await {
        Ok(0) => return Ok(None),
        Ok(got) => got,
        Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let rest = async {
        reader.read_exact(prefix.get_mut(got..).unwrap_or_default()).await?;
        let length = usize::try_from(u32::from_le_bytes(prefix)).unwrap_or(usize::MAX);
        if length > CONTROL_MESSAGE_BYTES_MAX {
            return Err(SessionError::Message(WireError::Long {
                max: CONTROL_MESSAGE_BYTES_MAX,
                got: length,
            }));
        }
        let mut bytes = vec![0; length];
        reader.read_exact(&mut bytes).await?;
        Ok(from_cbor(&bytes, CONTROL_MESSAGE_BYTES_MAX)?)
    };
    tokio::time::timeout(wait, rest).await.map_err(|_| SessionError::Slow)?.map(Some)
}

async fn write_message(
    writer: &mut (impl AsyncWrite + Unpin),
    message: &ReplyMessage,
    wait: Duration,
) -> Result<(), SessionError> {
    let body = to_cbor(message);
    // The longest answers are pages of a directory, which stay well below the limit.
    let length = u32::try_from(body.len()).unwrap_or(u32::MAX);
    let mut bytes = Vec::with_capacity(4 + body.len());
    bytes.extend(length.to_le_bytes());
    bytes.extend(body);
    let write = async {
        writer.write_all(&bytes).await?;
        writer.flush().await
    };
    tokio::time::timeout(wait, write).await.map_err(|_| SessionError::Slow)??;
    Ok(())
}

/// Tells the peer why it is dropped, if it still listens. The answer is to no request, so its number is 0.
async fn farewell(writer: &mut (impl AsyncWrite + Unpin), error: &SessionError, front: &Front) {
    let Some(status) = error.status() else { return };
    let detail = match error {
        SessionError::Random(_) => String::new(),
        told => told.to_string(),
    };
    front.gauges.refused(status);
    let message = ReplyMessage { id: 0, reply: Reply::Refused(refusal(status, &detail)) };
    let _ = write_message(writer, &message, Duration::from_secs(1)).await;
}
