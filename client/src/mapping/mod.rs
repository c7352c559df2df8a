//! [`Mapping`]: a range of a file that this client reads by itself, with no work for the server.
//!
//! ```text
//!   Binding::map ── lane: a queue pair of the mapping's own ── Map on the channel ──► address and key
//!   Mapping::read_at ── RDMA READ over the lane ──► Region          the server's device answers, no process of it
//!        │
//!        └─► MappingLost once the server has withdrawn it: read through the binding, or map again
//! ```
//!
//! A refused read ends its queue pair at both ends. That is why a mapping has its own: the channel, and every other mapping,
//! go on.

mod lane;

use crate::Region;
use crate::bind::BindingCore;
use crate::binding::Binding;
use crate::channel::Shared;
use crate::channel::request::{Done, Granted, Purpose, Request};
use crate::claim::Claim;
use crate::error::{Error, Result};
use crate::recovery::rebind::{self, Trials};
use crate::recovery::{Backoff, Patience};
use holdfast_shared::types::{ByteRange, Status};
pub(crate) use lane::Reading;
use lane::{Reads, Watch};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::sync::oneshot;

/// Bytes of a file that are read one-sided: over verbs, and with a server that has it switched on. Cheap to clone; all clones
/// are the same mapping. It keeps its binding, and so its open, alive.
///
/// What is read is the file's page cache: writes that others make through the server, or on its host (but not past the page
/// cache, with `O_DIRECT`), are seen at once, and a read that overlaps one may see a part of it. The server withdraws a mapping before it lets anything happen that the
/// client must not see: a conflicting lock, a fence, the end of the open. Then, and if the lane fails, every read is
/// [`Error::MappingLost`]: go on with [`Binding::read_at`], or map again.
///
/// The bytes have no digest and are not sealed, so volumes with such a policy grant no mappings. A file that
/// is cut short *beside* the server is still read here as it was: map only what nobody cuts short there. A change of its size
/// through the server withdraws the mapping first.
///
/// Most applications need none: the library maps by itself what they read over and over ([`crate::OneSided`]). A mapping is for
/// who knows beforehand what that will be.
///
/// [`Mapping::unmap`] waits for the server's word; dropping the last clone gives it back without waiting.
///
/// ```no_run
/// # async fn example(binding: holdfast_client::Binding) -> holdfast_client::Result<()> {
/// use holdfast_client::{Error, Region};
/// let region = Region::allocate(1 << 20)?;
/// let mapping = binding.map(0..64 << 20).await?;
/// let count = match mapping.read_at(&region, 0..4096, 8192).await {
///     // Withdrawn: the binding knows what is going on, or has the bytes.
///     Err(Error::MappingLost) => binding.read_at(&region, 0..4096, 8192).await?,
///     other => other?,
/// };
/// println!("{count} bytes are in the region");
/// # Ok(()) }
/// ```
#[derive(Clone)]
pub struct Mapping {
    inner: Arc<Inner>,
}

struct Inner {
    reads: Reads,
    offset: u64,
    granted: Granted,
    channel: Arc<Shared>,
    core: Arc<BindingCore>,
    /// Kept alive; `None` for those that a binding itself keeps.
    _binding: Option<Binding>,
    unmapped: AtomicBool,
    /// Dropped with the mapping: the driver ends.
    _driver: oneshot::Sender<()>,
}

/// How often a mapping that the application wants is tried again when those that the library has made were in its way, and how long
/// one of these may take to be given back.
const ROOM_TRIALS: u32 = 4;
const ROOM_PAUSE: Duration = Duration::from_millis(20);

