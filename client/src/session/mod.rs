//! [`Session`]: one authenticated control connection, shared by many requests at once.
//!
//! ```text
//!   caller ─ request ─► frame ─► outgoing (bounded) ─► writer task ─► TLS ─► control
//!      ▲                  │ id                                                  │
//!      └─ reply ◄── waiting[id] ◄──────────────────────── reader task ◄── TLS ◄─┘
//! ```
//!
//! Requests under way are bounded; a caller that goes away leaves its place to the reply, which is then dropped.

use crate::config::Config;
use crate::error::{Ended, Error, Refusal, Result};
use crate::tls;
use holdfast_shared::auth::SessionKey;
use holdfast_shared::types::{CONTROL_MESSAGE_BYTES_MAX, ProcessId, SessionId};
use holdfast_shared::wire::control::{Hello, Reply, ReplyMessage, Request, RequestMessage, VERSION, Welcome};
use holdfast_shared::wire::{from_cbor, to_cbor};
use parking_lot::Mutex;
use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio::time::timeout;

/// Requests under way on one session.
const REQUESTS_MAX: usize = 64;

/// An authenticated control connection. Cheap to clone; the connection ends with the last clone, and with it
/// the server's opens of this session.
///
/// ```no_run
/// # async fn example() -> holdfast_client::Result<()> {
/// use holdfast_client::{Config, OpenOptions, Place, Session};
/// let session = Session::connect(&Config::load("client.toml".as_ref())?).await?;
/// let open = session.open(&Place { volume: "data".into(), path: "a/b".into() }, &OpenOptions::read()).await?;
/// println!("{} bytes", open.attributes().size);
/// # Ok(()) }
/// ```
#[derive(Clone)]
pub struct Session {
    inner: Arc<Inner>,
}

struct Inner {
    outgoing: mpsc::Sender<Outgoing>,
    waiting: Arc<Waiting>,
    places: Arc<Semaphore>,
    next_id: AtomicU64,
    key: SessionKey,
    server: SocketAddr,
    welcome: Welcome,
    config: Config,
}

enum Outgoing {
    Frame(Vec<u8>),
    Close(oneshot::Sender<()>),
}

/// Callers that wait for replies, by request id; and why there will be no more replies.
#[derive(Default)]
struct Waiting {
    table: Mutex<(HashMap<u64, Waiter>, Option<Ended>)>,
}

struct Waiter {
    reply: oneshot::Sender<Parcel>,
    /// For a reply that cannot be left lying.
    session: Weak<Inner>,
    /// Held until the reply comes, also when the caller has gone: this bounds the table.
    _place: OwnedSemaphorePermit,
}

impl Waiter {
    fn deliver(self, reply: Reply) {
        let Self { reply: sender, session, _place: place } = self;
        // Given back first: a parcel that is not taken may need it.
        drop(place);
        drop(sender.send(Parcel { reply: Some(reply), session }));
    }
}

/// A reply on its way to a caller. Should that have gone, or go before it takes the reply, an open in it is closed again:
/// nobody else knows of it.
struct Parcel {
    reply: Option<Reply>,
    session: Weak<Inner>,
}

impl Parcel {
    fn take(mut self) -> Option<Reply> {
        self.reply.take()
    }
}

impl Drop for Parcel {
    fn drop(&mut self) {
        let Some(Reply::Opened(opened)) = &self.reply else { return };
        // With the session the server closes what is open.
        let Some(inner) = self.session.upgrade() else { return };
        let (session, id) = (Session { inner }, opened.open);
        tracing::debug!(open = %id, "nobody waits for the open any more: closing it");
        if !session.call_and_forget(Request::Close(id)) {
            if let Ok(runtime) = tokio::runtime::Handle::try_current() {
                runtime.spawn(async move { session.call(Request::Close(id)).await });
            }
        }
    }
}

impl Waiting {
    fn end(&self, why: Ended) {
        let mut table = self.table.lock();
        table.1.get_or_insert(why);
        table.0.clear();
    }

    fn why(&self) -> Error {
        Error::session(self.table.lock().1.clone().unwrap_or(Ended::Disconnected))
    }
}

impl Session {
    /// Connects, proves who the client is, and says hello.
    ///
    /// # Errors
    /// [`Error::Io`] if the server cannot be reached or one side does not trust the other;
    /// [`Error::Incompatible`] if there is no common version; [`Error::Refused`] if the server turns the client away.
    pub async fn connect(config: &Config) -> Result<Self> {
        let max = config.connect_max();
        timeout(max, Self::connect_slowly(config))
            .await
            .map_err(|_| Error::TimedOut { what: "connecting to the server", after: max })?
    }

