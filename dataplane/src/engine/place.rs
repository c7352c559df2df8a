//! Long reads placed straight from pinned pages of the file: no buffer, no copy, one Place for each extent.
//!
//! ```text
//!   read ─► covered by pinned extents? ─► fstat: the file is as it was ─► Place from each extent ─► reply
//!              │ no                          │ no
//!              └─► counted (`pinned`) ◄──────┘ ─► the usual way (`transfer`)
//! ```

use super::binding::Pins;
use super::channel::{Conn, Cx, Token};
use super::pinned::{EXTENT_BYTES, FileKey, READ_BYTES_MIN, extents};
use super::request::{Request, Step};
use holdfast_shared::types::Status;
use std::sync::Arc;

impl Conn {
    /// A read that has not begun. `None`: it goes the usual way. `Some(None)`: it was answered.
    #[allow(clippy::option_option)] // as `step_read` has it
    pub(super) fn step_pinned(
        &mut self,
        cx: &mut Cx,
        slot: u16,
        request: &mut Request,
        bytes: &mut usize,
    ) -> Option<Option<Step>> {
        if request.looked || request.length < READ_BYTES_MIN {
            return None;
        }
        let (Some(pinned), Some(pinner)) = (&mut cx.pinned, &self.pinner) else { return None };
        let at = request.binding?;
        let binding = self.bindings.get_mut(at)?;
        // What has a digest, or is sealed, passes the processor anyway.
        let file =
            if binding.policy.covers_payload() { return None } else { Arc::clone(binding.file.as_ref()?) };
        let key = match binding.pins {
            Pins::Watched(key) => key,
            Pins::Never => return None,
            Pins::Unknown => {
                binding.pins = Pins::Never;
                let stamp = file.stamp().ok().flatten()?;
                let key = FileKey { device: pinner.id(), file: stamp.file };
                if !pinned.enter(key) {
                    return None;
                }
                binding.pins = Pins::Watched(key);
                key
            }
        };
        let (offset, length) = (request.offset, u64::from(request.length));
        if !pinned.covers(key, offset, length) {
            request.looked = true;
            pinned.warm(key, &file, pinner, (offset, length), cx.now);
            return None;
        }
        let pieces = extents(offset, length).count();
        // Before the file is asked: what it says must be so when the Places are posted, behind all that came before.
        if !self.room(pieces + 1) || !self.can_reply() {
            return Some(Some(Step::NoRoom));
        }
        let stamp = file.stamp().ok().flatten();
        request.looked = true;
        let (true, Some(stamp)) = (pinned.confirm(key, stamp), stamp) else { return None };
        let count = stamp.length.saturating_sub(offset).min(length);
        let end = offset + count;
        for index in extents(offset, count) {
            let start = (index * EXTENT_BYTES).max(offset);
            let from = (start - index * EXTENT_BYTES) as usize;
            let piece = (((index + 1) * EXTENT_BYTES).min(end) - start) as u32;
            let (Some(remote), Some(pages)) =
                (request.region.part((start - offset) as u32, piece), pinned.extent(key, index, cx.now))
            else {
                // Covered, and the region was checked at admission.
                request.answer = Some((Status::Internal, 0));
                return Some(Some(Step::Again));
            };
            let token = Token::Place { binding: at }.number();
            if let Err(error) = self.transport.place_pinned(token, pages, from..from + piece as usize, remote)
            {
                tracing::debug!(peer = %self.peer, %error, "the transport refused a Place");
                self.close(cx);
                return Some(Some(Step::Next));
            }
            if let Some(binding) = self.bindings.get_mut(at) {
                binding.transport_ops += 1;
            }
            self.begun(cx.now, cx.settings.limits.stuck_ms);
        }
        // Of no more than `length`, which is of 32 bits.
        request.next = count as u32;
        *bytes += count as usize;
        cx.gauges.reads_pinned_total.add(1);
        self.reply(cx, slot, request, Status::Ok, request.next, None);
        Some(None)
    }
}
