//! [`Stripes`]: one open over several channels at once.
//!
//! ```text
//!                     ┌─ piece ─► Rail: binding on channel 0 ─► data plane
//!   read_at/write_at ─┼─ piece ─► Rail: binding on channel 1 ─► (another NIC of it, if it names several)
//!   cut in units      └─ piece ─► Rail: binding on channel 2        ✗ ended: its pieces go to the others at once,
//!        ▲                              ▲                             it comes back by itself, and takes pieces again
//!        └── Prefix: what counts        └── the one with the fewest bytes under way takes the next piece
//! ```
//!
//! | file | answers |
//! |---|---|
//! | `mod` | what can be asked of all channels together |
//! | `rail` | one channel: does it live, how much is under way on it, who brings it back? |
//! | `piece` | what becomes of one piece, whatever becomes of its channel? |
//! | `spread` | which pieces is a request cut into, and how much of it counts in the end? |
//!
//! All handles of an open are equal (one open file description at the server), so any of them may read, write and flush what
//! went through another. The rule for a write whose answer was lost is that of one binding (`recovery::reissue`): it is
//! made again only when its old handle can land nothing any more, and the file was not found changed.

mod piece;
mod rail;
mod spread;

use crate::binding;
use crate::channel::DataChannel;
use crate::claim::Claim;
use crate::config::Transport;
use crate::error::{Error, Result};
use crate::open::Open;
use crate::recovery::{Patience, rebind};
use crate::region::Region;
use arc_swap::ArcSwap;
use holdfast_shared::types::{Access, Status};
use holdfast_shared::wire::service::TransportKind;
use parking_lot::Mutex;
use rail::{Lost, Rail};
use std::net::SocketAddr;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use tokio::sync::watch;
use tokio::task::JoinSet;

/// Channels of one open at most.
pub const RAILS_MAX: usize = 64;
/// Longest piece, unless [`Stripes::with_unit`] says otherwise, bytes.
const UNIT: usize = 1 << 20;
const UNIT_MIN: usize = 4 << 10;
const UNIT_MAX: usize = 64 << 20;

/// An open bound on several channels, used as one. Cheap to clone; all clones are the same.
///
/// A request longer than the stripe unit is cut into pieces; each goes to the channel with the fewest bytes under way, so a
/// slow one gets fewer. A channel that ends, or whose binding is fenced, drops out at once and its pieces are made again on the
/// others: reads always, writes by the rule of [`crate::Binding`]. It comes back by itself, with growing waits in
/// between, and takes part again. Only while none lives do requests wait, as [`crate::Config::recovery`] says. A
/// channel that was closed for good ([`DataChannel::close`]) is left out from then on; requests fail when none is left.
///
/// To settle a write that was under way on a channel which broke alone, the session is replaced (see [`crate::Binding`]); the
/// other channels go on meanwhile.
///
/// ```no_run
/// # async fn example(open: holdfast_client::Open) -> holdfast_client::Result<()> {
/// use holdfast_client::{Region, Transport};
/// let stripes = open.stripes(Transport::Auto, 4).await?;
/// let region = Region::allocate(64 << 20)?;
/// let count = stripes.read_at(&region, 0..64 << 20, 0).await?;
/// stripes.write_all(&region, 0..count, 0).await?;
/// stripes.flush().await?;
/// for rail in stripes.rails() {
///     println!("{} over {}: {} bytes", rail.peer, rail.transport.name(), rail.bytes_moved);
/// }
/// stripes.unbind().await?;
/// # Ok(()) }
/// ```
#[derive(Clone)]
pub struct Stripes {
    inner: Arc<Inner>,
}

/// How one channel of [`Stripes`] stands.
#[derive(Clone, Debug)]
pub struct RailState {
    /// Which transport carries it.
    pub transport: TransportKind,
    /// The data plane's address.
    pub peer: SocketAddr,
    /// False while it is brought back.
    pub live: bool,
    /// Bytes of requests under way.
    pub bytes_under_way: u64,
    /// Bytes read and written so far, as answered.
    pub bytes_moved: u64,
}

