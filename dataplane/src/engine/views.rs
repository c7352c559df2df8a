//! Files that are mapped, so that long reads over tcp are sent from there: no buffer, and one copy instead of two.
//!
//! ```text
//!   piece of a long read ─► its extent: mapped already, or now, if there is room ─► all pages in memory? ── yes ─► Place
//!                                 │ no room                                            │ no: a hole, or still on the disk
//!                                 └─────────► the rest of it the usual way ◄───────────┘ (`transfer`), whose threads may wait
//! ```
//!
//! Each worker has its own, and its part of what may be mapped: that bounds the page tables, which take a five-hundredth of it. An
//! extent is let go with its binding, or for another one, once nobody has read it for a while.
//!
//! The kernel copies the bytes when the socket takes them, which may be after the read was answered: fences and new rules wait for that
//! (`file_places_ended`), and so only a little of it is begun at once.
//!
//! **Why what is sent is true.** A mapping shows what the file has, as `read` does, on the file systems that [`FileIo::view_length`]
//! answers for. A file that is cut short under it is an error of the call that sends, never a signal: the kernel alone touches it.

use super::ConnKey;
use super::backend::FileIo;
use super::binding::{BindingRef, Pins};
use super::channel::{Conn, Cx, Token};
use super::pinned::READ_BYTES_MIN;
use super::pinner::Job;
use super::request::{Request, Step};
use crate::config::EngineConfig;
use crate::gauges::Gauges;
use holdfast_shared::types::Status;
use holdfast_verbs::memory::FileMapping;
use std::collections::HashMap;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

/// What is mapped or let go at once, bytes; extents begin at multiples of it.
const EXTENT_BYTES: u64 = EXTENT as u64;
const EXTENT: usize = 16 << 20;
/// What is placed at once at most, bytes.
const PIECE_BYTES: u64 = 1 << 20;
/// Pieces of a channel that its socket has yet to take, at most: who receives slowly holds up a fence no longer than with buffers.
const UNTAKEN_MAX: u64 = 4;
/// An extent gives way to another only when it was not read for so long. Else a file larger than what may be mapped, read round and
/// round, would be mapped and unmapped all the time.
const IDLE: Duration = Duration::from_secs(1);
/// So far behind the end of a file nothing of it is in memory.
const BEYOND: u64 = 1 << 30;

/// An extent of a binding's file.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    conn: ConnKey,
    binding: BindingRef,
    index: u64,
}

struct View {
    mapping: Arc<FileMapping>,
    used: Instant,
}

/// See the module's text.
pub(crate) struct Views {
    worker: usize,
    bytes_max: u64,
    /// Mapped, and being unmapped.
    bytes: u64,
    views: HashMap<Key, View>,
    jobs: Sender<Job>,
    gauges: Arc<Gauges>,
}

impl Views {
    /// `None` if a worker's part is not even one extent.
    pub(crate) fn new(
        worker: usize,
        config: &EngineConfig,
        jobs: Sender<Job>,
        gauges: Arc<Gauges>,
    ) -> Option<Self> {
        let bytes_max = (config.viewed_bytes_max / config.worker_count()) as u64;
        let views = HashMap::new();
        (bytes_max >= EXTENT_BYTES).then_some(Self { worker, bytes_max, bytes: 0, views, jobs, gauges })
    }

    /// True if the kernel tells which pages of a file of this length are in memory.
    ///
    /// # Errors
    /// The kernel's.
    fn may_view(file: &dyn FileIo, length: u64) -> io::Result<bool> {
        FileMapping::is_honest(file.descriptor(), length.saturating_add(BEYOND))
    }

    /// That range of the file, which lies within an extent, if it can be mapped and is in memory: the mapping, and where it is in that.
    fn resident(
        &mut self,
        (conn, binding): (ConnKey, BindingRef),
        file: &dyn FileIo,
        (offset, length): (u64, u64),
        now: Instant,
    ) -> Option<(&Arc<FileMapping>, Range<usize>)> {
        let mapping = self.map(Key { conn, binding, index: offset / EXTENT_BYTES }, file, now)?;
        let start = usize::try_from(offset % EXTENT_BYTES).ok()?;
        let range = start..start + usize::try_from(length).ok()?;
        mapping.is_resident(range.clone()).is_ok_and(|resident| resident).then_some((mapping, range))
    }

    /// A binding lets its file go.
    pub(crate) fn leave(&mut self, conn: ConnKey, binding: BindingRef) {
        let is_its = |key: &&Key| key.conn == conn && key.binding == binding;
        let keys: Vec<Key> = self.views.keys().filter(is_its).copied().collect();
        let gone = keys.iter().filter_map(|key| self.views.remove(key)).map(|view| view.mapping).collect();
        self.let_go(gone);
    }

