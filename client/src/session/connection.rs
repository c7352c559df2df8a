//! [`Connection`]: one TLS connection to control, from hello to its end. A session has one after the other.
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
use holdfast_shared::types::{CONTROL_MESSAGE_BYTES_MAX, OpenId, ProcessId, SessionId};
use holdfast_shared::wire::control::{
    Hello, Reply, ReplyMessage, Request, RequestMessage, Resumed, VERSION, Welcome,
};
use holdfast_shared::wire::{from_cbor, to_cbor};
use parking_lot::Mutex;
use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch};
use tokio::task::AbortHandle;
use tokio::time::timeout;

/// Requests under way on one connection.
pub(crate) const REQUESTS_MAX: usize = 64;
/// Of those that wait at the server for something, beside these.
const WAITS_MAX: usize = 192;
/// A silent server is asked for a sign of life after so long, seconds; and again.
const KEEPALIVE_S: u64 = 5;
/// So many unanswered ones end the connection.
const KEEPALIVES: u32 = 3;

/// An authenticated connection. It ends with the last reference, with [`Connection::shut`], or when the server goes.
pub(crate) struct Connection {
    outgoing: mpsc::Sender<Outgoing>,
    waiting: Arc<Waiting>,
    places: Arc<Semaphore>,
    waits: Arc<Semaphore>,
    next_id: AtomicU64,
    key: SessionKey,
    server: SocketAddr,
    welcome: Welcome,
    request_max: Duration,
    /// Answers to resumes that nobody took, by the key asked.
    late: Mutex<Vec<(Vec<u8>, Resumed)>>,
    tasks: [AbortHandle; 2],
}

enum Outgoing {
    Frame(Vec<u8>),
    Close(oneshot::Sender<()>),
}

/// Why a request came to nothing.
pub(crate) enum Trouble {
    /// The connection ended before the answer. `sent`: the server may have got the request.
    Lost {
        /// True if it may have been carried out.
        sent: bool,
    },
    /// Everything else, refusals included.
    Other(Error),
}

/// Callers that wait for replies, by request id; and why there will be no more replies.
struct Waiting {
    table: Mutex<HashMap<u64, Waiter>>,
    over: watch::Sender<Option<Ended>>,
}

struct Waiter {
    reply: oneshot::Sender<Parcel>,
    resume_key: Option<Vec<u8>>,
    /// For a reply that cannot be left lying.
    connection: Weak<Connection>,
    /// Held until the reply comes, also when the caller has gone: this bounds the table.
    _place: OwnedSemaphorePermit,
}

impl Waiter {
    fn deliver(self, reply: Reply) {
        let Self { reply: sender, resume_key, connection, _place: place } = self;
        // Given back first: a parcel that is not taken may need it.
        drop(place);
        drop(sender.send(Parcel { reply: Some(reply), resume_key, connection }));
    }
}

/// A reply on its way to a caller. Should that have gone, or go before it takes the reply, a new open in it is closed
/// again: nobody else knows of it. One that was resumed was known before: it stays, and whoever resumes it again on this
/// connection finds the answer.
struct Parcel {
    reply: Option<Reply>,
    /// Of a resume: by which key.
    resume_key: Option<Vec<u8>>,
    connection: Weak<Connection>,
}

impl Parcel {
    fn take(mut self) -> Option<Reply> {
        self.reply.take()
    }
}

impl Drop for Parcel {
    fn drop(&mut self) {
        let Some(connection) = self.connection.upgrade() else { return };
        let id = match (self.reply.take(), self.resume_key.take()) {
            (Some(Reply::Opened(opened)), _) => opened.open,
            (Some(Reply::Resumed(resumed)), Some(key)) => return connection.keep_late(key, resumed),
            _ => return,
        };
        tracing::debug!(open = %id, "nobody waits for the open any more: closing it");
        if !connection.call_and_forget(Request::Close(id)) {
            if let Ok(runtime) = tokio::runtime::Handle::try_current() {
                runtime.spawn(async move { drop(connection.call(Request::Close(id)).await) });
            }
        }
    }
}

impl Waiting {
    fn end(&self, why: Ended) {
        let mut table = self.table.lock();
        self.over.send_if_modified(|over| {
            let first = over.is_none();
            over.get_or_insert(why);
            first
        });
        table.clear();
    }
}