impl Binding {
    /// Maps a range of the file for one-sided reads; what lies beyond the file's end is left out. The server pins all of it
    /// in memory, which takes time for much, and counts it against the limits of this client's channel. Waits while the file's
    /// size is being changed, as the policy for waiting says.
    ///
    /// # Errors
    /// [`Status::Unsupported`] if the channel is not verbs, the server has it switched off, the volume's policy covers
    /// payloads, or the server's kernel can't do it with this file; [`Status::BadRange`] if nothing of the range is in the
    /// file; [`Status::TooMany`] at a limit; [`Status::LockConflict`] if others have locked a byte of it against reading.
    pub async fn map(&self, range: Range<u64>) -> Result<Mapping> {
        let length = range.end.saturating_sub(range.start);
        ByteRange::new(range.start, length).map_err(|error| Error::Usage(error.to_string()))?;
        if length == 0 {
            return Err(Error::Usage("a mapping of no bytes".into()));
        }
        let open = self.open().ok_or(Error::Internal("a binding without an open"))?;
        let config = open.session().config();
        let (wait, mut patience, mut backoff) =
            (config.connect_max(), Patience::new(config), Backoff::control());
        let (mut trials, mut room, mut in_the_way) = (None, 0, false);
        loop {
            open.inner.gate.check()?;
            let seat = self.seat();
            let one = Some(self.clone());
            match map(&seat.channel, &seat.core, wait, range.start, length, one).await {
                Err(error) if rebind::is_wanted(&error) => {
                    let trials = trials.get_or_insert_with(|| Trials::new(open));
                    self.replace(trials, open, &seat).await?;
                }
                // The file's size is being changed: nothing of it is mapped before that has ended.
                Err(error) if error.status() == Some(Status::Unavailable) => {
                    patience.pause("a mapping", backoff.next()).await?;
                }
                // What the library has mapped by itself is not in the application's way.
                Err(error) if error.status() == Some(Status::TooMany) && room < ROOM_TRIALS => {
                    let (mappings, soon) = seat.channel.make_room();
                    in_the_way |= soon || !mappings.is_empty();
                    // Once more in any case: others may be giving some back at this moment.
                    if !in_the_way && room > 0 {
                        return Err(error);
                    }
                    room += 1;
                    if mappings.is_empty() {
                        tokio::time::sleep(ROOM_PAUSE).await;
                    }
                    for mapping in mappings {
                        let _ = mapping.unmap().await;
                    }
                }
                outcome => return outcome,
            }
        }
    }
}

/// Has a range mapped on one connection.
pub(crate) async fn map(
    channel: &Arc<Shared>,
    core: &Arc<BindingCore>,
    wait: Duration,
    offset: u64,
    length: u64,
    binding: Option<Binding>,
) -> Result<Mapping> {
    if channel.facts.mappings_max == 0 {
        return Err(Error::refused(Status::Unsupported));
    }
    let lane = lane::connect(channel, wait).await?;
    let watch = Watch::new(&lane)?;
    let request = Request::Map { offset, length, lane: lane.end() };
    let reply = channel.submit(Some(core), request, Purpose::Map { length }).await?;
    let Done::Mapped(granted) = reply.outcome().await? else {
        return Err(Error::Internal("a map was answered as a read"));
    };
    let (stop, stopped) = oneshot::channel();
    let inner = Arc::new(Inner {
        reads: Reads::new(lane),
        offset,
        granted,
        channel: Arc::clone(channel),
        core: Arc::clone(core),
        _binding: binding,
        unmapped: AtomicBool::new(false),
        _driver: stop,
    });
    watch.drive(&inner, stopped);
    Ok(Mapping { inner })
}

impl Mapping {
    /// Where in the file it begins, bytes.
    pub fn offset(&self) -> u64 {
        self.inner.offset
    }

    /// Bytes from there on: fewer than asked for if the file ended before.
    #[allow(clippy::len_without_is_empty)] // never empty
    pub fn len(&self) -> u64 {
        self.inner.granted.length
    }

    /// False once it is known that no read can succeed any more.
    pub fn is_live(&self) -> bool {
        self.inner.is_live() && !self.inner.reads.has_ended()
    }

