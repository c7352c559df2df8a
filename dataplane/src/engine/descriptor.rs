//! The open's own descriptor, handed to a client on this host.
//!
//! ```text
//!   Descriptor ─► local channel? ─► granted with the bind, and open for reading alone? ─► Reply + duplicate (SCM_RIGHTS)
//! ```
//!
//! What was given can't be taken back: a fence stops the binding, and the descriptor goes on reading. So control grants it
//! only where that does no harm or the operator says that it does none, and what is handed out cannot write.

use super::binding::Binding;
use super::channel::{Conn, Cx};
use super::request::{Request, Step};
use holdfast_shared::types::{Access, Status};
use holdfast_shared::wire::service::TransportKind;
use rustix::fs::OFlags;

impl Conn {
    /// Says whether the client of this binding may have its descriptor.
    pub(super) fn may_have_descriptor(&self, binding: &Binding) -> Result<(), Status> {
        if self.transport.identity().transport != TransportKind::Local {
            return Err(Status::Unsupported);
        }
        if !binding.gives_descriptor || binding.access != Access::READ {
            return Err(Status::AccessDenied);
        }
        // Granted when others had no locks; now they have.
        if binding.rules.refuse_some(Access::READ) { Err(Status::LockConflict) } else { Ok(()) }
    }

    /// Answers with the descriptor; `None` if that is done.
    pub(super) fn step_descriptor(&mut self, cx: &mut Cx, slot: u16, request: &mut Request) -> Option<Step> {
        if !self.room(1) || !self.can_reply() {
            return Some(Step::NoRoom);
        }
        let binding = request.binding.and_then(|name| self.bindings.get(name));
        let file = binding.and_then(|binding| binding.file.as_ref());
        let reads_alone = |flags: OFlags| flags & OFlags::ACCMODE == OFlags::RDONLY;
        let duplicate = match file.map(|file| file.descriptor()) {
            None => Err(Status::Fenced),
            // Whatever control says, never one that can write.
            Some(fd) if !rustix::fs::fcntl_getfl(fd).is_ok_and(reads_alone) => Err(Status::AccessDenied),
            Some(fd) => fd.try_clone_to_owned().map_err(|_| Status::TooMany),
        };
        match duplicate {
            Ok(descriptor) => {
                cx.gauges.descriptors_given_total.add(1);
                // Once for each binding: the kernel counts those on their way, for all of this process together, and one peer that
                // does not read must not use that up.
                if let Some(binding) = request.binding.and_then(|name| self.bindings.get_mut(name)) {
                    binding.gives_descriptor = false;
                }
                self.reply_with_descriptor(cx, slot, request, descriptor);
                None
            }
            Err(status) => {
                request.answer = Some((status, 0));
                Some(Step::Again)
            }
        }
    }
}
