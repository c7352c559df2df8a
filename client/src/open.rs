//! [`Open`]: one granted access to one file, and what is needed to bind channels to it.

use crate::claim::Claim;
use crate::error::{Error, Result};
use crate::requests::Changes;
use crate::session::{Session, unexpected};
use holdfast_shared::auth::BindSecret;
use holdfast_shared::types::{Access, CreateId, Disposition, OpenId, ShareMode, Status};
use holdfast_shared::wire::control::{self, Attributes, KeyGrant, Place, Reply, Request, Target};
use parking_lot::Mutex;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

/// How to open a file.
///
/// ```
/// use holdfast_client::{OpenOptions, ShareMode};
/// let options = OpenOptions::create_new(0o640).share(ShareMode::READ);
/// # let _ = options;
/// ```
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct OpenOptions {
    access: Access,
    share: ShareMode,
    disposition: Disposition,
    mode: u32,
    hold: Option<Duration>,
}

impl OpenOptions {
    fn new(access: Access, disposition: Disposition, mode: u32) -> Self {
        Self { access, share: ShareMode::ALL, disposition, mode, hold: None }
    }

    /// An existing file, to be read.
    pub fn read() -> Self {
        Self::new(Access::READ, Disposition::Open, 0)
    }

    /// An existing file, to be read and written.
    pub fn read_write() -> Self {
        Self::new(Access::READ | Access::WRITE, Disposition::Open, 0)
    }

    /// A file that must not exist yet, with these permission bits, to be read and written.
    pub fn create_new(mode: u32) -> Self {
        Self::new(Access::READ | Access::WRITE, Disposition::CreateNew, mode)
    }

    /// With this access instead.
    #[must_use]
    pub fn access(mut self, access: Access) -> Self {
        self.access = access;
        self
    }

    /// Lets others have only these rights while the open lives; the default denies nothing.
    #[must_use]
    pub fn share(mut self, share: ShareMode) -> Self {
        self.share = share;
        self
    }

    /// With this disposition instead; `mode` counts where a file is created.
    #[must_use]
    pub fn disposition(mut self, disposition: Disposition, mode: u32) -> Self {
        self.disposition = disposition;
        self.mode = mode;
        self
    }

    /// Asks for this hold time instead of the volume's default.
    #[must_use]
    pub fn hold(mut self, hold: Duration) -> Self {
        self.hold = Some(hold);
        self
    }
}

/// A file opened at the server. Cheap to clone: all clones, and all bindings, are the same open.
///
/// [`Open::close`] waits for the server's word. Dropping the last clone (bindings hold one each) sends the
/// close without waiting for the answer; should the session be too busy even for that, the server closes the open
/// when the session ends.
#[derive(Clone)]
pub struct Open {
    inner: Arc<Inner>,
}

struct Inner {
    session: Session,
    id: OpenId,
    access: Access,
    created: bool,
    attributes: Attributes,
    grant: Mutex<KeyGrant>,
    secret: BindSecret,
    closed: AtomicBool,
}

/// Between two attempts to open while the server is not ready.
const AGAIN: Duration = Duration::from_millis(500);
const AGAIN_MIN: Duration = Duration::from_millis(20);

impl Session {
    /// Opens a file.
    ///
    /// # Errors
    /// As any request; [`Status::ShareConflict`] while another open denies the access; [`Status::Unavailable`] if a server
    /// that was restarted does not become ready for as long as a connection may take.
    pub async fn open(&self, place: &Place, options: &OpenOptions) -> Result<Open> {
        let request = control::Open {
            create_id: CreateId::from_random(crate::random()?),
            place: place.clone(),
            access: options.access,
            share: options.share,
            disposition: options.disposition,
            mode: options.mode & 0o7777,
            hold_ms: options.hold.map(|hold| u64::try_from(hold.as_millis()).unwrap_or(u64::MAX)),
        };
        // A server that has just restarted asks for patience while it makes sure of its data plane. The create id makes the
        // repeated request the same one.
        let deadline = Instant::now() + self.config().connect_max();
        let opened = loop {
            match self.call(Request::Open(request.clone())).await {
                Ok(Reply::Opened(opened)) => break opened,
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
        Ok(Open {
            inner: Arc::new(Inner {
                session: self.clone(),
                id: opened.open,
                access: opened.access,
                created: opened.created,
                attributes: opened.attributes,
                secret: self.key().bind_secret(opened.open),
                grant: Mutex::new(opened.key),
                closed: AtomicBool::new(false),
            }),
        })
    }
}

impl Open {
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

    /// Resume key, service blob, challenge, volume and policy, as last told by the server.
    pub fn grant(&self) -> KeyGrant {
        self.inner.grant.lock().clone()
    }

    /// The secret that proves the resume key. Whoever has both can bind this open: give it only to whom you would give
    /// the file.
    pub fn bind_secret(&self) -> &BindSecret {
        &self.inner.secret
    }

    /// Asks again for key, service blob and challenge: endpoints change when the data plane restarts.
    ///
    /// # Errors
    /// As any request.
    pub async fn query_key(&self) -> Result<KeyGrant> {
        let Reply::Key(grant) = self.inner.session.call(Request::QueryKey(self.inner.id)).await? else {
            return Err(unexpected("query key"));
        };
        *self.inner.grant.lock() = grant.clone();
        Ok(grant)
    }

    /// The file's attributes now.
    ///
    /// # Errors
    /// As any request.
    pub async fn attributes_now(&self) -> Result<Attributes> {
        self.inner.session.attributes_of(Request::GetAttributes(Target::Open(self.inner.id))).await
    }

    /// Changes attributes and returns the new ones.
    ///
    /// # Errors
    /// As any request.
    pub async fn set_attributes(&self, changes: &Changes) -> Result<Attributes> {
        let target = Target::Open(self.inner.id);
        self.inner.session.attributes_of(Request::SetAttributes(changes.of(target))).await
    }

    /// Closes the open and all its handles, for every clone and binding.
    ///
    /// # Errors
    /// As any request.
    pub async fn close(&self) -> Result<()> {
        let Some(claim) = Claim::take(&self.inner.closed) else { return Ok(()) };
        match self.inner.session.call_and(Request::Close(self.inner.id), || claim.keep()).await? {
            Reply::Done => Ok(()),
            _ => Err(unexpected("close")),
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        if !*self.closed.get_mut() && !self.session.call_and_forget(Request::Close(self.id)) {
            tracing::debug!(open = %self.id, "dropped without a close; the server closes it with the session");
        }
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
