//! Files that are mapped, so that long reads over tcp are sent from there: one copy instead of two.
//!
//! ```text
//!   piece of a long read ─► its extent: mapped already, or now, if there is room ─► all pages in memory? ── yes ─► sent, at once
//!                                 │ no room                                            │ no: a hole, or still on the disk    │
//!                                 └─────────► the rest of it the usual way ◄───────────┘ (`transfer`), whose threads may wait │
//!                                                                                                                             ▼
//!                     socket full: the read waits for room, without a buffer ◄── nothing taken ── some taken: the rest from a buffer
//! ```
//!
//! Each worker has its own, and its part of what may be mapped: that bounds the page tables, which take a five-hundredth of it. An
//! extent is let go with its binding, or for another one: that which nobody has read for longest.
//!
//! Nothing of a view is looked at after the call that sends it: no fence waits for that, and no rule, and who receives slowly is served
//! as ever.
//!
//! **Why what is sent is true.** A mapping shows what the file has, as `read` does, on the file systems that [`FileIo::view_length`]
//! answers for. A file that is cut short under it is an error of the call that sends, never a signal: the kernel alone touches it.
//! What is then missing of a piece that is half sent is zeros, and the reply behind it does not count them.

use super::ConnKey;
use super::backend::{FileIo, Progress};
use super::binding::{BindingRef, FromPages};
use super::channel::{Conn, Cx, Token};
use super::pinned::READ_BYTES_MIN;
use super::pinner::Job;
use super::request::{Request, Step};
use super::storage::failed_with;
use crate::config::EngineConfig;
use crate::gauges::Gauges;
use holdfast_shared::types::Status;
use holdfast_transport::{FilePart, ViewPlaced};
use holdfast_verbs::memory::FileMapping;
use std::collections::HashMap;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::mpsc::Sender;

/// What is mapped or let go at once, bytes; extents begin at multiples of it.
const EXTENT: usize = 16 << 20;
const EXTENT_BYTES: u64 = EXTENT as u64;
/// So far behind the end of a file nothing of it is in memory.
const BEYOND: u64 = 1 << 30;
/// Bytes that are given to the socket with one call, at most: the more, the less often who receives wakes up.
const SENT_BYTES_MAX: u64 = 1 << 20;

/// An extent of a binding's file.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    conn: ConnKey,
    binding: BindingRef,
    index: u64,
}

struct View {
    mapping: Arc<FileMapping>,
    /// The number of the use that was the last.
    used: u64,
}

