//! [`Binding`]: a handle of an open on one channel; reads, writes and flushes go through it.

use crate::Region;
use crate::bind::{self, BindRequest, BindingCore};
use crate::channel::request::{Bounce, Done, Fetched, Purpose, Request, Source};
use crate::channel::{DataChannel, InFlight, Reply, Shared};
use crate::claim::Claim;
use crate::error::{Error, Result};
use crate::open::Open;
use holdfast_shared::auth::MacPolicy;
use holdfast_shared::types::{Access, ByteRange, HandleId, RegionDescriptor, Status};
use holdfast_transport::Registration;
use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

/// Smallest bounce region.
const BOUNCE_MIN: usize = 64 << 10;
/// Pieces of one long read or write in flight at once.
const PIECES_MAX: usize = 16;

/// A live handle of an [`Open`] on one [`DataChannel`]. Cheap to clone; all clones are the same handle. It keeps its
/// open and its channel alive.
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

struct Inner {
    core: Arc<BindingCore>,
    channel: Arc<Shared>,
    /// Kept alive; `None` only in tests of the channel alone.
    _open: Option<Open>,
    unbound: AtomicBool,
}

impl Drop for Inner {
    fn drop(&mut self) {
        if !*self.unbound.get_mut() {
            self.channel.unbind_later(Arc::clone(&self.core));
        }
    }
}

impl Open {
    /// Binds a channel to this open with all access that it has.
    ///
    /// # Errors
    /// [`Status::BadKey`] if the server does not take the key; [`Status::BadProof`] (the channel has ended) if the
    /// server is not the one that issued it.
    pub async fn bind(&self, channel: &DataChannel) -> Result<Binding> {
        self.bind_with_access(channel, self.access()).await
    }

    /// Binds with less access than the open has.
    ///
    /// # Errors
    /// As [`Open::bind`].
    pub async fn bind_with_access(&self, channel: &DataChannel, access: Access) -> Result<Binding> {
        let grant = self.grant();
        let request = BindRequest {
            resume_key: &grant.resume_key,
            open_challenge: &grant.challenge,
            volume: grant.volume,
            policy: grant.policy,
            access,
            secret: self.bind_secret(),
        };
        let core = bind::bind(&channel.shared, &request).await?;
        Ok(Binding::new(core, channel, Some(self.clone())))
    }
}

impl Binding {
    pub(crate) fn new(core: Arc<BindingCore>, channel: &DataChannel, open: Option<Open>) -> Self {
        let channel = Arc::clone(&channel.shared);
        Self { inner: Arc::new(Inner { core, channel, _open: open, unbound: AtomicBool::new(false) }) }
    }

    /// This handle's volatile id.
    pub fn handle(&self) -> HandleId {
        self.inner.core.handle
    }

    /// The binding's fencing epoch.
    pub fn epoch(&self) -> u64 {
        self.inner.core.epoch
    }

    /// The access granted.
    pub fn access(&self) -> Access {
        self.inner.core.access
    }

    /// What protects its frames.
    pub fn policy(&self) -> MacPolicy {
        self.inner.core.policy
    }

    /// Changes when the data plane restarts. A client that binds again and sees another value repeats the writes
    /// that it has not flushed.
    pub fn verifier(&self) -> u64 {
        self.inner.core.verifier
    }

    /// Why the server fenced it, if it did; every further request is refused.
    pub fn fenced(&self) -> Option<Status> {
        self.inner.core.fenced()
    }

    /// Longest piece one request moves, bytes.
    pub fn piece_max(&self) -> usize {
        self.inner.channel.piece_max(self.policy().covers_payload())
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
        let Some(length) = self.check_piece(region, &range, file_offset)? else {
            return Ok(InFlight::nothing());
        };
        let channel = &self.inner.channel;
        let registration = region.registration(channel)?;
        let remote = part(&registration, range.start, length)?;
        let purpose =
            Purpose::Read { region: region.clone(), start: range.start, length, _registration: registration };
        let request = Request::Read { offset: file_offset, remote };
        Ok(InFlight::new(channel.submit(Some(&self.inner.core), request, purpose).await?))
    }

