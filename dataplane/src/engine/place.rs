//! Long reads placed straight from pinned pages of the file: no buffer, no copy, one Place for each extent.
//!
//! ```text
//!   read ─► covered by pinned extents? ─► fstat: the file is as it was ─► Place from each extent ─► reply
//!              │ no                          │ no
//!              └─► counted (`pinned`) ◄──────┘ ─► the usual way (`transfer`)
//! ```

use super::RESERVE;
use super::binding::FromPages;
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
        // While new rules wait for what began before, nothing begins that the device reads later than it is answered.
        if request.looked || request.length < READ_BYTES_MIN || !self.restricting.is_empty() {
            return None;
        }
        let (Some(pinned), Some(pinner)) = (&mut cx.pinned, &self.pinner) else { return None };
        let at = request.binding?;
        let binding = self.bindings.get_mut(at)?;
        if binding.from_pages == FromPages::Never {
            return None;
        }
        // What has a digest, or is sealed, passes the processor anyway.
        let file =
            if binding.policy.covers_payload() { return None } else { Arc::clone(binding.file.as_ref()?) };
        let key = match binding.from_pages {
            FromPages::Watched(key) => key,
            FromPages::Never | FromPages::Viewed => return None,
            FromPages::Unknown => {
                binding.from_pages = FromPages::Never;
                let stamp = file.stamp().ok().flatten()?;
                let key = FileKey { device: pinner.id(), file: stamp.file };
                if !pinned.enter(key) {
                    return None;
                }
                binding.from_pages = FromPages::Watched(key);
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
        // More than ever fit, or longer than the device does at once.
        if pieces + 1 + RESERVE > self.depth || (self.transfer_max as u64) < EXTENT_BYTES {
            request.looked = true;
            return None;
        }
        // Before the file is asked: what it says must be so when the Places are posted, behind all that came before.
        if !self.room(pieces + 1) || !self.can_reply() {
            return Some(Some(Step::NoRoom));
        }
        let stamp = file.stamp().ok().flatten();
        request.looked = true;
        let (true, Some(stamp)) = (pinned.confirm(key, stamp), stamp) else { return None };
        let there = stamp.length.saturating_sub(offset).min(length);
        let count = u32::try_from(there).unwrap_or(request.length);
        let mut done = 0;
        while done < count {
            let start = offset + u64::from(done);
            let within = start % EXTENT_BYTES;
            let piece = u32::try_from(EXTENT_BYTES - within).unwrap_or(u32::MAX).min(count - done);
            let pages = pinned.extent(key, start / EXTENT_BYTES, cx.now);
            let (Some(remote), Some(pages), Ok(from)) =
                (request.region.part(done, piece), pages, usize::try_from(within))
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
            self.pinned_begun += 1;
            self.begun(cx.now, cx.settings.limits.stuck_ms);
            done += piece;
        }
        request.next = count;
        *bytes += usize::try_from(count).unwrap_or(usize::MAX);
        cx.gauges.reads_pinned_total.add(1);
        self.reply(cx, slot, request, Status::Ok, request.next, None);
        Some(None)
    }
}
