//! The task that sleeps on the wake descriptor, and drains the channel when it wakes.

use super::prompt::WATCH;
use super::{Facts, Shared, State};
use crate::error::{Error, Result};
use holdfast_transport::Channel;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::{Semaphore, oneshot};

/// The wake descriptor in tokio's hands: registered once, edge triggered, for reading and writing.
pub(super) struct Wake {
    /// A duplicate, so that it may outlive the channel by a moment.
    fd: AsyncFd<OwnedFd>,
}

impl Wake {
    pub(super) fn new(channel: &dyn Channel) -> Result<Self> {
        let failed = |error| Error::io("cannot watch the data channel", error);
        let fd = channel.wake_fd().try_clone_to_owned().map_err(failed)?;
        // Deprecated because an `AsRawFd` may lie about its descriptor; an `OwnedFd` does not. Its successor is unsafe.
        #[allow(deprecated)]
        let fd = AsyncFd::with_interest(fd, Interest::READABLE | Interest::WRITABLE).map_err(failed)?;
        Ok(Self { fd })
    }

    /// Sleeps until there is an edge. It is cleared before the caller drains: one that comes while it does is kept.
    async fn edge(&self) -> Result<()> {
        let mut guard = self
            .fd
            .ready(Interest::READABLE | Interest::WRITABLE)
            .await
            .map_err(|error| Error::io("cannot watch the data channel", error))?;
        guard.clear_ready();
        Ok(())
    }

    /// Waits for the server's hello: facts and credits.
    pub(super) async fn hello(&self, state: &mut State) -> Result<(Facts, usize)> {
        // Nobody waits for credits yet.
        let credits = Semaphore::new(0);
        loop {
            state.drain(&credits);
            if let Some(why) = &state.ended {
                return Err(Error::channel(why.clone()));
            }
            if let Some(hello) = state.hello {
                return Ok(hello);
            }
            self.edge().await?;
        }
    }

    /// Drains the channel at each edge, until it ends or its last user has gone; and looks after it while it may not be
    /// armed.
    pub(super) fn drive(self, shared: &Arc<Shared>, mut stopped: oneshot::Receiver<()>) {
        let (weak, watch) = (Arc::downgrade(shared), Arc::clone(&shared.watch));
        tokio::spawn(async move {
            let mut watching = false;
            loop {
                let tick =
                    async { if watching { tokio::time::sleep(WATCH).await } else { watch.notified().await } };
                let edge = tokio::select! {
                    biased;
                    _ = &mut stopped => return,
                    edge = self.edge() => Some(edge),
                    () = tick => None,
                };
                let Some(shared) = weak.upgrade() else { return };
                let gathers = {
                    let mut state = shared.state.lock();
                    match edge {
                        Some(Ok(())) => {}
                        Some(Err(error)) => {
                            state.fail(crate::Ended::Transport(error.to_string()), &shared.credits);
                        }
                        None if watching && state.prompt.is_quiet() => watching = false,
                        None => {
                            watching = true;
                            continue;
                        }
                    }
                    state.drain(&shared.credits);
                    if state.ended.is_some() {
                        return;
                    }
                    state.gather.begin()
                };
                if gathers {
                    tokio::task::yield_now().await;
                    let mut state = shared.state.lock();
                    if state.gather.end() {
                        state.push(&shared.credits);
                    }
                }
            }
        });
    }
}