impl Connection {
    /// Connects, proves who the client is, and says hello.
    pub(crate) async fn open(config: &Config) -> Result<Arc<Self>> {
        let max = config.connect_max();
        timeout(max, Self::open_slowly(config))
            .await
            .map_err(|_| Error::TimedOut { what: "connecting to the server", after: max })?
    }

    async fn open_slowly(config: &Config) -> Result<Arc<Self>> {
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
        keep_alive(&socket).map_err(unreachable)?;
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
        let waiting = Arc::new(Waiting { table: Mutex::default(), over: watch::Sender::new(None) });
        let places = Arc::new(Semaphore::new(REQUESTS_MAX));
        let (outgoing, queue) = mpsc::channel(REQUESTS_MAX);
        let waits = Arc::new(Semaphore::new(WAITS_MAX));
        let all = [Arc::clone(&places), Arc::clone(&waits)];
        let reader = tokio::spawn(read_all(input, Arc::clone(&waiting), all));
        let reading = reader.abort_handle();
        let writer = tokio::spawn(write_all(output, queue, reader, Arc::clone(&waiting)));
        let tasks = [reading, writer.abort_handle()];
        Ok(Arc::new(Self {
            outgoing,
            waiting,
            places,
            waits,
            next_id: AtomicU64::new(1),
            key,
            server,
            welcome,
            request_max: config.request_max(),
            late: Mutex::default(),
            tasks,
        }))
    }

    /// Sends a request and waits for its reply; a refusal is an error.
    pub(crate) async fn call(self: &Arc<Self>, request: Request) -> std::result::Result<Reply, Trouble> {
        self.call_for(request, Duration::ZERO).await
    }

    /// As [`Connection::call`], for a request that the server may answer only after `longer`.
    pub(crate) async fn call_for(
        self: &Arc<Self>,
        request: Request,
        longer: Duration,
    ) -> std::result::Result<Reply, Trouble> {
        let after = self.request_max.saturating_add(longer);
        let lost = |sent| Trouble::Lost { sent };
        // One limit for all of it: a server that does not answer keeps callers from getting a place, too.
        let reply = timeout(after, async {
            // Requests that wait at the server must not keep back those that they wait for.
            let places = if longer.is_zero() { &self.places } else { &self.waits };
            let place = Arc::clone(places).acquire_owned().await.map_err(|_| lost(false))?;
            let slot = self.outgoing.reserve().await.map_err(|_| lost(false))?;
            let (sender, receiver) = oneshot::channel();
            self.hand_over(request, sender, place, slot)?;
            receiver.await.ok().and_then(Parcel::take).ok_or(lost(true))
        });
        match reply.await {
            Ok(Ok(Reply::Refused(refusal))) => Err(Trouble::Other(refused(refusal))),
            Ok(outcome) => outcome,
            Err(_) => Err(Trouble::Other(Error::TimedOut { what: "a control request", after })),
        }
    }

    /// Sends a request whose reply nobody waits for, if there is room for it at once.
    pub(crate) fn call_and_forget(self: &Arc<Self>, request: Request) -> bool {
        let Ok(place) = Arc::clone(&self.places).try_acquire_owned() else { return false };
        let Ok(slot) = self.outgoing.try_reserve() else { return false };
        self.hand_over(request, oneshot::channel().0, place, slot).is_ok()
    }

    /// Shows the server that the answer to a resume has come: any request does that names the open. Until then the server must
    /// count on the verdict being lost, and tell the next one for the worse. Without room for it others come that do.
    pub(crate) fn say_heard(self: &Arc<Self>, open: OpenId) {
        self.call_and_forget(Request::QueryKey(open));
    }

    /// Gives a request a number and to the writer, and notes who waits for the reply.
    fn hand_over(
        self: &Arc<Self>,
        request: Request,
        reply: oneshot::Sender<Parcel>,
        place: OwnedSemaphorePermit,
        slot: mpsc::Permit<'_, Outgoing>,
    ) -> std::result::Result<(), Trouble> {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let resume_key = match &request {
            Request::Resume(resume) => Some(resume.resume_key.clone()),
            _ => None,
        };
        let frame = frame(&RequestMessage { id, request }).map_err(Trouble::Other)?;
        let mut table = self.waiting.table.lock();
        if self.is_over() {
            return Err(Trouble::Lost { sent: false });
        }
        table.insert(id, Waiter { reply, resume_key, connection: Arc::downgrade(self), _place: place });
        slot.send(Outgoing::Frame(frame));
        Ok(())
    }

