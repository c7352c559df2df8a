//! Frames that come in: the checks that every one of them passes before anything is done for it.
//!
//! ```text
//!  message ─► form ─► direction ─► sequence ─► MAC ─► credit ─┬─► bind    (see `bind`)
//!               │         │           │          │      │     └─► request (see `request`)
//!               └─────────┴───────────┴──────────┴──────┴─► the channel ends, with the status of the check
//! ```
//!
//! A request to a binding that is not there has no key to be checked with: it is answered `NotBound` under binding 0,
//! without a MAC, and does nothing. Before the first bind only a few of them are answered.

use super::binding::{Binding, BindingRef};
use super::channel::{Conn, Cx};
use super::request::Request;
use holdfast_shared::auth::FrameKey;
use holdfast_shared::types::Status;
use holdfast_shared::wire::WireError;
use holdfast_shared::wire::data::{Body, Frame};
use holdfast_verbs::memory::Buffer;

impl Conn {
    /// A frame came. Everything is checked here, in this order: form, direction, sequence, MAC, credit.
    pub(super) fn receive(&mut self, cx: &mut Cx, buffer: Buffer, length: usize) {
        let frame = match Frame::parse(&buffer[..length.min(buffer.len())]) {
            Ok(frame) => frame,
            Err(WireError::Version(_)) => return self.end(cx, Status::Version, "a frame of another version"),
            Err(error) => {
                tracing::debug!(peer = %self.peer, %error, "malformed frame");
                return self.end(cx, Status::Protocol, "a malformed frame");
            }
        };
        if frame.opcode.is_from_server() {
            return self.end(cx, Status::Protocol, "a frame that only servers send");
        }
        if frame.header.sequence.get() != self.recv_sequence {
            return self.end(cx, Status::BadMac, "a frame out of sequence");
        }
        self.recv_sequence += 1;
        let number = frame.header.binding.get();
        let binding = self.bindings.get(BindingRef(number));
        let authentic = match binding {
            Some(binding) => binding.from_client.verify(&frame),
            // No key: a bind, or a binding that is not there. Such a request is answered and does nothing.
            None => number != 0 || FrameKey::unkeyed().verify(&frame),
        };
        if !authentic {
            return self.end(cx, Status::BadMac, "a frame with a wrong MAC");
        }
        let name = binding.map(Binding::name);
        if self.in_flight >= self.credits {
            return self.end(cx, Status::OverCredit, "more requests than credits");
        }
        if let Body::Bind(body) = frame.body {
            if number != 0 {
                return self.end(cx, Status::Protocol, "a bind that names a binding");
            }
            cx.gauges.requests_bind_total.add(1);
            let (body, request, key) = (*body, frame.header.request.get(), frame.payload);
            if self.bind.is_some() {
                return self.end(cx, Status::Protocol, "a bind before the last one was answered");
            }
            self.in_flight += 1;
            self.start_bind(cx, request, &body, key);
            self.post_receive(cx, buffer);
            return;
        }
        let taken = Request::read(&frame, name);
        self.in_flight += 1;
        self.admit(cx, taken, buffer);
    }
}
