//! [`Binding`]: a handle of an open on one channel; reads, writes and flushes go through it.
//!
//! ```text
//!   Binding ── seat (swapped when bound again) ──► Seat: number and keys on one connection ──► channel
//!      │                                                                                   │
//!      └── InFlight: the request, and what it takes to make it again ◄── answer, or none ──┘
//! ```

use crate::Region;
use crate::bind::BindingCore;
use crate::channel::home::Home;
use crate::channel::request::{Bounce, Fetched, Purpose, Request, Source};
use crate::channel::{DataChannel, InFlight, Reply, Shared};
use crate::claim::Claim;
use crate::direct::{DirectFile, Now};
use crate::error::{Error, Result};
use crate::open::Open;
use crate::recovery::Patience;
use crate::recovery::rebind::{self, Trials};
use crate::recovery::reissue::{Again, Piece};
use arc_swap::ArcSwap;
use holdfast_shared::auth::MacPolicy;
use holdfast_shared::types::{Access, ByteRange, HandleId, RegionDescriptor, Status};
use holdfast_transport::Registration;
use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Smallest bounce region.
const BOUNCE_MIN: usize = 64 << 10;
/// Pieces of one long read or write in flight at once.
const PIECES_MAX: usize = 16;

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
    pub(crate) home: Arc<Home>,
    /// Kept alive; `None` only in tests of the channel alone.
    pub(crate) open: Option<Open>,
    pub(crate) access: Access,
    /// One binds again; the others wait for it.
    pub(crate) rebinding: tokio::sync::Mutex<()>,
    unbound: AtomicBool,
}

/// A binding as one connection knows it.
pub(crate) struct Seat {
    pub(crate) core: Arc<BindingCore>,
    pub(crate) channel: Arc<Shared>,
    /// The open's last resume that it is known to have lived through.
    incarnation: AtomicU64,
}

impl Drop for Inner {
    fn drop(&mut self) {
        if !*self.unbound.get_mut() {
            let seat = self.seat.load();
            seat.channel.unbind_later(Arc::clone(&seat.core));
        }
    }
}

impl Inner {
    pub(crate) fn is_unbound(&self) -> bool {
        self.unbound.load(Ordering::Acquire)
    }

    /// The file itself, if the server gave it and nothing has come between since.
    pub(crate) fn direct<'a>(&self, seat: &'a Seat) -> Option<&'a DirectFile> {
        let file = seat.core.direct()?;
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
            seat.incarnation.fetch_max(incarnation, Ordering::AcqRel);
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

impl Seat {
    pub(crate) fn new(core: Arc<BindingCore>, channel: Arc<Shared>, incarnation: u64) -> Self {
        Self { core, channel, incarnation: AtomicU64::new(incarnation) }
    }

    /// True if requests of this seat, whose answers will not come, may still be carried out. `instance`: the data plane that is
    /// there now; `incarnation`: how often the open was resumed.
    pub(crate) fn may_still_write(&self, instance: &[u8; 16], incarnation: u64) -> bool {
        self.core.access.contains(Access::WRITE)
            && self.channel.why_ended().is_some()
            && self.core.has_unanswered_write()
            && self.channel.facts.instance == *instance
            && self.core.fenced().is_none()
            && self.incarnation.load(Ordering::Acquire) == incarnation
    }

    /// Longest piece one request moves, bytes.
    pub(crate) fn piece_max(&self) -> usize {
        self.channel.piece_max(self.core.policy.covers_payload())
    }

    /// Puts one piece in flight; a write only if it is admitted when its turn has come. `prompt`: as for
    /// [`Shared::submit_if`].
    pub(crate) async fn submit(
        &self,
        piece: &Piece,
        prompt: bool,
        admits: &(dyn Fn() -> Result<()> + Sync),
    ) -> Result<Reply> {
        let length =
            u32::try_from(piece.length).map_err(|_| Error::Internal("a checked piece is too long"))?;
        if piece.write {
            self.write(piece, length, prompt, admits).await
        } else {
            self.read(piece, length, prompt).await
        }
    }

    async fn read(&self, piece: &Piece, length: u32, prompt: bool) -> Result<Reply> {
        let (channel, region) = (&self.channel, &piece.region);
        let registration = region.registration(channel)?;
        let remote = part(&registration, piece.start, length)?;
        let purpose =
            Purpose::Read { region: region.clone(), start: piece.start, length, _registration: registration };
        let request = Request::Read { offset: piece.offset, remote };
        channel.submit_if(Some(&self.core), request, purpose, prompt, &|| Ok(())).await
    }

