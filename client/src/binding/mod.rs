//! [`Binding`]: a handle of an open on one channel; reads, writes and flushes go through it.
//!
//! | file | holds |
//! |---|---|
//! | `mod` | the handle: bound, looked at, given back |
//! | `seat` | what it is on one connection, and how a piece goes out there |
//! | `io` | reads and writes |
//! | `flush` | flushes |
//!
//! ```text
//!   Binding ── seat (swapped when bound again) ──► Seat: number and keys on one connection ──► channel
//!      │                                                                                   │
//!      └── InFlight: the request, and what it takes to make it again ◄── answer, or none ──┘
//! ```

mod flush;
mod io;
mod seat;

pub(crate) use io::whole;
pub(crate) use seat::{Seat, UnderWay};

use crate::bind::BindingCore;
use crate::channel::DataChannel;
use crate::channel::home::Home;
use crate::channel::request::{Purpose, Request};
use crate::claim::Claim;
use crate::error::Result;
use crate::handed::HandedFile;
use crate::open::Open;
use crate::recovery::Patience;
use crate::recovery::rebind::{self, Trials};
use arc_swap::ArcSwap;
use holdfast_shared::auth::MacPolicy;
use holdfast_shared::types::{Access, HandleId, Status};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// A live handle of an [`Open`] on one [`DataChannel`]. Cheap to clone; all clones are the same handle. It keeps its
/// open and its channel alive.
///
/// When its channel ends, or the server fences it, the next request (or one under way) binds again, with a new handle, and is
/// made again: reads always; writes unless the open was resumed meanwhile and the file found changed. While the open stays
/// active (its data plane alone went away) there is no verdict: a write that is made again may come after one that another
/// open, which shares the file, made meanwhile, as of two writes without a lock either may be the last. Requests wait for all
/// that, as [`crate::Config::recovery`] says.
///
/// [`Binding::unbind`] waits for the server's word; dropping the last clone gives the handle back without waiting.
///
/// ```no_run
/// # async fn example(open: holdfast_client::Open) -> holdfast_client::Result<()> {
/// use holdfast_client::{Region, Transport};
/// let channel = open.connect(Transport::Auto).await?;
/// let binding = open.bind(&channel).await?;
/// let region = Region::allocate(1 << 20)?;
/// let count = binding.read_at(&region, 0..1 << 20, 0).await?;
/// println!("{count} bytes are in the region");
/// # Ok(()) }
/// ```
#[derive(Clone)]
pub struct Binding {
    inner: Arc<Inner>,
}

pub(crate) struct Inner {
    pub(crate) seat: ArcSwap<Seat>,
    /// That of the first seat: as long as the file itself is read by it, no read needs to ask which seat there is now.
    first: Arc<BindingCore>,
    pub(crate) home: Arc<Home>,
    /// Kept alive; `None` only in tests of the channel alone.
    pub(crate) open: Option<Open>,
    pub(crate) access: Access,
    /// One binds again; the others wait for it.
    pub(crate) rebinding: tokio::sync::Mutex<()>,
    unbound: AtomicBool,
}

impl Drop for Inner {
    fn drop(&mut self) {
        if !*self.unbound.get_mut() {
            let seat = self.seat.load();
            seat.end_hot();
            seat.channel.unbind_later(Arc::clone(&seat.core));
        }
    }
}

impl Inner {
    pub(crate) fn is_unbound(&self) -> bool {
        self.unbound.load(Ordering::Acquire)
    }

    /// The file itself, if the server gave it and nothing has come between since.
    pub(crate) fn handed<'a>(&self, core: &'a BindingCore) -> Option<&'a HandedFile> {
        let file = core.handed()?;
        let over = self.is_unbound() || self.open.as_ref().is_some_and(|open| open.inner.is_closed());
        (!over).then_some(file)
    }

    /// The handle, if the binding is of use.
    pub(crate) fn handle_if_live(&self) -> Option<HandleId> {
        let seat = self.seat.load();
        let live = !self.is_unbound() && seat.core.fenced().is_none() && seat.channel.why_ended().is_none();
        live.then_some(seat.core.handle)
    }

    /// The open was resumed, and these bindings were kept.
    pub(crate) fn resumed(&self, incarnation: u64, kept: &[HandleId]) {
        let seat = self.seat.load();
        if kept.contains(&seat.core.handle) {
            seat.lives_on(incarnation);
        } else {
            // The server has done so already: no request needs to find out.
            seat.core.fence(Status::Fenced);
        }
    }
}

