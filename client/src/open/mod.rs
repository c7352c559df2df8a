//! [`Open`]: one granted access to one file, and what is needed to bind channels to it.
//!
//! | file | holds |
//! |---|---|
//! | `mod` | opening, attributes, closing |
//! | `options` | what is asked |
//! | `life` | which session has it: lost, resumed, over |
//! | `gate` | may it be read and written at this moment? |
//! | `durable` | which writes are not flushed yet |
//! | `events` | what the application is told |
//! | `lock` | byte-range locks |

mod durable;
mod events;
mod gate;
mod life;
mod lock;
mod options;

pub use events::{Event, Events};
pub use lock::LockOptions;
pub use options::OpenOptions;

use crate::binding;
use crate::claim::Claim;
use crate::error::{Error, Result};
use crate::recovery::Patience;
use crate::recovery::resume::{Orphan, Resumed};
use crate::requests::Changes;
use crate::session::connection::{Connection, Trouble};
use crate::session::{Session, unexpected};
use durable::Durable;
use gate::Gate;
use holdfast_shared::auth::BindSecret;
use holdfast_shared::types::{Access, CreateId, HoldClass, OpenId, ShareMode, Status};
use holdfast_shared::wire::control::{self, Attributes, KeyGrant, Opened, Place, Reply, Request, Target};
use life::{Attachment, Life};
use lock::Locks;
use parking_lot::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};
use tokio::sync::{broadcast, watch};

/// A file opened at the server. Cheap to clone: all clones, and all bindings, are the same open.
///
/// It outlives the connection: when that is lost, or the server restarted, the session resumes it, and requests wait for that.
/// What was found then is an [`Event`]; a file that somebody else has changed stops the open until
/// [`Open::accept_change`].
///
/// [`Open::close`] waits for the server's word. Dropping the last clone (bindings hold one each) sends the
/// close without waiting for the answer. A process that ends without either leaves it detached at the server, for its hold
/// time.
#[derive(Clone)]
pub struct Open {
    pub(crate) inner: Arc<Inner>,
}

pub(crate) struct Inner {
    pub(crate) session: Session,
    pub(crate) id: OpenId,
    access: Access,
    share: Option<ShareMode>,
    created: bool,
    hold: Duration,
    class: HoldClass,
    attributes: Attributes,
    pub(crate) life: Mutex<Life>,
    attachment: watch::Sender<Attachment>,
    pub(crate) gate: Gate,
    pub(crate) durable: Durable,
    pub(crate) locks: Locks,
    events: broadcast::Sender<Event>,
    /// Bindings to keep when the open is resumed.
    pub(crate) bindings: Mutex<Vec<Weak<binding::Inner>>>,
    /// Its session is replaced for its sake.
    pub(crate) replaces: AtomicBool,
    /// A resume found that its locks had not protected it.
    locks_lapsed: AtomicBool,
    /// Somebody is closing it, or has.
    closed: AtomicBool,
    /// The server has closed it.
    finished: AtomicBool,
}

/// Between two attempts to open while the server is not ready.
const AGAIN: Duration = Duration::from_millis(500);
const AGAIN_MIN: Duration = Duration::from_millis(20);

impl Session {
    /// Opens a file.
    ///
    /// # Errors
    /// As any request; [`Status::ShareConflict`] while another open denies the access; [`Status::Busy`] while a detached
    /// one does, with the time it is kept; [`Status::Unavailable`] if a server that was restarted does not become ready for
    /// as long as a connection may take.
    pub async fn open(&self, place: &Place, options: &OpenOptions) -> Result<Open> {
        let create_id = match options.wanted_create_id() {
            Some(id) => id,
            None => CreateId::from_random(crate::random()?),
        };
        let request = options.request(create_id, place);
        // A server that has just restarted asks for patience while it makes sure of its data plane. The create id makes the
        // repeated request the same one.
        let deadline = Instant::now() + self.config().connect_max();
        let (opened, connection) = loop {
            match self.call_for(Request::Open(request.clone()), options.longer()).await {
                Ok((Reply::Opened(opened), connection)) => break (opened, connection),
                Ok(_) => return Err(unexpected("open")),
                Err(Error::Refused(refusal)) if refusal.status == Status::Unavailable => {
                    let wait = refusal.retry.unwrap_or(AGAIN).clamp(AGAIN_MIN, AGAIN);
                    if Instant::now() + wait > deadline {
                        return Err(Error::Refused(refusal));
                    }
                    tokio::time::sleep(wait).await;
                }
                Err(error) => return Err(error),
            }
        };
        let open = Open::new(self, &connection, opened, None);
        self.inner.register(&open.inner, &connection);
        Ok(open)
    }
}