    async fn connect_slowly(config: &Config) -> Result<Self> {
        let unreachable = |error| {
            Error::io(
                format!("cannot reach the server at {} (is `holdfast serve` running there?)", config.server),
                error,
            )
        };
        let socket = TcpStream::connect(&config.server).await.map_err(unreachable)?;
        let server = socket.peer_addr().map_err(unreachable)?;
        // Requests are small and each is waited for: Nagle would only delay them.
        socket.set_nodelay(true).map_err(unreachable)?;
        let (stream, key) = tls::handshake(config, socket).await?;
        let (mut input, mut output) = tokio::io::split(stream);
        let hello = Hello {
            version_min: VERSION,
            version_max: VERSION,
            client: format!("holdfast-client {}", env!("CARGO_PKG_VERSION")),
            process: ProcessId(u64::from(std::process::id())),
        };
        let request = RequestMessage { id: 0, request: Request::Hello(hello) };
        output.write_all(&frame(&request)?).await.map_err(tls::refine)?;
        output.flush().await.map_err(tls::refine)?;
        // With TLS 1.3 the client's certificate is judged after the handshake: a refusal shows here.
        let first = read_reply(&mut input).await?.ok_or_else(|| Error::session(Ended::Disconnected))?;
        let welcome = match first {
            ReplyMessage { id: 0, reply: Reply::Welcome(welcome) } => welcome,
            ReplyMessage { id: 0, reply: Reply::Refused(refusal) } => return Err(refused(refusal)),
            _ => return Err(Error::Misbehaved("the first reply is not to the hello".into())),
        };
        if welcome.version != VERSION {
            return Err(Error::Incompatible(format!(
                "the server speaks version {}, this client {VERSION}",
                welcome.version
            )));
        }
        let waiting = Arc::new(Waiting::default());
        let places = Arc::new(Semaphore::new(REQUESTS_MAX));
        let (outgoing, queue) = mpsc::channel(REQUESTS_MAX);
        let reader = tokio::spawn(read_all(input, Arc::clone(&waiting), Arc::clone(&places)));
        tokio::spawn(write_all(output, queue, reader));
        let config = config.clone();
        let next_id = AtomicU64::new(1);
        Ok(Self {
            inner: Arc::new(Inner { outgoing, waiting, places, next_id, key, server, welcome, config }),
        })
    }

    /// Sends a request and waits for its reply; a refusal is an error.
    pub(crate) async fn call(&self, request: Request) -> Result<Reply> {
        self.call_and(request, || ()).await
    }

    /// As [`Session::call`]; `sent` is called once the request is on its way, whatever becomes of it or of the caller.
    pub(crate) async fn call_and(&self, request: Request, sent: impl FnOnce()) -> Result<Reply> {
        let inner = &self.inner;
        let after = inner.config.request_max();
        // One limit for all of it: a server that does not answer keeps callers from getting a place, too.
        let reply = timeout(after, async {
            let place = Arc::clone(&inner.places).acquire_owned().await.map_err(|_| inner.waiting.why())?;
            let slot = inner.outgoing.reserve().await.map_err(|_| inner.waiting.why())?;
            let (sender, receiver) = oneshot::channel();
            self.hand_over(request, sender, place, slot)?;
            sent();
            receiver.await.ok().and_then(Parcel::take).ok_or_else(|| inner.waiting.why())
        });
        match reply.await {
            Ok(Ok(Reply::Refused(refusal))) => Err(refused(refusal)),
            Ok(outcome) => outcome,
            Err(_) => Err(Error::TimedOut { what: "a control request", after }),
        }
    }

    /// Sends a request whose reply nobody waits for, if there is room for it at once.
    pub(crate) fn call_and_forget(&self, request: Request) -> bool {
        let inner = &self.inner;
        let Ok(place) = Arc::clone(&inner.places).try_acquire_owned() else { return false };
        let Ok(slot) = inner.outgoing.try_reserve() else { return false };
        self.hand_over(request, oneshot::channel().0, place, slot).is_ok()
    }

    /// Gives a request a number and to the writer, and notes who waits for the reply.
    fn hand_over(
        &self,
        request: Request,
        reply: oneshot::Sender<Parcel>,
        place: OwnedSemaphorePermit,
        slot: mpsc::Permit<'_, Outgoing>,
    ) -> Result<()> {
        let id = self.inner.next_id.fetch_add(1, Ordering::Relaxed);
        let frame = frame(&RequestMessage { id, request })?;
        let mut table = self.inner.waiting.table.lock();
        if let Some(why) = &table.1 {
            return Err(Error::session(why.clone()));
        }
        table.0.insert(id, Waiter { reply, session: Arc::downgrade(&self.inner), _place: place });
        slot.send(Outgoing::Frame(frame));
        Ok(())
    }

    /// Asks for nothing; returns how long the answer took.
    ///
    /// # Errors
    /// As any request.
    pub async fn ping(&self) -> Result<Duration> {
        let start = Instant::now();
        match self.call(Request::Ping).await? {
            Reply::Done => Ok(start.elapsed()),
            _ => Err(unexpected("ping")),
        }
    }