    async fn write(
        &self,
        piece: &Piece,
        length: u32,
        prompt: bool,
        admits: &(dyn Fn() -> Result<()> + Sync),
    ) -> Result<Reply> {
        let (channel, region, start) = (&self.channel, &piece.region, piece.start);
        let bounce;
        let (source, fetched) = if piece.length <= channel.inline_max() {
            (Source::Inline { region, start }, Fetched::Inline)
        } else if self.core.policy == MacPolicy::Sealed {
            let taken = take_bounce(channel, piece.length).await?;
            bounce = taken.region.clone();
            let remote = part(&taken.registration, 0, length)?;
            (Source::Bounced { region, start, bounce: &bounce, remote }, Fetched::Bounce { _bounce: taken })
        } else {
            let registration = region.registration(channel)?;
            let remote = part(&registration, start, length)?;
            (Source::Fetch { region, start, remote }, Fetched::Region { _registration: registration })
        };
        let request = Request::Write { offset: piece.offset, length, source };
        let purpose = Purpose::Write { length, _fetched: fetched };
        channel.submit_if(Some(&self.core), request, purpose, prompt, admits).await
    }
}

impl Binding {
    pub(crate) fn new(seat: Seat, channel: &DataChannel, access: Access, open: Option<Open>) -> Self {
        let inner = Inner {
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

    /// Puts one read in flight: the server places file bytes from `file_offset` on into `range` of the region.
    /// Returns when it is submitted; the bytes are there when the returned future resolves, to how many.
    ///
    /// # Errors
    /// [`Error::Usage`] for a range outside of the region or longer than [`Binding::piece_max`].
    pub async fn submit_read(
        &self,
        region: &Region,
        range: Range<usize>,
        file_offset: u64,
    ) -> Result<InFlight> {
        self.submit(region, range, file_offset, false, false).await
    }

    /// Puts one write in flight: the bytes of `range` go to the file from `file_offset` on. The server fetches them, and
    /// they may be needed again: they must stay as they are until the future resolves.
    ///
    /// # Errors
    /// As [`Binding::submit_read`].
    pub async fn submit_write(
        &self,
        region: &Region,
        range: Range<usize>,
        file_offset: u64,
    ) -> Result<InFlight> {
        self.submit(region, range, file_offset, true, false).await
    }

    async fn submit(
        &self,
        region: &Region,
        range: Range<usize>,
        file_offset: u64,
        write: bool,
        prompt: bool,
    ) -> Result<InFlight> {
        let inner = &self.inner;
        // Shut while the file is found changed, or the open is over.
        let begun = inner.open.as_ref().map_or(Ok(0), |open| open.inner.gate.check())?;
        let seat = inner.seat.load_full();
        let length = region.check(&range)?;
        ByteRange::new(file_offset, length as u64).map_err(|error| Error::Usage(error.to_string()))?;
        if length == 0 {
            return Ok(InFlight::done(0));
        }
        if length > seat.piece_max() {
            let max = seat.piece_max();
            return Err(Error::Usage(format!("{length} bytes are more than one request moves ({max})")));
        }
        if let (false, Some(file)) = (write, inner.direct(&seat)) {
            match file.read_now(region, range.clone(), file_offset) {
                Now::Done(count) => {
                    file.let_others_run(count).await;
                    return Ok(InFlight::done(count));
                }
                Now::Rest(done) => {
                    let piece = Piece {
                        region: region.clone(),
                        start: range.start,
                        length,
                        offset: file_offset,
                        write,
                    };
                    let waiting = file.read_rest(region, range, file_offset, done);
                    let again = Again { binding: Arc::clone(inner), seat, piece, begun };
                    return Ok(InFlight::direct(waiting, again));
                }
                Now::Failed => {}
            }
        }
        let piece = Piece { region: region.clone(), start: range.start, length, offset: file_offset, write };
        // Again when its turn has come: it may have waited long.
        let admits = || match inner.open.as_ref().map(|open| open.inner.gate.check()) {
            Some(Ok(now)) if now != begun => Err(Error::Changed),
            Some(Err(error)) => Err(error),
            _ => Ok(()),
        };
        let submitted = seat.submit(&piece, prompt, &admits).await;
        let again = Again { binding: Arc::clone(inner), seat, piece, begun };
        match submitted {
            Ok(reply) => Ok(InFlight::new(reply, again)),
            Err(error) if again.is_wanted(&error) => Ok(InFlight::unsent(again)),
            Err(error) => Err(error),
        }
    }

    /// Reads file bytes from `file_offset` on into `range`; long ranges are split, and the pieces pipelined.
    /// Returns how many bytes were read: fewer than asked for at the end of the file, 0 beyond it. When it returns, also
    /// with an error, nothing of it is under way; a call that is dropped may leave requests behind that still do.
    ///
    /// # Errors
    /// As [`Binding::submit_read`]; and what the server refuses.
    pub async fn read_at(&self, region: &Region, range: Range<usize>, file_offset: u64) -> Result<usize> {
        let seat = self.inner.seat.load();
        if let Some(file) = self.inner.direct(&seat) {
            if let Some(count) = self.read_cached(file, region, &range, file_offset) {
                file.let_others_run(count).await;
                return Ok(count);
            }
        }
        drop(seat);
        self.in_pieces(region, range, file_offset, false).await
    }

    /// The shortest way: all of a range that is in the page cache, read from the file itself. Anything unusual is not for it.
    fn read_cached(
        &self,
        file: &DirectFile,
        region: &Region,
        range: &Range<usize>,
        file_offset: u64,
    ) -> Option<usize> {
        self.inner.open.as_ref().map_or(Ok(0), |open| open.inner.gate.check()).ok()?;
        let length = region.check(range).ok()?;
        ByteRange::new(file_offset, length as u64).ok()?;
        match file.read_now(region, range.clone(), file_offset) {
            Now::Done(count) => Some(count),
            Now::Rest(_) | Now::Failed => None,
        }
    }

    /// Writes the bytes of `range` to the file from `file_offset` on; long ranges are split, and the pieces pipelined.
    /// Returns how many leading bytes were written.
    ///
    /// # Errors
    /// As [`Binding::submit_write`]; and what the server refuses.
    pub async fn write_at(&self, region: &Region, range: Range<usize>, file_offset: u64) -> Result<usize> {
        self.in_pieces(region, range, file_offset, true).await
    }

    async fn in_pieces(&self, region: &Region, range: Range<usize>, at: u64, write: bool) -> Result<usize> {
        let length = region.check(&range)?;
        ByteRange::new(at, length as u64).map_err(|error| Error::Usage(error.to_string()))?;
        let submit = async |start: usize, prompt: bool| loop {
            let part = start..range.end.min(start + self.piece_max());
            let (wanted, offset) = (part.len(), at + (start - range.start) as u64);
            match self.submit(region, part, offset, write, prompt).await {
                // Bound again this very moment, to a server that takes less at once.
                Err(Error::Usage(_)) if wanted > self.piece_max() => {}
                submitted => return Ok::<_, Error>((wanted, submitted?)),
            }
        };
        if length <= self.piece_max() {
            let (wanted, request) = submit(range.start, true).await?;
            if wanted == length {
                return request.await;
            }
            let _ = request.await;
        }
        let mut in_flight = VecDeque::with_capacity(PIECES_MAX);
        let moved = async {
            let (mut next, mut total) = (range.start, 0);
            loop {
                while next < range.end && in_flight.len() < PIECES_MAX {
                    let (wanted, request) = submit(next, false).await?;
                    in_flight.push_back((wanted, request));
                    next += wanted;
                }
                let Some((wanted, request)) = in_flight.pop_front() else { return Ok(total) };
                let count = request.await?;
                total += count;
                if count < wanted {
                    return Ok(total);
                }
            }
        }
        .await;
        // Nothing behind a short or failed piece counts; but the region is the caller's again only when all is answered.
        for (_, request) in in_flight {
            let _ = request.await;
        }
        moved
    }

    /// Writes all of `range`, or fails.
    ///
    /// # Errors
    /// As [`Binding::write_at`]; [`Status::NoSpace`] if the server takes no more.
    pub async fn write_all(&self, region: &Region, range: Range<usize>, file_offset: u64) -> Result<()> {
        let mut done = 0;
        while done < range.len() {
            let rest = range.start + done..range.end;
            match self.write_at(region, rest, file_offset + done as u64).await? {
                0 => return Err(Error::refused(Status::NoSpace)),
                count => done += count,
            }
        }
        Ok(())
    }

    /// Reads up to `length` bytes from `file_offset` on into a vector of their own. For small reads: it makes a region
    /// each time, and copies.
    ///
    /// # Errors
    /// As [`Binding::read_at`].
    pub async fn read_vec(&self, file_offset: u64, length: usize) -> Result<Vec<u8>> {
        if length == 0 {
            return Ok(Vec::new());
        }
        let region = Region::allocate(length)?;
        let count = self.read_at(&region, 0..length, file_offset).await?;
        let mut bytes = vec![0; count];
        region.copy_out(0, &mut bytes)?;
        Ok(bytes)
    }

    /// Makes the writes acknowledged so far durable, with all attributes: those of every binding of the open, also if
    /// a process of the server was restarted since.
    ///
    /// # Errors
    /// [`Error::WritesLost`] if the server's host was restarted since some of them were made; every flush fails so until
    /// [`Open::accept_lost_writes`]. And what the server refuses: after [`Status::Io`] and [`Status::NoSpace`] the storage
    /// has not taken them, and later flushes fail as [`Error::WritesLost`] too.
    ///
    /// A flush whose answer was lost is made again, and its success is believed. Only if the storage failed in the very flush
    /// during which the data plane went away is that too much: its failure was told to nobody.
    pub async fn flush(&self) -> Result<()> {
        self.flush_as(false).await
    }

    /// As [`Binding::flush`], for the data and the size alone (`fdatasync`).
    ///
    /// # Errors
    /// As [`Binding::flush`].
    pub async fn flush_data(&self) -> Result<()> {
        self.flush_as(true).await
    }

    async fn flush_as(&self, data_only: bool) -> Result<()> {
        let mut trials = None;
        loop {
            let seat = self.seat();
            match (self.flush_once(&seat, data_only).await, &self.inner.open) {
                (Err(error), Some(open)) if rebind::is_wanted(&error) => {
                    let trials = trials.get_or_insert_with(|| Trials::new(open));
                    trials.replace(&self.inner, open, &seat).await?;
                }
                (outcome, _) => return outcome,
            }
        }
    }

    /// One flush on this seat, whatever becomes of it.
    pub(crate) async fn flush_once(&self, seat: &Arc<Seat>, data_only: bool) -> Result<()> {
        let number = match self.open() {
            Some(open) => {
                open.inner.gate.check()?;
                open.inner.durable.begin()?
            }
            None => 0,
        };
        let submitted =
            seat.channel.submit(Some(&seat.core), Request::Flush { data_only }, Purpose::Flush).await;
        let outcome = match submitted {
            Ok(reply) => reply.count().await.map(drop),
            Err(error) => Err(error),
        };
        let Some(open) = self.open() else { return outcome };
        match outcome {
            Ok(()) => open.inner.durable.done(number),
            Err(error) => {
                // The kernel tells a failed write-back once, and forgets the bytes: a later flush would succeed.
                let failed = matches!(error.status(), Some(Status::Io | Status::NoSpace));
                if !rebind::is_wanted(&error) && (failed || matches!(error, Error::WritesLost)) {
                    open.inner.durable.lose();
                }
                Err(error)
            }
        }
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

fn part(registration: &Registration, start: usize, length: u32) -> Result<RegionDescriptor> {
    u32::try_from(start)
        .ok()
        .and_then(|start| registration.descriptor().part(start, length))
        .ok_or(Error::Internal("a checked range lies outside of its registration"))
}

/// A bounce region of the channel for `length` bytes: an idle one that is large enough, or a new one in its place.
async fn take_bounce(channel: &Arc<Shared>, length: usize) -> Result<Bounce> {
    let place = Arc::clone(&channel.bounces).acquire_owned().await.map_err(|_| channel.ended())?;
    let idle = channel.idle_bounces.lock().pop();
    let region = match idle.filter(|region| region.len() >= length) {
        Some(region) => region,
        // Rounded up, so that a channel soon has what it needs.
        None => Region::allocate(length.max(BOUNCE_MIN).next_power_of_two())?,
    };
    let registration = region.registration(channel)?;
    Ok(Bounce { region, registration, home: Arc::clone(&channel.idle_bounces), _place: place })
}

impl std::fmt::Debug for Binding {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Binding")
            .field("handle", &self.handle())
            .field("epoch", &self.epoch())
            .finish_non_exhaustive()
    }
}
