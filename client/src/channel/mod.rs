//! One data connection ([`Shared`]), shared by many bindings and many requests at once; and [`DataChannel`], which has one
//! after the other.
//!
//! ```text
//!  caller's future ── credit ─► lock ─ frame ─► Channel::submit ─► wire
//!        ▲                       │ slot[request] = purpose, waker, what the device may touch
//!        └── outcome ◄── slot ◄──┴── drain: poll until nothing, then arm ◄── driver task ◄── wake descriptor
//! ```
//!
//! | file | holds |
//! |---|---|
//! | `mod` | one connection: credits, submitting |
//! | `home` | the channel as its users know it: connected again when need be |
//! | `request` | what can be asked, and how it becomes a frame |
//! | `state` | what the lock guards: slots, sequence numbers, the transport; draining it; its end |
//! | `reply` | what arrives: checked, and matched with its slot |
//! | `gather` | requests that go out together |
//! | `prompt` | answers that are looked for instead of slept for |
//! | `in_flight` | the future a caller waits on; what happens when it is dropped |
//! | `driver` | the task that sleeps on the wake descriptor |
//!
//! Whoever drains follows the transport's rule under the lock: poll until it yields nothing, arm, and repeat if
//! that says something came meanwhile. So whenever the lock is free, the transport is armed, and the next event
//! makes an edge on the wake descriptor, on which the driver always waits: no wake-up is lost. (For the one exception, and
//! what bounds it, see `prompt`.)

mod driver;
mod gather;
pub(crate) mod home;
mod in_flight;
mod prompt;
mod reply;
pub(crate) mod request;
mod state;
#[cfg(test)]
pub(crate) mod tests;

pub use home::DataChannel;
pub use in_flight::InFlight;

use crate::bind::BindingCore;
use crate::error::{Ended, Error, Result};
use crate::hot::Hot;
use crate::mapping::Mapping;
use holdfast_shared::auth::ChannelIdentity;
use holdfast_shared::types::{FRAME_BYTES_MAX, INLINE_BYTES_MAX};
use holdfast_transport::{Capabilities, Channel, Registrar, Setup};
use holdfast_verbs::memory::Pool;
pub(crate) use in_flight::Reply;
use parking_lot::Mutex;
use prompt::Look;
use request::{Purpose, Request};
use state::{GivenBack, Sent, State};
use std::net::SocketAddr;
use std::sync::{Arc, Weak};
use std::task::Poll;
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::sync::{Notify, Semaphore, oneshot};

/// Longest frame a server sends: a bind reply is 168 bytes.
const REPLY_BYTES: usize = 512;
/// Receives posted beyond the credits, for frames the server sends unasked.
const NOTICES: usize = 16;
/// Send buffers beyond the credits: a reply may overtake the completion of its own request.
const SENDS_BEHIND: usize = 64;
/// Longest piece of one request, whatever the server would take.
const TRANSFER_MAX: u32 = 64 << 20;
/// Longest piece under a policy that covers the payload: that needs a private copy, and a bounce region if sealed.
const COVERED_TRANSFER_MAX: u32 = 4 << 20;
/// Bounce regions of one channel: sealed writes under way.
const BOUNCES_MAX: usize = 8;

/// What the server said about the channel in its hello.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Facts {
    pub(crate) instance: [u8; 16],
    pub(crate) inline_max: usize,
    pub(crate) transfer_max: u32,
    pub(crate) sealed_transfer_max: u32,
    pub(crate) bindings_max: u16,
    pub(crate) mappings_max: u32,
}

pub(crate) struct Shared {
    state: Mutex<State>,
    /// Requests that may still be put in flight. Fair: first come, first served.
    pub(crate) credits: Semaphore,
    pub(crate) bind_turn: Arc<Semaphore>,
    pub(crate) bounces: Arc<Semaphore>,
    pub(crate) idle_bounces: Arc<Mutex<Vec<crate::Region>>>,
    pub(crate) registrar: Arc<dyn Registrar>,
    pub(crate) identity: ChannelIdentity,
    pub(crate) facts: Facts,
    capabilities: Capabilities,
    pub(crate) peer: SocketAddr,
    /// The runtime whose task drives it.
    pub(crate) runtime: Handle,
    /// Bindings that may have mappings made by themselves.
    pub(crate) hots: Mutex<Vec<Weak<Hot>>>,
    /// Tells the driver to watch: see `prompt`.
    watch: Arc<Notify>,
    /// Dropped with the channel: the driver ends.
    _driver: oneshot::Sender<()>,
}