impl Open {
    fn new(session: &Session, on: &Arc<Connection>, opened: Opened, share: Option<ShareMode>) -> Self {
        let secret = on.key().bind_secret(opened.open);
        Self {
            inner: Arc::new(Inner {
                session: session.clone(),
                id: opened.open,
                access: opened.access,
                share,
                created: opened.created,
                hold: Duration::from_millis(opened.hold_ms),
                class: opened.class,
                attributes: opened.attributes,
                life: Mutex::new(Life::new(opened.key, secret, opened.epoch, on.id())),
                attachment: watch::Sender::new(Attachment::On(Arc::clone(on))),
                gate: Gate::default(),
                durable: Durable::default(),
                locks: Locks::default(),
                events: broadcast::Sender::new(events::EVENTS_MAX),
                bindings: Mutex::default(),
                replaces: AtomicBool::new(false),
                locks_lapsed: AtomicBool::new(false),
                closed: AtomicBool::new(false),
                finished: AtomicBool::new(false),
            }),
        }
    }

    /// An open that an application resumed.
    pub(crate) fn resumed(session: &Session, on: &Arc<Connection>, resumed: control::Resumed) -> Resumed {
        let open = Self::new(session, on, resumed.opened, Some(resumed.share));
        open.inner.locks.executed(resumed.lock_sequence);
        open.inner.shut_if_changed(resumed.verdict);
        open.inner.tell(resumed.verdict, resumed.locks_kept);
        on.say_heard(open.id());
        session.inner.register(&open.inner, on);
        Resumed { open, verdict: resumed.verdict, locks_kept: resumed.locks_kept, kept: resumed.kept }
    }

    /// The open's persistent id.
    pub fn id(&self) -> OpenId {
        self.inner.id
    }

    /// The access granted.
    pub fn access(&self) -> Access {
        self.inner.access
    }

    /// True if the open request created the file.
    pub fn created(&self) -> bool {
        self.inner.created
    }

    /// The file's attributes when it was opened.
    pub fn attributes(&self) -> &Attributes {
        &self.inner.attributes
    }

    /// The session it belongs to.
    pub fn session(&self) -> &Session {
        &self.inner.session
    }

    /// What it lets others have; `None` if it was not resumed by [`Session::resume`]: then it is what was asked.
    pub fn share(&self) -> Option<ShareMode> {
        self.inner.share
    }

    /// The hold time granted: for so long the open is kept against others when the client is away.
    pub fn hold(&self) -> Duration {
        self.inner.hold
    }

    /// What protects it while it is detached.
    pub fn class(&self) -> HoldClass {
        self.inner.class
    }

    /// Rises with every resume.
    pub fn epoch(&self) -> u64 {
        self.inner.life.lock().epoch
    }

    /// The key to store, so that this principal can resume the open from another process ([`Session::resume`]). It changes
    /// with every resume: store it again after [`Event::Resumed`].
    ///
    /// Whoever has it still needs this client's certificate.
    pub fn resume_key(&self) -> Vec<u8> {
        self.inner.life.lock().grant.resume_key.clone()
    }

    /// What happens to this open from now on.
    ///
    /// ```no_run
    /// # async fn example(open: holdfast_client::Open) {
    /// use holdfast_client::{Event, Verdict};
    /// let mut events = open.events();
    /// while let Some(event) = events.next().await {
    ///     match event {
    ///         Event::Resumed { verdict: Verdict::Changed, .. } => println!("{}: changed by somebody else", open.id()),
    ///         other => println!("{}: {other:?}", open.id()),
    ///     }
    /// }
    /// # }
    /// ```
    pub fn events(&self) -> Events {
        Events { receiver: self.inner.events.subscribe() }
    }

    /// Resume key, service blob, challenge, volume and policy, as last told by the server.
    pub fn grant(&self) -> KeyGrant {
        self.inner.life.lock().grant.clone()
    }

