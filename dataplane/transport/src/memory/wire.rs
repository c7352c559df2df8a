//! What joins the two sides: their queues, the operations taking effect in order, and the faults.

use crate::channel::{ChannelError, Completion, Kind, Operation, OperationError};
use crate::region_table::{RegionTable, Target, Wanted};
use holdfast_shared::types::RegionDescriptor;
use holdfast_verbs::memory::Buffer;
use parking_lot::Mutex;
use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// One end of the pair.
pub(super) struct Side {
    /// Sends, Places and Fetches that have not taken effect.
    queue: VecDeque<(u64, Operation)>,
    /// Fetches that are held, and have been overtaken.
    held: VecDeque<(u64, Buffer, RegionDescriptor)>,
    receives: VecDeque<(u64, Buffer)>,
    pub(super) ready: VecDeque<Completion>,
    pub(super) end: Option<ChannelError>,
    /// Something happened since the last poll.
    news: bool,
    /// The owner sleeps, or is about to.
    armed: bool,
    wake: Arc<OwnedFd>,
    table: Arc<RegionTable>,
}

impl Side {
    pub(super) fn new(wake: Arc<OwnedFd>, table: Arc<RegionTable>) -> Self {
        Self {
            queue: VecDeque::new(),
            held: VecDeque::new(),
            receives: VecDeque::new(),
            ready: VecDeque::new(),
            end: None,
            news: false,
            armed: false,
            wake,
            table,
        }
    }

    fn complete(&mut self, token: u64, operation: Operation, outcome: Result<usize, OperationError>) {
        let kind = operation.kind();
        let (Operation::Send { buffer, .. }
        | Operation::Recv { buffer }
        | Operation::Place { buffer, .. }
        | Operation::Fetch { buffer, .. }) = operation;
        self.ready.push_back(Completion::new(token, kind, buffer, outcome));
        self.news = true;
    }

    fn finish(&mut self, error: ChannelError) {
        if self.end.is_some() {
            return;
        }
        self.end = Some(error);
        self.news = true;
        let flushed = Err(OperationError::Flushed);
        for (token, operation) in std::mem::take(&mut self.queue) {
            self.complete(token, operation, flushed);
        }
        for (token, buffer, remote) in std::mem::take(&mut self.held) {
            self.complete(token, Operation::Fetch { buffer, remote }, flushed);
        }
        for (token, buffer) in std::mem::take(&mut self.receives) {
            self.complete(token, Operation::Recv { buffer }, flushed);
        }
    }

    fn wake(&mut self) {
        if self.armed && self.news {
            self.armed = false;
            // Fails only if the counter is full, and then the descriptor is readable.
            let _ = rustix::io::write(&*self.wake, &1u64.to_ne_bytes());
        }
    }

    /// Everything that happened has been, or is being, handed out.
    pub(super) fn seen(&mut self) {
        self.news = false;
    }

    /// True if the owner may sleep.
    pub(super) fn arm(&mut self) -> bool {
        let mut count = [0; 8];
        // Empties the event counter; there may be nothing in it.
        let _ = rustix::io::read(&*self.wake, &mut count);
        self.armed = !self.news;
        self.armed
    }

    pub(super) fn submit(&mut self, token: u64, operation: Operation) {
        match operation {
            Operation::Recv { buffer } => self.receives.push_back((token, buffer)),
            other => self.queue.push_back((token, other)),
        }
    }
}

/// Both sides. All that happens, happens in [`Wire::advance`].
pub(super) struct Wire {
    pub(super) sides: [Side; 2],
    hold_place: bool,
    hold_fetch: bool,
    /// Operations that took effect, of both sides.
    effects: u64,
    drop_at: Option<u64>,
}

/// What one attempt at the head of a queue did.
enum Step {
    Stuck,
    Moved,
    Failed { ours: OperationError, theirs: ChannelError },
}

impl Wire {
    fn set_hold(&mut self, kind: Kind, hold: bool) {
        match kind {
            Kind::Place => self.hold_place = hold,
            Kind::Fetch => self.hold_fetch = hold,
            Kind::Send | Kind::Recv => {}
        }
        self.advance();
    }

    pub(super) fn new(sides: [Side; 2]) -> Self {
        Self { sides, hold_place: false, hold_fetch: false, effects: 0, drop_at: None }
    }

    /// Lets everything take effect that can, and wakes who has news.
    pub(super) fn advance(&mut self) {
        let mut moved = true;
        while moved {
            moved = self.step(0) | self.step(1);
        }
        self.sides.iter_mut().for_each(Side::wake);
    }

    pub(super) fn close(&mut self, side: usize) {
        let [ours, theirs] = self.split(side);
        ours.finish(ChannelError::Closed);
        theirs.finish(ChannelError::Disconnected);
        self.sides.iter_mut().for_each(Side::wake);
    }

    fn split(&mut self, side: usize) -> [&mut Side; 2] {
        let [a, b] = &mut self.sides;
        if side == 0 { [a, b] } else { [b, a] }
    }