/// What a transport needs to connect, and the pool that frames to be sent are built in.
pub(crate) struct Prepared {
    pub(crate) setup: Setup,
    pub(crate) frames: Pool,
}

/// Buffers for a channel with so many requests in flight at most.
pub(crate) fn prepare(in_flight_max: u16) -> Result<Prepared> {
    let count = usize::from(in_flight_max);
    let no_memory = |error| Error::io("cannot allocate message buffers", error);
    let frames = Pool::new(FRAME_BYTES_MAX, count + SENDS_BEHIND).map_err(no_memory)?;
    let replies = Pool::new(REPLY_BYTES, count + NOTICES).map_err(no_memory)?;
    let receives: Vec<_> = (0..).zip(std::iter::from_fn(|| replies.take())).collect();
    let setup = Setup {
        depth: count + SENDS_BEHIND,
        receives_max: count + NOTICES,
        pools: vec![frames.clone(), replies],
        receives,
    };
    Ok(Prepared { setup, frames })
}

impl Shared {
    /// Takes over a connected transport: waits for the server's hello, and starts the driver.
    pub(crate) async fn start(
        channel: Box<dyn Channel>,
        frames: Pool,
        in_flight_max: u16,
        wait_max: Duration,
    ) -> Result<Arc<Self>> {
        let wake = driver::Wake::new(&*channel)?;
        let mut state = State::new(channel, frames, usize::from(in_flight_max));
        let (facts, credits) = tokio::time::timeout(wait_max, wake.hello(&mut state))
            .await
            .map_err(|_| Error::TimedOut { what: "the data plane's hello", after: wait_max })??;
        let (stop, stopped) = oneshot::channel();
        let shared = Arc::new(Shared {
            registrar: state.channel.registrar(),
            identity: state.channel.identity().clone(),
            capabilities: state.channel.capabilities(),
            peer: state.channel.peer(),
            state: Mutex::new(state),
            credits: Semaphore::new(credits),
            bind_turn: Arc::new(Semaphore::new(1)),
            bounces: Arc::new(Semaphore::new(BOUNCES_MAX)),
            idle_bounces: Arc::new(Mutex::new(Vec::new())),
            facts,
            runtime: Handle::current(),
            hots: Mutex::default(),
            watch: Arc::default(),
            _driver: stop,
        });
        wake.drive(&shared, stopped);
        Ok(shared)
    }

    /// Why it has ended, if it has.
    pub(crate) fn why_ended(&self) -> Option<Ended> {
        self.state.lock().ended.clone()
    }

    /// Ends it: the device is cut off from all regions before this returns.
    pub(crate) fn fail(&self, why: Ended) {
        self.state.lock().fail(why, &self.credits);
        let hots = std::mem::take(&mut *self.hots.lock());
        hots.iter().filter_map(Weak::upgrade).for_each(|hot| hot.cut());
    }

    /// Mappings that were made without being asked for, to be given back now; and whether others are, soon.
    pub(crate) fn make_room(&self) -> (Vec<Mapping>, bool) {
        let hots: Vec<_> = self.hots.lock().iter().filter_map(Weak::upgrade).collect();
        let (mut all, mut soon) = (Vec::new(), false);
        for (mappings, making) in hots.iter().map(|hot| hot.make_room()) {
            all.extend(mappings);
            soon |= making;
        }
        (all, soon)
    }

    /// The error of whoever comes too late.
    pub(crate) fn ended(&self) -> Error {
        Error::channel(self.state.lock().ended.clone().unwrap_or(Ended::Closed))
    }