    /// Reads file bytes from `file_offset` on into `range` of the region. Returns how many: fewer than asked for at
    /// the mapping's end, 0 beyond it. Long reads go in pieces, one after the other. A call that is dropped may leave a read
    /// behind that still fills the region.
    ///
    /// # Errors
    /// [`Error::MappingLost`]: bytes of the range may have been filled, and are not to be used. [`Error::Usage`] for a range
    /// outside of the region, or an offset before the mapping.
    pub async fn read_at(&self, region: &Region, range: Range<usize>, file_offset: u64) -> Result<usize> {
        let inner = &self.inner;
        let wanted = region.check(&range)?;
        let Some(skip) = file_offset.checked_sub(inner.offset) else {
            let text = format!("byte {file_offset} is before the mapping, which begins at {}", inner.offset);
            return Err(Error::Usage(text));
        };
        let there = usize::try_from(inner.granted.length.saturating_sub(skip)).unwrap_or(usize::MAX);
        let count = wanted.min(there);
        if count == 0 {
            return Ok(0);
        }
        let registration = region.registration(&inner.channel)?;
        let mut done = 0;
        while done < count {
            let piece = (count - done).min(inner.reads.read_bytes_max);
            let start = range.start + done;
            // Within what was granted, whose end does not overflow.
            let address = inner.granted.address + skip + done as u64;
            inner.read(&registration, start..start + piece, address).await?.finish().await?;
            done += piece;
        }
        Ok(count)
    }

    /// Puts one read of all of `range` in flight; `None` if that does not go at once, or not in one piece. `spin`: as for
    /// [`Reading`]. It must lie within the mapping.
    pub(crate) fn begin(
        &self,
        region: &Region,
        range: Range<usize>,
        file_offset: u64,
        spin: bool,
    ) -> Result<Option<Reading>> {
        let inner = &self.inner;
        let length = range.len() as u64;
        let skip = file_offset.checked_sub(inner.offset);
        let skip = skip.filter(|skip| skip.checked_add(length).is_some_and(|end| end <= self.len()));
        let skip = skip.ok_or(Error::Internal("a read outside of its mapping"))?;
        if range.len() > inner.reads.read_bytes_max {
            return Ok(None);
        }
        let registration = region.registration(&inner.channel)?;
        inner.try_read(&registration, range, inner.granted.address + skip, spin)
    }

    /// Cuts the device off: no read that is under way touches a region after this.
    pub(crate) fn cut(&self) {
        self.leave();
        self.inner.reads.close();
    }

    /// It ends with its binding, which is being given back: the server withdraws it then, and need not be asked to.
    pub(crate) fn leave(&self) {
        self.inner.unmapped.store(true, Ordering::Release);
    }

    /// Gives it back, for every clone: when this returns the server has withdrawn it.
    ///
    /// # Errors
    /// What the server refuses; none if the binding or its channel has ended: then the mapping has, too.
    pub async fn unmap(&self) -> Result<()> {
        let inner = &*self.inner;
        let Some(claim) = Claim::take(&inner.unmapped) else { return Ok(()) };
        let request = Request::Unmap { mapping: inner.granted.mapping };
        let outcome = match inner.channel.submit(Some(&inner.core), request, Purpose::Unmap).await {
            Ok(reply) => {
                claim.keep();
                reply.count().await.map(drop)
            }
            Err(error) => Err(error),
        };
        inner.reads.close();
        match outcome {
            Err(error) if rebind::is_wanted(&error) => Ok(()),
            outcome => outcome,
        }
    }
}

impl Inner {
    fn is_live(&self) -> bool {
        !self.unmapped.load(Ordering::Acquire) && self.core.fenced().is_none() && !self.core.has_ended()
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        if !*self.unmapped.get_mut() {
            self.channel.unmap_later(Arc::clone(&self.core), self.granted.mapping);
        }
    }
}

impl std::fmt::Debug for Mapping {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Mapping")
            .field("offset", &self.offset())
            .field("len", &self.len())
            .finish_non_exhaustive()
    }
}