    /// Ends the connection in good order, and waits for that.
    pub(crate) async fn shut(&self) {
        let (sender, receiver) = oneshot::channel();
        if self.outgoing.send(Outgoing::Close(sender)).await.is_ok() {
            let _ = receiver.await;
        }
    }

    /// No request takes it any more, and the session connects again; what is under way may still be answered. It lives
    /// until a resume on the next connection supersedes it, or nobody holds it.
    pub(crate) fn leave(&self) {
        self.waiting.over.send_if_modified(|over| {
            let first = over.is_none();
            over.get_or_insert(Ended::Closed);
            first
        });
    }

    fn keep_late(&self, key: Vec<u8>, resumed: Resumed) {
        tracing::debug!(open = %resumed.opened.open, "nobody waits for the resume any more: its answer is kept");
        let mut late = self.late.lock();
        if late.len() < REQUESTS_MAX {
            late.push((key, resumed));
        }
    }

    /// The answer to an earlier resume by this key, which nobody took.
    pub(crate) fn late_resume(&self, key: &[u8]) -> Option<Resumed> {
        let mut late = self.late.lock();
        let at = late.iter().position(|(asked, _)| asked == key)?;
        Some(late.swap_remove(at).1)
    }

    /// Ends the connection without waiting; who waits for replies is told at once.
    pub(crate) fn cut(&self) {
        self.waiting.end(Ended::Closed);
        self.places.close();
        self.waits.close();
        self.tasks.iter().for_each(AbortHandle::abort);
    }

    /// True once no more replies come.
    pub(crate) fn is_over(&self) -> bool {
        self.waiting.over.borrow().is_some()
    }

    /// Tells why the connection has ended, when it has. Holds nothing of the connection.
    pub(crate) fn end(&self) -> watch::Receiver<Option<Ended>> {
        self.waiting.over.subscribe()
    }

    pub(crate) fn id(&self) -> SessionId {
        self.welcome.session
    }

    pub(crate) fn welcome(&self) -> &Welcome {
        &self.welcome
    }

    pub(crate) fn server(&self) -> SocketAddr {
        self.server
    }

    pub(crate) fn key(&self) -> &SessionKey {
        &self.key
    }
}

/// Lets the kernel find out that the server's host has gone, which sends no word.
fn keep_alive(socket: &TcpStream) -> std::io::Result<()> {
    use rustix::net::sockopt;
    let every = Duration::from_secs(KEEPALIVE_S);
    sockopt::set_socket_keepalive(socket, true)?;
    sockopt::set_tcp_keepidle(socket, every)?;
    sockopt::set_tcp_keepintvl(socket, every)?;
    sockopt::set_tcp_keepcnt(socket, KEEPALIVES)?;
    // Also for a request that nobody acknowledges.
    let unacknowledged = u32::try_from((every * (KEEPALIVES + 1)).as_millis()).unwrap_or(u32::MAX);
    sockopt::set_tcp_user_timeout(socket, unacknowledged)?;
    Ok(())
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

async fn read_all(mut input: impl AsyncRead + Unpin, waiting: Arc<Waiting>, places: [Arc<Semaphore>; 2]) {
    let why = loop {
        match read_reply(&mut input).await {
            Ok(Some(ReplyMessage { id, reply })) => {
                let waiter = waiting.table.lock().remove(&id);
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
    tracing::debug!(%why, "the connection has ended");
    waiting.end(why);
    places.iter().for_each(|places| places.close());
}

async fn write_all(
    mut output: impl AsyncWrite + Unpin,
    mut queue: mpsc::Receiver<Outgoing>,
    reader: tokio::task::JoinHandle<()>,
    waiting: Arc<Waiting>,
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
        waiting.end(Ended::Closed);
    }
    if let Some(done) = closed {
        let _ = done.send(());
    }
}
