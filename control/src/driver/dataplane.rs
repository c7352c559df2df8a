//! The driver's side of the link: one dataplane at a time, what it says, and what it is told.
//!
//! ```text
//!             Register                     link closes
//!  (none) ───────────────► Link: linked ──────────────► Silent: bindings stay
//!     ▲                        ▲                          │        │
//!     │                        └─ Register, with what lives        │
//!     └────────────────────────────── process dead ────────────────┘
//! ```

use super::files::Done;
use super::{Driver, fresh};
use crate::link::{LinkPacket, Peer, Registration};
use holdfast_shared::state::Input;
use holdfast_shared::types::Status;
use holdfast_shared::wire::link::{Gauge, RedeemResult, Redeemed, Registered, ToControl, ToDataplane};
use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use tokio::sync::{mpsc, oneshot};

/// Gauge questions that dataplane has not answered.
const GAUGE_QUESTIONS_MAX: usize = 16;

/// The registered dataplane.
pub(super) struct Link {
    pub(super) id: u64,
    pub(super) packets: mpsc::UnboundedSender<LinkPacket>,
    pub(super) questions: BTreeMap<u64, oneshot::Sender<Vec<Gauge>>>,
    pub(super) last_question: u64,
    /// It maps ranges of files, and must be told before bytes are taken away from one.
    pub(super) maps: bool,
}

/// A dataplane whose link has closed and whose death is waited for.
pub(super) struct Silent {
    link: u64,
    pub(super) maps: bool,
    waits: tokio::task::AbortHandle,
}

impl Drop for Silent {
    fn drop(&mut self) {
        self.waits.abort();
    }
}

impl Driver {
    pub(super) fn end_link(&mut self, id: u64, peer: Peer) {
        if self.link.as_ref().is_none_or(|link| link.id != id) {
            return;
        }
        tracing::warn!("the link has closed; opens and their bindings stay");
        let maps = self.link.take().is_some_and(|link| link.maps);
        self.gauges.link_up.store(0, Relaxed);
        self.input(Input::LinkDown);
        let done = self.done.clone();
        let waits = tokio::spawn(async move {
            if peer.died().await {
                let _ = done.send(Done::DataplaneDied(id));
            } else {
                tracing::error!("dataplane's end cannot be seen; its bindings stay until it registers");
            }
        });
        self.silent = Some(Silent { link: id, maps, waits: waits.abort_handle() });
    }

    pub(super) fn dataplane_died(&mut self, id: u64) {
        if self.silent.take_if(|silent| silent.link == id).is_some() {
            tracing::warn!("dataplane is dead and its bindings are gone; opens stay");
            self.input(Input::LinkLost);
            self.nothing_is_mapped();
        }
    }

    /// Version and form of the registration are checked already. Descriptors that come with it are only of use to a control
    /// that starts.
    pub(super) fn begin_link(
        &mut self,
        id: u64,
        registration: Registration,
        packets: mpsc::UnboundedSender<LinkPacket>,
    ) {
        let status = if self.link.is_some() { Status::TooMany } else { Status::Ok };
        let registered =
            LinkPacket { message: ToDataplane::Registered(Registered { status }), descriptor: None };
        if status != Status::Ok {
            // Without its sender the connection sends what is queued and ends.
            tracing::warn!(?status, "a dataplane was refused");
            let _ = packets.send(registered);
            return;
        }
        tracing::info!(bindings = registration.held.len(), "dataplane linked");
        self.gauges.link_up.store(1, Relaxed);
        // Its registration says what of all that was bound before is still there.
        self.silent = None;
        let Registration { service_blob, held, first, wrote, maps, .. } = registration;
        if first {
            // Nobody is left who knows what the bindings of before last wrote.
            self.input(Input::LinkLost);
        }
        self.input(Input::Wrote(wrote));
        self.input(Input::LinkUp { service_blob, held });
        // It has been taken. What follows from it comes behind: effects are performed later.
        let _ = packets.send(registered);
        self.link = Some(Link { id, packets, questions: BTreeMap::new(), last_question: 0, maps });
        if maps {
            self.withdraw_again();
        } else {
            self.nothing_is_mapped();
        }
    }

    pub(super) fn link_message(&mut self, message: ToControl) -> anyhow::Result<()> {
        match message {
            ToControl::Register(_) => {
                tracing::warn!("dataplane registered twice on one link; ignored");
            }
            ToControl::Redeem(redeem) => {
                self.input(Input::Redeem { redeem: Box::new(redeem), fresh: fresh()? });
            }
            ToControl::Held(_) => {
                tracing::warn!("dataplane tells of a binding outside of a registration; ignored");
            }
            ToControl::Restricted(restricted) => self.input(Input::Restricted(restricted)),
            ToControl::Withdrawn(id) => self.withdrawn(id),
            ToControl::Fenced(fence) => self.input(Input::Fenced(fence)),
            ToControl::Released(binding) => self.input(Input::Released(binding)),
            ToControl::Gauges(gauges) => {
                let link = self.link.as_mut();
                if let Some(question) = link.and_then(|link| link.questions.remove(&gauges.id)) {
                    let _ = question.send(gauges.gauges);
                }
            }
        }
        Ok(())
    }

    pub(super) fn ask_gauges(&mut self, answer: oneshot::Sender<Vec<Gauge>>) {
        let Some(link) = &mut self.link else { return };
        // Also those of which the asker has gone count: a dataplane that hangs must not have them pile up in the queue.
        if link.questions.len() < GAUGE_QUESTIONS_MAX {
            link.last_question += 1;
            let id = link.last_question;
            link.questions.insert(id, answer);
            self.to_dataplane(ToDataplane::GetGauges(id), None);
        }
    }

    pub(super) fn refuse_bind(&mut self, id: u64, status: Status) {
        self.gauges.binds_refused_total.fetch_add(1, Relaxed);
        self.gauges.refused(status);
        let result = RedeemResult::Refused(status);
        self.to_dataplane(ToDataplane::Redeemed(Redeemed { id, result }), None);
    }

    /// Queues a packet. The queue holds at most one answer for each bind under way, one fence for each binding, the gauge
    /// questions that are not answered, and new rules for as many lock requests and opens as may be under way.
    /// If the link is gone its end is already on the way here.
    pub(super) fn to_dataplane(&self, message: ToDataplane, descriptor: Option<Arc<OwnedFd>>) {
        if let Some(link) = &self.link {
            let _ = link.packets.send(LinkPacket { message, descriptor });
        }
    }
}