    /// The pinner's thread has unmapped so many bytes.
    pub(crate) fn unmapped(&mut self, bytes: u64) {
        self.bytes = self.bytes.saturating_sub(bytes);
        self.gauges.viewed_file_bytes.sub(bytes);
    }

    fn map(&mut self, key: Key, file: &dyn FileIo, now: Instant) -> Option<&Arc<FileMapping>> {
        if !self.views.contains_key(&key) {
            if self.bytes + EXTENT_BYTES > self.bytes_max {
                self.make_room(now);
                return None;
            }
            // Whole extents: what a file does not have yet it may have later.
            let start = key.index.checked_mul(EXTENT_BYTES)?;
            let mapping = FileMapping::new(file.descriptor(), start, EXTENT).ok()?;
            self.bytes += EXTENT_BYTES;
            self.gauges.viewed_file_bytes.add(EXTENT_BYTES);
            self.views.insert(key, View { mapping: Arc::new(mapping), used: now });
        }
        let view = self.views.get_mut(&key)?;
        view.used = now;
        Some(&view.mapping)
    }

    /// Lets the extent go that was not read for longest, if that is long enough: there is room by the time of a later read.
    fn make_room(&mut self, now: Instant) {
        let oldest = self.views.iter().min_by_key(|(_, view)| view.used);
        let oldest = oldest.filter(|(_, view)| now.saturating_duration_since(view.used) >= IDLE);
        if let Some(view) = oldest.map(|(key, _)| *key).and_then(|key| self.views.remove(&key)) {
            self.let_go(vec![view.mapping]);
        }
    }

    /// Unmapping goes page by page: not on this thread.
    fn let_go(&self, mappings: Vec<Arc<FileMapping>>) {
        if !mappings.is_empty() {
            // The thread ends after the workers: there is always somebody to take them.
            let _ = self.jobs.send(Job::Unmap { worker: self.worker, mappings });
        }
    }
}

impl Conn {
    /// The next piece of a read, for which and for whose reply there is room. `None`: the usual way. `Some(None)`: it was answered.
    #[allow(clippy::option_option)] // as `step_read` has it
    pub(super) fn read_viewed(
        &mut self,
        cx: &mut Cx,
        slot: u16,
        request: &mut Request,
        bytes: &mut usize,
    ) -> Option<Option<Step>> {
        // While new rules wait for what began before, nothing begins that is read later than it is answered.
        if !self.views
            || request.roundabout
            || request.length < READ_BYTES_MIN
            || !self.restricting.is_empty()
        {
            return None;
        }
        let at = request.binding?;
        let binding = self.bindings.get_mut(at)?;
        // What has a digest, or is sealed, passes the processor anyway.
        if binding.pins == Pins::Never || binding.policy.covers_payload() {
            return None;
        }
        if self.file_places_begun - self.file_places_ended >= UNTAKEN_MAX {
            return Some(Some(Step::NoRoom));
        }
        // Until it has been placed.
        request.roundabout = true;
        let file = Arc::clone(binding.file.as_ref()?);
        let there = file.view_length().ok().flatten();
        if there.is_none() || binding.pins == Pins::Unknown {
            let may = there.is_some_and(|there| Views::may_view(&*file, there).is_ok_and(|may| may));
            binding.pins = if may { Pins::Viewed } else { Pins::Never };
        }
        let offset = request.offset + u64::from(request.next);
        let wanted = u64::from(request.length - request.next)
            .min(PIECE_BYTES)
            .min(EXTENT_BYTES - offset % EXTENT_BYTES);
        let count = there?.saturating_sub(offset).min(wanted);
        if binding.pins == Pins::Never || count == 0 {
            return None;
        }
        let views = cx.views.as_mut()?;
        let (view, range) = views.resident((self.key, at), &*file, (offset, count), cx.now)?;
        let remote = request.region.part(request.next, u32::try_from(count).ok()?)?;
        let token = Token::Place { binding: at }.number();
        if let Err(error) = self.transport.place_view(token, view, range, remote) {
            tracing::debug!(peer = %self.peer, %error, "the transport refused a Place");
            self.close(cx);
            return Some(Some(Step::Next));
        }
        request.roundabout = false;
        binding.transport_ops += 1;
        self.file_places_begun += 1;
        self.begun(cx.now, cx.settings.limits.stuck_ms);
        request.next += remote.length();
        *bytes += remote.length() as usize;
        cx.gauges.pieces_viewed_total.add(1);
        if count < wanted || request.next == request.length {
            self.reply(cx, slot, request, Status::Ok, request.next, None);
            return Some(None);
        }
        Some(Some(Step::Again))
    }
}