pub(crate) struct Inner {
    open: Open,
    access: Access,
    unit: usize,
    rails: ArcSwap<Vec<Arc<Rail>>>,
    /// Where the search for the least busy one begins.
    turn: AtomicUsize,
    /// Changes when a rail is back, joins, or is left out.
    news: watch::Sender<u64>,
    /// Why the last rail that was left out was.
    lost: Mutex<Option<Lost>>,
    /// Writes of unknown fate are settled one after the other: the first settles them all.
    settling: tokio::sync::Mutex<()>,
    /// Where the byte goes that shows that a data plane lives.
    probe: OnceLock<Region>,
    /// Bring rails back; end with this.
    healers: Mutex<JoinSet<()>>,
    unbound: AtomicBool,
}

impl Open {
    /// Connects `count` data channels to the data plane, and binds them all to this open with all access to data that it has.
    /// Where the server names several endpoints of a transport, the channels are spread over them.
    ///
    /// # Errors
    /// As [`Open::connect`] and [`Open::bind`]; [`Error::Usage`] if `count` is 0 or more than [`RAILS_MAX`].
    pub async fn stripes(&self, transport: Transport, count: usize) -> Result<Stripes> {
        if count == 0 {
            return Err(Error::Usage("stripes over no channel".into()));
        }
        let stripes = Stripes::new(self)?;
        for _ in 0..count {
            stripes.connect(transport).await?;
        }
        Ok(stripes)
    }
}

impl Stripes {
    /// Over no channel yet: [`Stripes::add`] or [`Stripes::connect`] the first before anything is asked.
    ///
    /// # Errors
    /// [`Error::Usage`] if the open has no access to data.
    pub fn new(open: &Open) -> Result<Self> {
        // Removing and renaming go through control.
        Self::with_access(open, open.access().intersection(Access::READ | Access::WRITE))
    }