    pub(crate) fn nonce(&self) -> [u8; 32] {
        self.state.lock().nonce
    }

    /// Puts a request in flight: waits for a credit and for room, then submits under the lock, from this very task.
    pub(crate) async fn submit(
        self: &Arc<Self>,
        binding: Option<&Arc<BindingCore>>,
        request: Request<'_>,
        purpose: Purpose,
    ) -> Result<Reply> {
        self.submit_if(binding, request, purpose, false, &|| Ok(())).await
    }

    /// As [`Shared::submit`], if the request is still admitted when its turn has come. `prompt`: the caller is going to
    /// wait for this one at once, and for nothing else.
    pub(crate) async fn submit_if(
        self: &Arc<Self>,
        binding: Option<&Arc<BindingCore>>,
        request: Request<'_>,
        purpose: Purpose,
        prompt: bool,
        admits: &(dyn Fn() -> Result<()> + Sync),
    ) -> Result<Reply> {
        let credit = self.credits.acquire().await.map_err(|_| self.ended())?;
        let mut purpose = Some(purpose);
        let (number, look) = std::future::poll_fn(|cx| {
            if let Some(status) = binding.and_then(|binding| binding.fenced()) {
                return Poll::Ready(Err(Error::refused(status)));
            }
            if let Err(error) = admits() {
                return Poll::Ready(Err(error));
            }
            let mut state = self.state.lock();
            let sent = state.send(binding, &request, &mut purpose);
            if matches!(sent, Ok(Sent::NoRoom)) {
                state.room.push(cx.waker().clone());
            }
            let alone = state.slots.len() == 1;
            let budget = match sent {
                Ok(Sent::Number(_)) => state.prompt.sent(prompt, alone),
                _ => None,
            };
            let waits = matches!(sent, Ok(Sent::Number(_))) && budget.is_none() && state.gather.takes();
            // Pushes the frame out; and makes room, if there was none.
            if budget.is_some() {
                state.collect(&self.credits);
                if state.prompt.leaves() {
                    self.watch.notify_one();
                }
            } else if !waits {
                state.push(&self.credits);
            }
            match sent {
                Ok(Sent::Number(number)) => Poll::Ready(Ok((number, budget.map(Look::new)))),
                Ok(Sent::NoRoom) => Poll::Pending,
                // What has just been drained may say more about the end than the transport knew.
                Err(error @ Error::Ended { .. }) => {
                    Poll::Ready(Err(state.ended.clone().map_or(error, Error::channel)))
                }
                Err(error) => Poll::Ready(Err(error)),
            }
        })
        .await?;
        // The reply gives it back.
        credit.forget();
        Ok(Reply::new(Arc::clone(self), number, look))
    }

    /// Gives a binding back without waiting, as soon as a credit is free.
    pub(crate) fn unbind_later(&self, binding: Arc<BindingCore>) {
        self.give_back(GivenBack { binding, mapping: None });
    }

    /// Gives a mapping back without waiting, as soon as a credit is free.
    pub(crate) fn unmap_later(&self, binding: Arc<BindingCore>, mapping: u32) {
        self.give_back(GivenBack { binding, mapping: Some(mapping) });
    }

    fn give_back(&self, given: GivenBack) {
        let mut state = self.state.lock();
        // What has ended has nothing to be given back.
        if state.ended.is_none() {
            state.given_back.push_back(given);
            state.drain(&self.credits);
        }
    }

    /// Longest piece of one request under a policy.
    pub(crate) fn piece_max(&self, covers_payload: bool) -> usize {
        let facts = &self.facts;
        let max = if covers_payload { facts.sealed_transfer_max } else { facts.transfer_max };
        (max as usize).min(self.capabilities.transfer_bytes_max).max(1)
    }

    /// Longest write that travels inside its request.
    pub(crate) fn inline_max(&self) -> usize {
        self.facts.inline_max.min(INLINE_BYTES_MAX)
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // Cuts the device off before slots, and with them registrations, go.
        self.state.get_mut().fail(Ended::Closed, &self.credits);
    }
}