    fn step(&mut self, side: usize) -> bool {
        let (hold_place, hold_fetch) = (self.hold_place, self.hold_fetch);
        let drops = self.drop_at.is_some_and(|at| self.effects >= at);
        let [ours, theirs] = self.split(side);
        if ours.end.is_some() || theirs.end.is_some() {
            return false;
        }
        if !hold_fetch && !drops {
            if let Some((token, buffer, remote)) = ours.held.pop_front() {
                ours.queue.push_front((token, Operation::Fetch { buffer, remote }));
            }
        }
        let Some((token, mut operation)) = ours.queue.pop_front() else { return false };
        if drops {
            ours.queue.push_front((token, operation));
            ours.finish(ChannelError::Disconnected);
            theirs.finish(ChannelError::Disconnected);
            return false;
        }
        if hold_fetch {
            if let Operation::Fetch { buffer, remote } = operation {
                ours.held.push_back((token, buffer, remote));
                return true;
            }
        }
        let is_held = hold_place && matches!(operation, Operation::Place { .. });
        match if is_held { Step::Stuck } else { take_effect(&mut operation, theirs) } {
            Step::Stuck => {
                ours.queue.push_front((token, operation));
                false
            }
            Step::Moved => {
                let length = match &operation {
                    Operation::Send { length, .. } => *length,
                    Operation::Place { remote, .. } | Operation::Fetch { remote, .. } => {
                        remote.length() as usize
                    }
                    Operation::Recv { .. } => 0,
                };
                ours.complete(token, operation, Ok(length));
                self.effects += 1;
                true
            }
            Step::Failed { ours: error, theirs: end } => {
                ours.complete(token, operation, Err(error));
                ours.finish(ChannelError::Transport(error.to_string()));
                theirs.finish(end);
                false
            }
        }
    }
}

fn take_effect(operation: &mut Operation, theirs: &mut Side) -> Step {
    const NOT_ALLOWED: Step = Step::Failed {
        ours: OperationError::RemoteAccess,
        theirs: ChannelError::Misbehaved("it names memory that it may not"),
    };
    match operation {
        Operation::Send { buffer, length } => {
            let Some((token, mut room)) = theirs.receives.pop_front() else { return Step::Stuck };
            let from = buffer.get(..*length).unwrap_or_default();
            let Some(to) = room.get_mut(..*length) else {
                theirs.complete(token, Operation::Recv { buffer: room }, Err(OperationError::Length));
                return Step::Failed {
                    ours: OperationError::Length,
                    theirs: ChannelError::Misbehaved("its message is longer than the buffer for it"),
                };
            };
            to.copy_from_slice(from);
            let done = Completion::new(token, Kind::Recv, room, Ok(*length));
            theirs.ready.push_back(done);
            theirs.news = true;
            Step::Moved
        }
        Operation::Place { remote, .. } | Operation::Fetch { remote, .. } if remote.length() == 0 => {
            Step::Moved
        }
        Operation::Place { buffer, remote } => {
            let moved = reach(theirs, *remote, Wanted::Place, |target| {
                let from = buffer.get(..target.length()).unwrap_or_default();
                target.region().copy_in(target.rest(0).start, from).is_ok()
            });
            if moved { Step::Moved } else { NOT_ALLOWED }
        }
        Operation::Fetch { buffer, remote } => {
            let moved = reach(theirs, *remote, Wanted::Fetch, |target| {
                let to = buffer.get_mut(..target.length()).unwrap_or_default();
                target.region().copy_out(target.rest(0).start, to).is_ok()
            });
            if moved { Step::Moved } else { NOT_ALLOWED }
        }
        Operation::Recv { .. } => Step::Moved,
    }
}

/// Finds what `remote` names and moves bytes while it can't be withdrawn. False if that is not allowed.
fn reach(side: &Side, remote: RegionDescriptor, wanted: Wanted, copy: impl FnOnce(&Target) -> bool) -> bool {
    let Some(target) = side.table.find(remote, wanted) else { return false };
    let Some(_live) = target.lock() else { return false };
    copy(&target)
}

/// Faults of one pair, from any thread.
#[derive(Clone)]
pub struct Faults(pub(super) Arc<Mutex<Wire>>);

impl Faults {
    /// From now on operations of this kind (Place or Fetch) do not take effect. A held Place holds up what was
    /// submitted after it; a held Fetch is overtaken.
    pub fn hold(&self, kind: Kind) {
        self.set(kind, true);
    }

    /// Lets those held, and later ones, take effect.
    pub fn release(&self, kind: Kind) {
        self.set(kind, false);
    }

    /// Lets those held now take effect, and none that come later.
    pub fn step(&self, kind: Kind) {
        let mut wire = self.0.lock();
        wire.set_hold(kind, false);
        wire.set_hold(kind, true);
    }

    fn set(&self, kind: Kind, hold: bool) {
        self.0.lock().set_hold(kind, hold);
    }

    /// Operations of both sides that were submitted and polled, and have not taken effect.
    pub fn held(&self) -> usize {
        self.0.lock().sides.iter().map(|side| side.queue.len() + side.held.len()).sum()
    }

    /// Operations of both sides that have taken effect.
    pub fn effects(&self) -> u64 {
        self.0.lock().effects
    }

    /// The connection is lost when `count` operations, counted from its beginning, have taken effect and one more is
    /// about to.
    pub fn drop_at(&self, count: u64) {
        self.0.lock().drop_at = Some(count);
    }

    /// As [`Faults::drop_at`], at a number below `within` (at least one) that `seed` decides. Returns it.
    pub fn drop_at_random(&self, seed: u64, within: u64) -> u64 {
        // splitmix64
        let mut z = seed.wrapping_add(0x9E37_79B9_7F4A_7C15);
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        let count = (z ^ (z >> 31)) % within.max(1);
        self.drop_at(count);
        count
    }
}