    /// As [`Stripes::new`], with less access than the open has.
    ///
    /// # Errors
    /// As [`Stripes::new`].
    pub fn with_access(open: &Open, access: Access) -> Result<Self> {
        if access.intersection(Access::READ | Access::WRITE).is_empty() {
            return Err(Error::Usage("an open without access to data has no use for channels".into()));
        }
        let inner = Inner {
            open: open.clone(),
            access,
            unit: UNIT,
            rails: ArcSwap::default(),
            turn: AtomicUsize::new(0),
            news: watch::Sender::new(0),
            lost: Mutex::new(None),
            settling: tokio::sync::Mutex::default(),
            probe: OnceLock::new(),
            healers: Mutex::default(),
            unbound: AtomicBool::new(false),
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Cuts requests into pieces of so many bytes: from 4 KiB to 64 MiB, rounded into that range. To be said before it
    /// is cloned or used.
    #[must_use]
    pub fn with_unit(mut self, bytes: usize) -> Self {
        if let Some(inner) = Arc::get_mut(&mut self.inner) {
            inner.unit = bytes.clamp(UNIT_MIN, UNIT_MAX);
        }
        self
    }

    /// Binds one more channel, also while requests are under way: the next pieces use it.
    ///
    /// # Errors
    /// As [`Open::bind`]; [`Error::Usage`] for more than [`RAILS_MAX`].
    pub async fn add(&self, channel: &DataChannel) -> Result<()> {
        let inner = &self.inner;
        if inner.rails.load().len() >= RAILS_MAX {
            return Err(Error::Usage(format!("an open is striped over {RAILS_MAX} channels at most")));
        }
        let binding = inner.open.bind_with_access(channel, inner.access).await?;
        inner.join(Arc::new(Rail::new(binding, channel)));
        // Given back meanwhile?
        if inner.unbound.load(Ordering::Acquire) { self.give_back().await } else { Ok(()) }
    }

    /// Connects one more channel of its own, and adds it: to the server's next endpoint of that transport, if it names several.
    ///
    /// # Errors
    /// As [`Open::connect`] and [`Stripes::add`].
    pub async fn connect(&self, transport: Transport) -> Result<DataChannel> {
        let nth = self.inner.rails.load().len();
        let channel = self.inner.open.connect_nth(transport, nth).await?;
        self.add(&channel).await?;
        Ok(channel)
    }

    /// The open it is of.
    pub fn open(&self) -> &Open {
        &self.inner.open
    }

    /// Longest piece of a request, bytes.
    pub fn unit(&self) -> usize {
        self.inner.unit
    }

    /// How each channel stands.
    pub fn rails(&self) -> Vec<RailState> {
        self.inner.rails.load().iter().map(|rail| rail.state()).collect()
    }

    /// Reads file bytes from `file_offset` on into `range`. Returns how many: fewer than asked for at the end of the file, 0
    /// beyond it; what the region holds behind them is of no meaning. When it returns, also with an error, nothing of it is
    /// under way; a call that is dropped may leave requests behind that still are.
    ///
    /// Pieces are read side by side: of a file that grows meanwhile, only what lies before the first end that was met counts.
    ///
    /// # Errors
    /// [`Error::Usage`] for a range outside of the region; and what the server refuses.
    pub async fn read_at(&self, region: &Region, range: Range<usize>, file_offset: u64) -> Result<usize> {
        spread::spread(&self.inner, region, range, file_offset, false).await
    }

    /// Writes the bytes of `range` to the file from `file_offset` on. Returns how many leading bytes were written; of those
    /// behind, some may have been too. The bytes must stay as they are until it returns.
    ///
    /// # Errors
    /// As [`Stripes::read_at`]; and those of writes through a [`crate::Binding`].
    pub async fn write_at(&self, region: &Region, range: Range<usize>, file_offset: u64) -> Result<usize> {
        spread::spread(&self.inner, region, range, file_offset, true).await
    }

    /// Writes all of `range`, or fails.
    ///
    /// # Errors
    /// As [`Stripes::write_at`]; [`Status::NoSpace`] if the server takes no more.
    pub async fn write_all(&self, region: &Region, range: Range<usize>, file_offset: u64) -> Result<()> {
        let (wanted, write) = (range.len(), |part, at| self.write_at(region, part, at));
        if binding::whole(range, file_offset, write).await? < wanted {
            return Err(Error::refused(Status::NoSpace));
        }
        Ok(())
    }

    /// Makes the writes acknowledged so far durable, whichever channel they went through: all handles are of one open file
    /// description, so one flush covers them. Writes that have not been answered when it begins are not covered: wait for
    /// those first.
    ///
    /// # Errors
    /// As [`crate::Binding::flush`].
    pub async fn flush(&self) -> Result<()> {
        self.flush_as(false).await
    }

    /// As [`Stripes::flush`], for the data and the size alone (`fdatasync`).
    ///
    /// # Errors
    /// As [`Stripes::flush`].
    pub async fn flush_data(&self) -> Result<()> {
        self.flush_as(true).await
    }

    async fn flush_as(&self, data_only: bool) -> Result<()> {
        let inner = &self.inner;
        let mut patience = Patience::new(inner.open.session().config());
        loop {
            let (rail, seat) = inner.rail(&mut patience).await?;
            match rail.binding.flush_once(&seat, data_only).await {
                Err(error) if is_wanted(&error) => inner.failed(&rail, seat),
                outcome => return outcome,
            }
        }
    }

    /// Gives all handles back, for every clone. Requests under way should have been answered before.
    ///
    /// # Errors
    /// What the server refuses; the others are given back all the same.
    pub async fn unbind(&self) -> Result<()> {
        let Some(claim) = Claim::take(&self.inner.unbound) else { return Ok(()) };
        self.inner.healers.lock().abort_all();
        let outcome = self.give_back().await;
        claim.keep();
        outcome
    }

    async fn give_back(&self) -> Result<()> {
        let rails = self.inner.rails.swap(Arc::default());
        // Who waits for a rail waits in vain.
        self.inner.tell();
        let mut outcome = Ok(());
        for rail in rails.iter() {
            let given = rail.binding.unbind().await;
            if outcome.is_ok() {
                outcome = given;
            }
        }
        outcome
    }
}

/// True if a request that ended so goes to another channel. A channel that this side has closed is one that has dropped out, too.
fn is_wanted(error: &Error) -> bool {
    rebind::is_wanted(error) || matches!(error, Error::Ended { what: "channel", why: crate::Ended::Closed })
}

impl std::fmt::Debug for Stripes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Stripes")
            .field("open", &self.inner.open.id())
            .field("rails", &self.inner.rails.load().len())
            .finish_non_exhaustive()
    }
}