    /// Puts one write in flight: the bytes of `range` go to the file from `file_offset` on. Small ones are copied into
    /// the request; else the server fetches them, and the region must stay as it is until the future resolves.
    ///
    /// # Errors
    /// As [`Binding::submit_read`].
    pub async fn submit_write(
        &self,
        region: &Region,
        range: Range<usize>,
        file_offset: u64,
    ) -> Result<InFlight> {
        let Some(length) = self.check_piece(region, &range, file_offset)? else {
            return Ok(InFlight::nothing());
        };
        let (channel, start) = (&self.inner.channel, range.start);
        let bounce;
        let (source, fetched) = if length as usize <= channel.inline_max() {
            (Source::Inline { region, start }, Fetched::Inline)
        } else if self.policy() == MacPolicy::Sealed {
            let taken = take_bounce(channel, length as usize).await?;
            bounce = taken.region.clone();
            let remote = part(&taken.registration, 0, length)?;
            (Source::Bounced { region, start, bounce: &bounce, remote }, Fetched::Bounce { _bounce: taken })
        } else {
            let registration = region.registration(channel)?;
            let remote = part(&registration, start, length)?;
            (Source::Fetch { region, start, remote }, Fetched::Region { _registration: registration })
        };
        let request = Request::Write { offset: file_offset, length, source };
        let purpose = Purpose::Write { length, _fetched: fetched };
        Ok(InFlight::new(channel.submit(Some(&self.inner.core), request, purpose).await?))
    }

    /// The length of one piece; `None` if it is empty.
    fn check_piece(&self, region: &Region, range: &Range<usize>, file_offset: u64) -> Result<Option<u32>> {
        let length = region.check(range)?;
        ByteRange::new(file_offset, length as u64).map_err(|error| Error::Usage(error.to_string()))?;
        match u32::try_from(length) {
            Ok(0) => Ok(None),
            Ok(length) if length as usize <= self.piece_max() => Ok(Some(length)),
            _ => Err(Error::Usage(format!(
                "{length} bytes are more than one request moves ({})",
                self.piece_max()
            ))),
        }
    }

    /// Reads file bytes from `file_offset` on into `range`; long ranges are split, and the pieces pipelined.
    /// Returns how many bytes were read: fewer than asked for at the end of the file, 0 beyond it. When it returns, also
    /// with an error, nothing of it is under way; a call that is dropped may leave requests behind that still do.
    ///
    /// # Errors
    /// As [`Binding::submit_read`]; and what the server refuses.
    pub async fn read_at(&self, region: &Region, range: Range<usize>, file_offset: u64) -> Result<usize> {
        self.in_pieces(region, range, file_offset, false).await
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
        let (length, piece) = (region.check(&range)?, self.piece_max());
        ByteRange::new(at, length as u64).map_err(|error| Error::Usage(error.to_string()))?;
        let submit = async |start: usize| {
            let part = start..range.end.min(start + piece);
            let (wanted, offset) = (part.len(), at + (start - range.start) as u64);
            let request = if write {
                self.submit_write(region, part, offset).await?
            } else {
                self.submit_read(region, part, offset).await?
            };
            Ok::<_, Error>((wanted, request))
        };
        if length <= piece {
            return submit(range.start).await?.1.await;
        }
        let mut in_flight = VecDeque::with_capacity(PIECES_MAX);
        let moved = async {
            let (mut next, mut total) = (range.start, 0);
            loop {
                while next < range.end && in_flight.len() < PIECES_MAX {
                    in_flight.push_back(submit(next).await?);
                    next += piece;
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

    /// Makes the writes acknowledged so far durable, with all attributes.
    ///
    /// # Errors
    /// [`Error::WritesLost`] if the data plane restarted since the bind; and what the server refuses.
    pub async fn flush(&self) -> Result<()> {
        self.request(Request::Flush { data_only: false }, Purpose::Flush).await
    }

    /// As [`Binding::flush`], for the data and the size alone (`fdatasync`).
    ///
    /// # Errors
    /// As [`Binding::flush`].
    pub async fn flush_data(&self) -> Result<()> {
        self.request(Request::Flush { data_only: true }, Purpose::Flush).await
    }

    /// Gives the handle back, for every clone. Requests under way should have been answered before.
    ///
    /// # Errors
    /// What the server refuses.
    pub async fn unbind(&self) -> Result<()> {
        let Some(claim) = Claim::take(&self.inner.unbound) else { return Ok(()) };
        let (core, unbind) = (&self.inner.core, Request::Unbind);
        let reply = self.inner.channel.submit(Some(core), unbind, Purpose::Unbind).await?;
        claim.keep();
        Self::done(reply).await
    }

    async fn request(&self, request: Request<'_>, purpose: Purpose) -> Result<()> {
        Self::done(self.inner.channel.submit(Some(&self.inner.core), request, purpose).await?).await
    }

    async fn done(reply: Reply) -> Result<()> {
        match reply.outcome().await? {
            Done::Counted(_) => Ok(()),
            Done::Bound(_) => Err(Error::Internal("a flush was answered as a bind")),
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