    /// The secret that proves the resume key, in the session that has the open now. Whoever has both can bind this open: give
    /// it only to whom you would give the file.
    pub fn bind_secret(&self) -> BindSecret {
        self.inner.life.lock().secret.clone()
    }

    /// Asks again for key, service blob and challenge: endpoints change when the data plane restarts.
    ///
    /// # Errors
    /// As any request.
    pub async fn query_key(&self) -> Result<KeyGrant> {
        let incarnation = self.inner.life.lock().incarnation;
        let Reply::Key(grant) = self.inner.ask(Request::QueryKey(self.inner.id)).await? else {
            return Err(unexpected("query key"));
        };
        let mut life = self.inner.life.lock();
        // An answer from before a resume must not replace the resume's.
        if life.incarnation == incarnation {
            life.grant = grant.clone();
        }
        Ok(grant)
    }

    /// The file's attributes now.
    ///
    /// # Errors
    /// As any request.
    pub async fn attributes_now(&self) -> Result<Attributes> {
        self.inner.attributes(Request::GetAttributes(Target::Open(self.inner.id))).await
    }

    /// Changes attributes and returns the new ones.
    ///
    /// # Errors
    /// As any request.
    pub async fn set_attributes(&self, changes: &Changes) -> Result<Attributes> {
        self.inner.gate.check()?;
        let target = Target::Open(self.inner.id);
        self.inner.attributes(Request::SetAttributes(changes.of(target))).await
    }

    /// Closes the open and all its handles, for every clone and binding.
    ///
    /// # Errors
    /// As any request; [`Error::Gone`] if the server had closed it before.
    pub async fn close(&self) -> Result<()> {
        let inner = &*self.inner;
        let Some(claim) = Claim::take(&inner.closed) else { return Ok(()) };
        let (mut patience, mut after) = (Patience::new(inner.session.config()), None);
        let mut sent_before = false;
        let outcome = loop {
            let connection = match inner.ready(after.as_ref(), &mut patience).await {
                Ok(connection) => connection,
                // The close whose answer was lost has killed the key.
                Err(error) if sent_before && error.status() == Some(Status::BadKey) => break Ok(()),
                Err(error) => break Err(error),
            };
            match connection.call(Request::Close(inner.id)).await {
                Ok(Reply::Done) => break Ok(()),
                Ok(_) => break Err(unexpected("close")),
                Err(Trouble::Lost { sent }) => sent_before |= sent,
                Err(Trouble::Other(error)) => match error.status() {
                    Some(Status::Closed | Status::NotFound) if sent_before => break Ok(()),
                    Some(Status::SessionGone) => connection.cut(),
                    Some(Status::ForceClosed | Status::Evicted | Status::FileLost) => {
                        break Err(inner.is_gone(&connection, &error).await);
                    }
                    _ => break Err(error),
                },
            }
            after = Some(connection);
        };
        if outcome.is_ok() {
            inner.finished.store(true, Ordering::Release);
            claim.keep();
        }
        outcome
    }
}

impl Inner {
    /// Asks something about this open whose answer comes at once.
    async fn ask(&self, request: Request) -> Result<Reply> {
        self.call(|| Ok((request.clone(), Duration::ZERO))).await
    }

    async fn attributes(&self, request: Request) -> Result<Attributes> {
        match self.ask(request).await? {
            Reply::Attributes(attributes) => Ok(attributes),
            _ => Err(unexpected("attributes")),
        }
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.finished.load(Ordering::Acquire)
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        if self.gate.over().is_some() || *self.finished.get_mut() {
            return;
        }
        if self.attached().is_some_and(|connection| connection.call_and_forget(Request::Close(self.id))) {
            return;
        }
        // Too busy, or away: made up for as soon as there is a connection, unless the session goes too.
        let life = self.life.get_mut();
        let orphan = Orphan { id: self.id, key: life.grant.resume_key.clone(), held_by: life.held_by() };
        self.session.inner.orphans.lock().push(orphan);
        self.session.inner.nudge.notify_one();
    }
}

impl std::fmt::Debug for Open {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Open")
            .field("id", &self.inner.id)
            .field("access", &self.inner.access)
            .finish_non_exhaustive()
    }
}
