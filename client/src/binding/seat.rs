//! [`Seat`]: a binding as one connection knows it, and how one piece of a read or write goes out there.
//!
//! ```text
//!   a read      within a mapping that the library made: one-sided   (`hot`)
//!   a read      region registered with the channel ─────────────────────────► Request::Read
//!   a write     short: inline │ sealed: by way of a bounce region │ else: fetched from the region ─► Request::Write
//! ```

use crate::Region;
use crate::bind::BindingCore;
use crate::channel::request::{Bounce, Fetched, Purpose, Request, Source};
use crate::channel::{Reply, Shared};
use crate::error::{Error, Result};
use crate::hot::{Hot, HotRead};
use crate::recovery::reissue::Piece;
use holdfast_shared::auth::MacPolicy;
use holdfast_shared::types::{Access, RegionDescriptor};
use holdfast_transport::Registration;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};

/// Smallest bounce region.
const BOUNCE_MIN: usize = 64 << 10;

/// A binding as one connection knows it.
pub(crate) struct Seat {
    pub(crate) core: Arc<BindingCore>,
    pub(crate) channel: Arc<Shared>,
    /// The open's last resume that it is known to have lived through.
    incarnation: AtomicU64,
    /// Where reads become one-sided by themselves.
    pub(crate) hot: Option<Arc<Hot>>,
}

/// One piece under way.
pub(crate) enum UnderWay {
    /// The server was asked.
    Asked(Reply),
    /// It is read past the server.
    Hot(HotRead),
}

impl UnderWay {
    /// Bytes read or written. [`Error::MappingLost`]: it is to be asked for again, on the same seat.
    pub(crate) fn poll(&mut self, cx: &Context<'_>) -> Poll<Result<usize>> {
        match self {
            Self::Asked(reply) => reply.poll_count(cx),
            Self::Hot(read) => read.poll(cx),
        }
    }

    /// As [`UnderWay::poll`].
    pub(crate) async fn count(mut self) -> Result<usize> {
        std::future::poll_fn(|cx| self.poll(cx)).await
    }
}

impl Seat {
    pub(crate) fn new(
        core: Arc<BindingCore>,
        channel: Arc<Shared>,
        incarnation: u64,
        hot: Option<Arc<Hot>>,
    ) -> Self {
        Self { core, channel, incarnation: AtomicU64::new(incarnation), hot }
    }

    /// The open was resumed so often, and this was kept.
    pub(super) fn lives_on(&self, incarnation: u64) {
        self.incarnation.fetch_max(incarnation, Ordering::AcqRel);
    }

    /// It is being given back: see [`Hot::end`].
    pub(super) fn end_hot(&self) {
        if let Some(hot) = &self.hot {
            hot.end();
        }
    }

    /// True if requests of this seat, whose answers will not come, may still be carried out. `instance`: the data plane that is
    /// there now; `incarnation`: how often the open was resumed.
    pub(crate) fn may_still_write(&self, instance: &[u8; 16], incarnation: u64) -> bool {
        self.core.access.contains(Access::WRITE)
            && self.channel.why_ended().is_some()
            && self.core.has_unanswered_write()
            && self.channel.facts.instance == *instance
            && self.core.fenced().is_none()
            && self.incarnation.load(Ordering::Acquire) == incarnation
    }

    /// Longest piece one request moves, bytes.
    pub(crate) fn piece_max(&self) -> usize {
        self.channel.piece_max(self.core.policy.covers_payload())
    }

    /// Puts one piece in flight; a write only if it is admitted when its turn has come. `prompt`: as for
    /// [`Shared::submit_if`].
    pub(crate) async fn submit(
        &self,
        piece: &Piece,
        prompt: bool,
        admits: &(dyn Fn() -> Result<()> + Sync),
    ) -> Result<UnderWay> {
        if let Some(hot) = &self.hot {
            if piece.write {
                hot.wrote(piece);
            } else if let Some(read) = hot.read(&self.channel, &self.core, piece, prompt) {
                // Its answer is looked for on this thread, and often found: who reads and reads lets others run all the same.
                tokio::task::coop::consume_budget().await;
                return Ok(UnderWay::Hot(read));
            }
        }
        self.ask(piece, prompt, admits).await.map(UnderWay::Asked)
    }

    /// As [`Seat::submit`], by the server and nobody else.
    pub(crate) async fn ask(
        &self,
        piece: &Piece,
        prompt: bool,
        admits: &(dyn Fn() -> Result<()> + Sync),
    ) -> Result<Reply> {
        let length =
            u32::try_from(piece.length).map_err(|_| Error::Internal("a checked piece is too long"))?;
        if piece.write {
            self.write(piece, length, prompt, admits).await
        } else {
            self.read(piece, length, prompt).await
        }
    }

    async fn read(&self, piece: &Piece, length: u32, prompt: bool) -> Result<Reply> {
        let (channel, region) = (&self.channel, &piece.region);
        let registration = region.registration(channel)?;
        let remote = part(&registration, piece.start, length)?;
        let purpose =
            Purpose::Read { region: region.clone(), start: piece.start, length, _registration: registration };
        let request = Request::Read { offset: piece.offset, remote };
        channel.submit_if(Some(&self.core), request, purpose, prompt, &|| Ok(())).await
    }

    async fn write(
        &self,
        piece: &Piece,
        length: u32,
        prompt: bool,
        admits: &(dyn Fn() -> Result<()> + Sync),
    ) -> Result<Reply> {
        let (channel, region, start) = (&self.channel, &piece.region, piece.start);
        let bounce;
        let (source, fetched) = if piece.length <= channel.inline_max() {
            (Source::Inline { region, start }, Fetched::Inline)
        } else if self.core.policy == MacPolicy::Sealed {
            let taken = take_bounce(channel, piece.length).await?;
            bounce = taken.region.clone();
            let remote = part(&taken.registration, 0, length)?;
            (Source::Bounced { region, start, bounce: &bounce, remote }, Fetched::Bounce { _bounce: taken })
        } else {
            let registration = region.registration(channel)?;
            let remote = part(&registration, start, length)?;
            (Source::Fetch { region, start, remote }, Fetched::Region { _registration: registration })
        };
        let request = Request::Write { offset: piece.offset, length, source };
        let purpose = Purpose::Write { length, _fetched: fetched };
        channel.submit_if(Some(&self.core), request, purpose, prompt, admits).await
    }
}

fn part(registration: &Registration, start: usize, length: u32) -> Result<RegionDescriptor> {
    u32::try_from(start)
        .ok()
        .and_then(|start| registration.descriptor().part(start, length))
        .ok_or(Error::Internal("a checked range lies outside of its registration"))
}

/// A bounce region of the channel for `length` bytes: an idle one that is large enough, or a new one in its place.
async fn take_bounce(channel: &Arc<Shared>, length: usize) -> Result<Bounce> {
    let place = Arc::clone(&channel.bounces).acquire_owned().await.map_err(|_| channel.ended())?;
    let idle = channel.idle_bounces.lock().pop();
    let region = match idle.filter(|region| region.len() >= length) {
        Some(region) => region,
        // Rounded up, so that a channel soon has what it needs.
        None => Region::allocate(length.max(BOUNCE_MIN).next_power_of_two())?,
    };
    let registration = region.registration(channel)?;
    Ok(Bounce { region, registration, home: Arc::clone(&channel.idle_bounces), _place: place })
}
