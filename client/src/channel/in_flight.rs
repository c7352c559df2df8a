//! The future a caller waits on.
//!
//! It may be dropped at any time: the request's slot, its registration and its binding stay until the reply comes, so
//! that memory is never freed, or withdrawn, under the device.

use super::Shared;
use super::prompt::Look;
use super::request::Done;
use super::state::index;
use crate::binding::UnderWay;
use crate::error::{Error, Result};
use crate::handed::Waiting;
use crate::recovery::reissue::Again;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

/// A request in flight, whatever it is.
pub(crate) struct Reply {
    channel: Arc<Shared>,
    /// `None` once collected.
    number: Option<u32>,
    /// Its answer is looked for before anybody sleeps.
    look: Option<Look>,
}

impl Reply {
    pub(super) fn new(channel: Arc<Shared>, number: u32, look: Option<Look>) -> Self {
        Self { channel, number: Some(number), look }
    }

    /// What it came to.
    pub(crate) async fn outcome(mut self) -> Result<Done> {
        std::future::poll_fn(|cx| self.poll_done(cx)).await
    }

    /// Bytes read or written.
    pub(crate) async fn count(self) -> Result<usize> {
        counted(self.outcome().await?)
    }

    /// As [`Reply::count`].
    pub(crate) fn poll_count(&mut self, cx: &Context<'_>) -> Poll<Result<usize>> {
        self.poll_done(cx).map(|done| done.and_then(counted))
    }

    fn poll_done(&mut self, cx: &Context<'_>) -> Poll<Result<Done>> {
        let Some(number) = self.number else {
            return Poll::Ready(Err(Error::Internal("a reply was collected twice")));
        };
        if let Some(look) = &mut self.look {
            look.take(&self.channel, number);
        }
        let mut state = self.channel.state.lock();
        let Some(slot) = state.slot(number) else {
            return Poll::Ready(Err(Error::Internal("a request's slot is gone")));
        };
        let Some(outcome) = slot.outcome.take() else {
            match &mut slot.waker {
                Some(waker) => waker.clone_from(cx.waker()),
                none => *none = Some(cx.waker().clone()),
            }
            return Poll::Pending;
        };
        state.slots.remove(index(number));
        if let Some(look) = &self.look {
            look.ended(&mut state);
        }
        self.number = None;
        Poll::Ready(outcome.map_err(Error::from))
    }
}

impl Drop for Reply {
    fn drop(&mut self) {
        if let Some(number) = self.number.take() {
            let mut state = self.channel.state.lock();
            state.abandon(number);
            // An abandoned bind or map may have succeeded already: what it got is given back.
            // And what was to be looked for is left to the driver.
            if state.gives_back() || self.look.as_ref().is_some_and(Look::is_due) {
                state.drain(&self.channel.credits);
            }
        }
    }
}

fn counted(done: Done) -> Result<usize> {
    match done {
        Done::Counted(count) => Ok(count as usize),
        Done::Bound(_) => Err(Error::Internal("a request was answered as a bind")),
        Done::Mapped(_) => Err(Error::Internal("a request was answered as a map")),
        Done::Descriptor(_) => Err(Error::Internal("a request was answered with a descriptor")),
    }
}

/// A read or write in flight; resolves to the number of bytes moved.
///
/// It makes progress whether it is polled or not; only when its channel ends, or its binding is fenced, is it made again
/// by polling. Dropping it does not call the request back: the server may still read from, or write to, the range that was
/// named until it has answered.
#[must_use = "what a request came to should be looked at"]
pub struct InFlight {
    stage: Stage,
    /// For a request that is to be made again.
    again: Option<Again>,
}

enum Stage {
    /// Done already, without the server: so many bytes.
    Done(usize),
    /// With a thread that reads the file itself.
    Handed(Waiting),
    UnderWay(UnderWay),
    Again(Pin<Box<dyn Future<Output = Result<usize>> + Send>>),
}

impl InFlight {
    pub(crate) fn new(piece: UnderWay, again: Again) -> Self {
        Self { stage: Stage::UnderWay(piece), again: Some(again) }
    }

    /// A request that found no binding to go by.
    pub(crate) fn unsent(again: Again) -> Self {
        Self { stage: Stage::Again(Box::pin(again.run(false))), again: None }
    }

    /// So many bytes were moved without the server.
    pub(crate) fn done(count: usize) -> Self {
        Self { stage: Stage::Done(count), again: None }
    }

    /// A read of the file itself that has to wait.
    pub(crate) fn handed(waiting: Waiting, again: Again) -> Self {
        Self { stage: Stage::Handed(waiting), again: Some(again) }
    }
}

impl Future for InFlight {
    type Output = Result<usize>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = &mut *self;
        loop {
            match &mut this.stage {
                Stage::Done(count) => return Poll::Ready(Ok(*count)),
                Stage::Handed(waiting) => {
                    let outcome = ready!(Pin::new(waiting).poll(cx));
                    match (outcome, this.again.take()) {
                        // What was read after the binding had ended does not count: the server is asked.
                        (Ok(_), Some(again)) if !again.is_handed_still() => {
                            this.stage = Stage::Again(Box::pin(again.run(false)));
                        }
                        (outcome, _) => return Poll::Ready(outcome),
                    }
                }
                Stage::Again(again) => return again.as_mut().poll(cx),
                Stage::UnderWay(piece) => {
                    let outcome = ready!(piece.poll(cx));
                    match (outcome, this.again.take()) {
                        // The binding is as good as before.
                        (Err(Error::MappingLost), Some(again)) => {
                            this.stage = Stage::Again(Box::pin(again.run_here()));
                        }
                        (Err(error), Some(again)) if again.is_wanted(&error) => {
                            this.stage = Stage::Again(Box::pin(again.run(true)));
                        }
                        (outcome, again) => {
                            if let (Ok(_), Some(again)) = (&outcome, again) {
                                again.acknowledged();
                            }
                            return Poll::Ready(outcome);
                        }
                    }
                }
            }
        }
    }
}

impl std::fmt::Debug for InFlight {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("InFlight").finish_non_exhaustive()
    }
}