/// See the module's text.
pub(crate) struct Views {
    worker: usize,
    bytes_max: u64,
    /// Mapped, and being unmapped.
    bytes: u64,
    views: HashMap<Key, View>,
    uses: u64,
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
        (bytes_max >= EXTENT_BYTES).then_some(Self {
            worker,
            bytes_max,
            bytes: 0,
            views,
            uses: 0,
            jobs,
            gauges,
        })
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
    ) -> Option<(Arc<FileMapping>, Range<usize>)> {
        let mapping = self.map(Key { conn, binding, index: offset / EXTENT_BYTES }, file)?;
        let start = usize::try_from(offset % EXTENT_BYTES).ok()?;
        let range = start..start + usize::try_from(length).ok()?;
        mapping
            .is_resident(range.clone())
            .is_ok_and(|resident| resident)
            .then(|| (Arc::clone(mapping), range))
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

    fn map(&mut self, key: Key, file: &dyn FileIo) -> Option<&Arc<FileMapping>> {
        if !self.views.contains_key(&key) {
            if self.bytes + EXTENT_BYTES > self.bytes_max {
                // Unless some is on its way.
                if self.bytes <= self.views.len() as u64 * EXTENT_BYTES {
                    self.make_room();
                }
                return None;
            }
            // Whole extents: what a file does not have yet it may have later.
            let start = key.index.checked_mul(EXTENT_BYTES)?;
            let mapping = FileMapping::new(file.descriptor(), start, EXTENT).ok()?;
            self.bytes += EXTENT_BYTES;
            self.gauges.viewed_file_bytes.add(EXTENT_BYTES);
            self.views.insert(key, View { mapping: Arc::new(mapping), used: 0 });
        }
        self.uses += 1;
        let view = self.views.get_mut(&key)?;
        view.used = self.uses;
        Some(&view.mapping)
    }

    /// Lets the extent go that was not read for longest. There is room once it is unmapped: no more is mapped at a time than may be.
    fn make_room(&mut self) {
        let oldest = self.views.iter().min_by_key(|(_, view)| view.used).map(|(key, _)| *key);
        if let Some(view) = oldest.and_then(|key| self.views.remove(&key)) {
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
        // Rules that wait for this read need not wait for room: it goes through buffers, which the peer is given time to take.
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
        if binding.from_pages == FromPages::Never || binding.policy.covers_payload() {
            return None;
        }
        if !self.awaits_wire.is_empty() {
            self.await_wire(cx, slot);
            return Some(Some(Step::Next));
        }
        // Unless it is placed.
        request.roundabout = true;
        let file = Arc::clone(binding.file.as_ref()?);
        let there = file.view_length().ok().flatten()?;
        if binding.from_pages == FromPages::Unknown {
            let may = Views::may_view(&*file, there).is_ok_and(|may| may);
            binding.from_pages = if may { FromPages::Viewed } else { FromPages::Never };
        }
        let offset = request.offset + u64::from(request.next);
        let wanted = u64::from(request.length - request.next)
            .min(SENT_BYTES_MAX)
            .min(EXTENT_BYTES - offset % EXTENT_BYTES);
        let count = there.saturating_sub(offset).min(wanted);
        if self.bindings.get(at)?.from_pages == FromPages::Never || count == 0 {
            return None;
        }
        let length = u32::try_from(count).ok()?;
        let remote = request.region.part(request.next, length)?;
        let (view, range) = cx.views.as_mut()?.resident((self.key, at), &*file, (offset, count))?;
        // For what the socket does not take of a frame.
        let Some(buffer) = self.take(cx) else {
            request.roundabout = false;
            return Some(Some(Step::NoBuffer));
        };
        let token = Token::Place { binding: at }.number();
        let mut rest = None;
        let mut fill = |bytes: &mut [u8], done: usize| rest = Some(read_rest(&*file, bytes, offset, done));
        let part = FilePart { token, view: &view, range, remote, buffer, fill: &mut fill };
        let placed = self.transport.place_view(part);
        self.unpolled = true;
        let sent = match placed {
            ViewPlaced::Done(buffer, sent) => {
                self.give(buffer);
                sent
            }
            ViewPlaced::Begun(sent) => {
                if let Some(binding) = self.bindings.get_mut(at) {
                    binding.transport_ops += 1;
                }
                self.begun(cx.now, cx.settings.limits.stuck_ms);
                sent
            }
            ViewPlaced::Full(buffer) => {
                self.give(buffer);
                request.roundabout = false;
                self.await_wire(cx, slot);
                return Some(Some(Step::Next));
            }
            ViewPlaced::Unable(buffer) => {
                self.give(buffer);
                return None;
            }
        };
        request.roundabout = false;
        cx.gauges.pieces_viewed_total.add(1);
        let done = match rest {
            None => sent,
            Some(Progress::Complete(done) | Progress::Partial(done)) => done,
            Some(Progress::Failed(_, status)) => {
                request.answer = Some((status, 0));
                return Some(Some(Step::Again));
            }
        };
        request.next += u32::try_from(done).unwrap_or(0);
        *bytes += done;
        // The file ends here, or has lost what was looked for.
        let is_short = done < sent || (count < wanted && sent as u64 == count);
        if is_short || request.next == request.length {
            self.reply(cx, slot, request, Status::Ok, request.next, None);
            return Some(None);
        }
        Some(Some(Step::Again))
    }

    /// A read waits until the peer has taken some of what was sent: none of it waits in a buffer meanwhile.
    fn await_wire(&mut self, cx: &Cx, slot: u16) {
        if self.stuck_by.is_none() {
            self.stuck_by = Some(cx.after(cx.settings.limits.stuck_ms));
        }
        self.awaits_wire.push(slot);
    }

    /// The wake descriptor says that the wire takes more.
    pub(crate) fn wire_takes_more(&mut self, cx: &Cx) {
        if !self.awaits_wire.is_empty() {
            self.stuck_by = Some(cx.after(cx.settings.limits.stuck_ms));
            self.resume_awaiting();
        }
    }

    /// Reads that wait for the wire are tried again, in their order.
    pub(super) fn resume_awaiting(&mut self) {
        while let Some(slot) = self.awaits_wire.pop() {
            self.requeue(slot);
        }
    }
}

/// Reads the rest of a piece that begins at `offset`, from `done` bytes on. It was in memory a moment ago. What is not there any more is
/// zeros, and not counted.
fn read_rest(file: &dyn FileIo, rest: &mut [u8], offset: u64, mut done: usize) -> Progress {
    let mut read = 0;
    while read < rest.len() {
        match file.read(&mut rest[read..], offset + done as u64) {
            Ok(0) => break,
            Ok(count) => (read, done) = (read + count, done + count),
            Err(error) => {
                rest[read..].fill(0);
                return Progress::Failed(done, failed_with(&error));
            }
        }
    }
    rest[read..].fill(0);
    Progress::Complete(done)
}