impl Open {
    /// Binds a channel to this open with all access to data that it has. Waits for a server that is away, as the policy says.
    ///
    /// # Errors
    /// [`Status::BadKey`] if the server does not take the key; [`Status::BadProof`] (the channel has ended) if the
    /// server is not the one that issued it.
    pub async fn bind(&self, channel: &DataChannel) -> Result<Binding> {
        // Removing and renaming go through control.
        self.bind_with_access(channel, self.access().intersection(Access::READ | Access::WRITE)).await
    }

    /// Binds with less access than the open has.
    ///
    /// # Errors
    /// As [`Open::bind`].
    pub async fn bind_with_access(&self, channel: &DataChannel, access: Access) -> Result<Binding> {
        let mut patience = Patience::new(self.session().config());
        let seat = rebind::seat(self, &channel.home, access, None, &mut patience).await?;
        let binding = Binding::new(seat, channel, access, Some(self.clone()));
        let mut all = self.inner.bindings.lock();
        // Bounded by what lives.
        all.retain(|binding| binding.strong_count() > 0);
        all.push(Arc::downgrade(&binding.inner));
        Ok(binding)
    }
}

impl Binding {
    pub(crate) fn new(seat: Seat, channel: &DataChannel, access: Access, open: Option<Open>) -> Self {
        let inner = Inner {
            first: Arc::clone(&seat.core),
            seat: ArcSwap::from_pointee(seat),
            home: Arc::clone(&channel.home),
            open,
            access,
            rebinding: tokio::sync::Mutex::default(),
            unbound: AtomicBool::new(false),
        };
        Self { inner: Arc::new(inner) }
    }

    pub(crate) fn seat(&self) -> Arc<Seat> {
        self.inner.seat.load_full()
    }

    pub(crate) fn open(&self) -> Option<&Open> {
        self.inner.open.as_ref()
    }

    pub(crate) async fn replace(&self, trials: &mut Trials, open: &Open, failed: &Arc<Seat>) -> Result<()> {
        trials.replace(&self.inner, open, failed).await
    }

    /// This handle's volatile id: another one when it was bound again.
    pub fn handle(&self) -> HandleId {
        self.inner.seat.load().core.handle
    }

    /// The binding's fencing epoch.
    pub fn epoch(&self) -> u64 {
        self.inner.seat.load().core.epoch
    }

    /// The access granted.
    pub fn access(&self) -> Access {
        self.inner.seat.load().core.access
    }

    /// What protects its frames.
    pub fn policy(&self) -> MacPolicy {
        self.inner.seat.load().core.policy
    }

    /// Changes when what was written and not flushed may be lost. [`Binding::flush`] compares it by itself.
    pub fn verifier(&self) -> u64 {
        self.inner.seat.load().core.verifier
    }

    /// Why the server fenced it, if it did and no request has bound it again since.
    pub fn fenced(&self) -> Option<Status> {
        self.inner.seat.load().core.fenced()
    }

    /// Longest piece one request moves, bytes.
    pub fn piece_max(&self) -> usize {
        self.inner.seat.load().piece_max()
    }

    /// Gives the handle back, for every clone. Requests under way should have been answered before.
    ///
    /// # Errors
    /// What the server refuses.
    pub async fn unbind(&self) -> Result<()> {
        let Some(claim) = Claim::take(&self.inner.unbound) else { return Ok(()) };
        let seat = self.inner.seat.load_full();
        let outcome = match seat.channel.submit(Some(&seat.core), Request::Unbind, Purpose::Unbind).await {
            Ok(reply) => {
                claim.keep();
                // The server withdraws with the binding what was mapped of it.
                seat.end_hot();
                reply.count().await.map(drop)
            }
            Err(error) => Err(error),
        };
        match outcome {
            // There is nothing to give back any more.
            Err(error) if self.inner.open.is_some() && rebind::is_wanted(&error) => Ok(()),
            outcome => outcome,
        }
    }
}

impl std::fmt::Debug for Binding {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Binding")
            .field("handle", &self.handle())
            .field("epoch", &self.epoch())
            .finish_non_exhaustive()
    }
}