    /// Ends the connection in good order, for every clone; the server closes the session's opens.
    pub async fn close(self) {
        let (sender, receiver) = oneshot::channel();
        if self.inner.outgoing.send(Outgoing::Close(sender)).await.is_ok() {
            let _ = receiver.await;
        }
    }

    /// The session's id, for the operator.
    pub fn id(&self) -> SessionId {
        self.inner.welcome.session
    }

    /// Who the server says the client is.
    pub fn principal(&self) -> &str {
        &self.inner.welcome.principal
    }

    /// Opens this session may have at once.
    pub fn opens_max(&self) -> u32 {
        self.inner.welcome.opens_max
    }

    /// The address at which control was reached.
    pub fn server(&self) -> SocketAddr {
        self.inner.server
    }

    /// What the session was made with.
    pub fn config(&self) -> &Config {
        &self.inner.config
    }

    pub(crate) fn key(&self) -> &SessionKey {
        &self.inner.key
    }
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Session")
            .field("id", &self.id())
            .field("server", &self.server())
            .finish_non_exhaustive()
    }
}

/// A reply of another kind than the request asks for.
pub(crate) fn unexpected(request: &str) -> Error {
    Error::Misbehaved(format!("the reply to '{request}' is of another kind"))
}

fn refused(refusal: holdfast_shared::wire::control::Refusal) -> Error {
    Error::Refused(Refusal {
        status: refusal.status,
        detail: refusal.detail,
        retry: refusal.retry_ms.map(Duration::from_millis),
    })
}

fn frame(message: &RequestMessage) -> Result<Vec<u8>> {
    let body = to_cbor(message);
    let length = u32::try_from(body.len()).ok().filter(|_| body.len() <= CONTROL_MESSAGE_BYTES_MAX);
    let Some(length) = length else {
        return Err(Error::Usage(format!("a request of {} bytes is too long", body.len())));
    };
    let mut frame = Vec::with_capacity(4 + body.len());
    frame.extend(length.to_le_bytes());
    frame.extend(body);
    Ok(frame)
}

/// One reply; `None` at the end of the stream between two messages.
async fn read_reply(input: &mut (impl AsyncRead + Unpin)) -> Result<Option<ReplyMessage>> {
    let mut length = [0; 4];
    match input.read_exact(&mut length).await {
        Ok(_) => {}
        Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(error) => return Err(tls::refine(error)),
    }
    let length = usize::try_from(u32::from_le_bytes(length)).unwrap_or(usize::MAX);
    if length > CONTROL_MESSAGE_BYTES_MAX {
        return Err(Error::Misbehaved(format!("a control message of {length} bytes")));
    }
    let mut body = vec![0; length];
    input.read_exact(&mut body).await.map_err(tls::refine)?;
    from_cbor(&body, CONTROL_MESSAGE_BYTES_MAX)
        .map(Some)
        .map_err(|error| Error::Misbehaved(error.to_string()))
}

async fn read_all(mut input: impl AsyncRead + Unpin, waiting: Arc<Waiting>, places: Arc<Semaphore>) {
    let why = loop {
        match read_reply(&mut input).await {
            Ok(Some(ReplyMessage { id, reply })) => {
                let waiter = waiting.table.lock().0.remove(&id);
                match waiter {
                    Some(waiter) => waiter.deliver(reply),
                    None => break Ended::Misbehaved("a reply to a request that was not made"),
                }
            }
            Ok(None) => break Ended::Disconnected,
            Err(Error::Misbehaved(text)) => {
                tracing::warn!("the server broke the control protocol: {text}");
                break Ended::Misbehaved("a control message that cannot be read");
            }
            Err(error) => break Ended::Transport(error.to_string()),
        }
    };
    tracing::debug!(%why, "the session has ended");
    waiting.end(why);
    places.close();
}

async fn write_all(
    mut output: impl AsyncWrite + Unpin,
    mut queue: mpsc::Receiver<Outgoing>,
    reader: tokio::task::JoinHandle<()>,
) {
    let mut closed = None;
    'open: while let Some(next) = queue.recv().await {
        let mut next = Some(next);
        // What has queued up meanwhile goes out with one flush.
        while let Some(outgoing) = next {
            match outgoing {
                Outgoing::Frame(frame) => {
                    if output.write_all(&frame).await.is_err() {
                        break 'open; // the reader sees why, and tells
                    }
                }
                Outgoing::Close(done) => {
                    closed = Some(done);
                    break 'open;
                }
            }
            next = queue.try_recv().ok();
        }
        if output.flush().await.is_err() {
            break;
        }
    }
    queue.close();
    let _ = output.shutdown().await;
    // The server answers our end with its own; one that does not is not waited for.
    let abort = reader.abort_handle();
    if timeout(Duration::from_secs(2), reader).await.is_err() {
        abort.abort();
    }
    if let Some(done) = closed {
        let _ = done.send(());
    }
}

#[cfg(test)]
mod tests;
