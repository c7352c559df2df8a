//! [`Heat`]: which parts of a file are worth mapping. Pure: the time is told, and what is mapped is a value of the caller's.
//!
//! ```text
//!             read often, not written lately               granted
//!   (none) ──► Cold ───────────────────────────► Making ──────────────► Mapped ── reads within it go one-sided
//!               ▲ ▲                                 │                     │
//!               │ └── not before a while, which ◄───┘ refused             │ lost; written too often; for a hotter one
//!               │     grows each time                                     │
//!               └─────────────────────────────────────────────────────────┘
//! ```
//!
//! An extent is hot when it has been read *several times over*, and lately. Each read scores its bytes; one that does not go on
//! where the one before it ended scores as a longer one, since a queue pair's answer without the server is worth more than
//! the bytes of a short read. The score halves each second, so who passes through a file once, or reads here and there
//! in one that is large, never has anything of it mapped.

mod score;

use score::{HALF_LIFE_MS, Score};
#[cfg(test)]
use score::{HOT_SCORE, READ_SCORE};

/// Length of an extent, bytes. An extent is mapped whole, as far as the file goes.
pub(super) const EXTENT_BYTES: u64 = 8 << 20;
/// Extents that are remembered.
const EXTENTS_MAX: usize = 64;
/// A mapped extent with so many reads in the time of a review may be let go for a hotter one.
const QUIET_READS: u32 = 16;
/// A write of a mapped extent weighs as much as so many reads.
const WRITE_WEIGHT: u32 = 16;
/// Reads in hand when an extent is mapped, and at most: when writes have used them up, it is let go.
const CREDIT_FIRST: u32 = 8 * WRITE_WEIGHT;
const CREDIT_MAX: u32 = 64 * WRITE_WEIGHT;
/// An extent that was written is not mapped for so long.
const WRITTEN_MS: u64 = 1_000;
/// The first wait after a loss or a refusal; each further one doubles it, up to the longest.
const COOL_MS: u64 = 1_000;
const COOL_MS_MAX: u64 = 64_000;

/// The extents of one file as one binding reads them. `M` is a mapping.
#[derive(Debug)]
pub(super) struct Heat<M> {
    extents: Vec<Extent<M>>,
    mapped_max: usize,
    /// Counts uses, for the least recent one.
    turn: u64,
    /// Tells one mapping of an extent from the next.
    serial: u64,
    /// One at a time.
    making: bool,
    reviewed_ms: u64,
    /// The server's limit was met: none is asked for before.
    limited_until_ms: u64,
    limited: u32,
}

#[derive(Debug)]
struct Extent<M> {
    number: u64,
    used: u64,
    /// Losses and refusals in a row.
    failures: u32,
    not_before_ms: u64,
    /// Where the file ended when it was last mapped, if it did within; and how often it was found so.
    tail: (u64, u32),
    state: State<M>,
}

#[derive(Debug)]
enum State<M> {
    Cold(Score),
    Making,
    Mapped(Mapped<M>),
}

#[derive(Debug)]
struct Mapped<M> {
    mapping: M,
    serial: u64,
    /// Where it ends in the file: before the extent's end if the file did.
    end: u64,
    since_ms: u64,
    /// Reads that went beyond its end.
    beyond: Score,
    credit: u32,
    /// Reads since the last review, and in the time before that.
    reads: u32,
    rate: u32,
}

/// Names a mapping of an extent.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Place {
    number: u64,
    serial: u64,
}

/// An extent to be mapped now, and the mapping that is let go for it.
#[derive(Debug)]
pub(super) struct Wish<M> {
    pub(super) number: u64,
    pub(super) let_go: Option<M>,
}

/// Why an extent was not mapped.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Refused {
    /// There are too many mappings: another extent would fare no better.
    Limit,
    /// This one can't be had now.
    ForNow,
}

/// How long to wait after so many failures in a row.
fn cooling_ms(failures: u32) -> u64 {
    let doublings = failures.saturating_sub(1).min(16);
    (COOL_MS << doublings).min(COOL_MS_MAX)
}

/// The extent in which a read or write lies wholly.
fn number_of(offset: u64, length: u64) -> Option<u64> {
    let last = offset.checked_add(length.checked_sub(1)?)?;
    (offset / EXTENT_BYTES == last / EXTENT_BYTES).then_some(offset / EXTENT_BYTES)
}

/// Where an extent begins in the file.
pub(super) fn start_of(number: u64) -> u64 {
    number.saturating_mul(EXTENT_BYTES)
}

impl<M: Clone> Heat<M> {
    /// With `mapped_max` mappings at most, those being made included.
    pub(super) fn new(mapped_max: usize) -> Self {
        Self {
            extents: Vec::new(),
            mapped_max,
            turn: 0,
            serial: 0,
            making: false,
            reviewed_ms: 0,
            limited_until_ms: 0,
            limited: 0,
        }
    }

    /// What remains for the binding's next seat: what was mapped or being made cools down, and scores and waits stay.
    /// The mappings are let go.
    pub(super) fn succeed(&mut self, now_ms: u64, mapped_max: usize) -> (Self, Vec<M>) {
        let mut next = std::mem::replace(self, Self::new(0));
        next.mapped_max = mapped_max;
        next.making = false;
        let mut let_go = Vec::new();
        for extent in &mut next.extents {
            match std::mem::replace(&mut extent.state, State::Cold(Score::default())) {
                State::Cold(score) => extent.state = State::Cold(score),
                State::Making => extent.fail(now_ms, 0),
                State::Mapped(mapped) => {
                    extent.fail(now_ms, now_ms.saturating_sub(mapped.since_ms));
                    let_go.push(mapped.mapping);
                }
            }
        }
        (next, let_go)
    }

    /// The mapping by which all of a range can be read. Counts the read if there is one.
    pub(super) fn find(&mut self, offset: u64, length: u64) -> Option<(Place, M)> {
        let number = number_of(offset, length)?;
        let extent = self.extents.iter_mut().find(|extent| extent.number == number)?;
        let State::Mapped(mapped) = &mut extent.state else { return None };
        if offset.saturating_add(length) > mapped.end {
            return None;
        }
        self.turn += 1;
        extent.used = self.turn;
        mapped.reads = mapped.reads.saturating_add(1);
        mapped.credit = (mapped.credit + 1).min(CREDIT_MAX);
        Some((Place { number, serial: mapped.serial }, mapped.mapping.clone()))
    }

    /// Counts a read that goes to the server. Says if its extent is to be mapped now: then [`Heat::made`] or [`Heat::refused`]
    /// follows.
    pub(super) fn read(&mut self, now_ms: u64, offset: u64, length: u64) -> Option<Wish<M>> {
        let number = number_of(offset, length)?;
        self.review(now_ms);
        let index = self.remembered(now_ms, number)?;
        self.turn += 1;
        let extent = &mut self.extents[index];
        extent.used = self.turn;
        let hot = match &mut extent.state {
            State::Making => false,
            State::Cold(score) => {
                score.add(now_ms, offset, length);
                score.is_hot()
            }
            State::Mapped(mapped) if offset.saturating_add(length) <= mapped.end => false,
            // The file has grown since, perhaps.
            State::Mapped(mapped) => {
                mapped.beyond.add(now_ms, offset, length);
                mapped.beyond.is_hot()
            }
        };
        let waits = now_ms < extent.not_before_ms || now_ms < self.limited_until_ms;
        if !hot || waits || self.making {
            return None;
        }
        let let_go = match &self.extents[index].state {
            State::Mapped(_) => Some(index),
            _ if self.mapped() < self.mapped_max => None,
            _ => Some(self.least()?),
        };
        let let_go = let_go.and_then(|at| match std::mem::replace(&mut self.extents[at].state, cold()) {
            State::Mapped(mapped) => Some(mapped.mapping),
            _ => None,
        });
        self.extents[index].state = State::Making;
        self.making = true;
        Some(Wish { number, let_go })
    }

    /// A wish was granted, up to `end` in the file. Gives the mapping back if nobody wants it any more.
    pub(super) fn made(&mut self, now_ms: u64, number: u64, mapping: M, end: u64) -> Option<M> {
        self.serial += 1;
        let serial = self.serial;
        let Some(extent) = self.wished(number) else { return Some(mapping) };
        if end < start_of(number).saturating_add(EXTENT_BYTES) {
            // The file ends within. Until it is asked again whether it has grown, a while passes: longer each time in vain.
            let (before, times) = extent.tail;
            extent.tail = (end, if before == end { times.saturating_add(1) } else { 1 });
            extent.not_before_ms = now_ms + cooling_ms(extent.tail.1);
        }
        extent.state = State::Mapped(Mapped {
            mapping,
            serial,
            end,
            since_ms: now_ms,
            beyond: Score::default(),
            credit: CREDIT_FIRST,
            reads: 0,
            rate: u32::MAX,
        });
        self.limited = 0;
        None
    }

    /// A wish was not granted.
    pub(super) fn refused(&mut self, now_ms: u64, number: u64, why: Refused) {
        let Some(extent) = self.wished(number) else { return };
        extent.state = cold();
        match why {
            Refused::ForNow => extent.fail(now_ms, 0),
            Refused::Limit => self.limit(now_ms),
        }
    }

    /// A mapping has turned out to be of no use any more: it is let go.
    pub(super) fn lost(&mut self, now_ms: u64, place: Place) -> Option<M> {
        let extent = self.extents.iter_mut().find(|extent| extent.number == place.number)?;
        match std::mem::replace(&mut extent.state, cold()) {
            State::Mapped(mapped) if mapped.serial == place.serial => {
                extent.fail(now_ms, now_ms.saturating_sub(mapped.since_ms));
                Some(mapped.mapping)
            }
            // Somebody else has noticed before.
            other => {
                extent.state = other;
                None
            }
        }
    }

    /// A range is being written. The mappings that are written too often are let go.
    pub(super) fn wrote(&mut self, now_ms: u64, offset: u64, length: u64) -> Vec<M> {
        let mut let_go = Vec::new();
        let last = offset.saturating_add(length.saturating_sub(1)) / EXTENT_BYTES;
        for extent in &mut self.extents {
            if !(offset / EXTENT_BYTES..=last).contains(&extent.number) {
                continue;
            }
            if let State::Mapped(mapped) = &mut extent.state {
                mapped.credit = mapped.credit.saturating_sub(WRITE_WEIGHT);
                if mapped.credit > 0 {
                    continue;
                }
            } else if matches!(extent.state, State::Making) {
                continue;
            }
            extent.not_before_ms = extent.not_before_ms.max(now_ms + WRITTEN_MS);
            if let State::Mapped(mapped) = std::mem::replace(&mut extent.state, cold()) {
                let_go.push(mapped.mapping);
            }
        }
        let_go
    }

    /// Mappings that there are, and one that is being made.
    pub(super) fn mapped(&self) -> usize {
        self.extents.iter().filter(|extent| !matches!(extent.state, State::Cold(_))).count()
    }

    /// As if the server's limit had been met.
    pub(super) fn limit(&mut self, now_ms: u64) {
        self.limited = self.limited.saturating_add(1);
        self.limited_until_ms = now_ms + cooling_ms(self.limited);
    }

    /// The mapping that is being made is not wanted any more. False if there is none.
    pub(super) fn forget_making(&mut self) -> bool {
        let making = |extent: &&mut Extent<M>| matches!(extent.state, State::Making);
        self.extents.iter_mut().find(making).map(|extent| extent.state = cold()).is_some()
    }

    /// Lets every mapping go.
    pub(super) fn clear(&mut self) -> Vec<M> {
        let mut let_go = Vec::new();
        self.extents.retain_mut(|extent| {
            if matches!(extent.state, State::Mapped(_)) {
                if let State::Mapped(mapped) = std::mem::replace(&mut extent.state, cold()) {
                    let_go.push(mapped.mapping);
                }
                return false;
            }
            true
        });
        let_go
    }

    /// The extent whose mapping was wished for. Nothing is being made from now on.
    fn wished(&mut self, number: u64) -> Option<&mut Extent<M>> {
        self.making = false;
        let wished =
            |extent: &&mut Extent<M>| extent.number == number && matches!(extent.state, State::Making);
        self.extents.iter_mut().find(wished)
    }

    fn review(&mut self, now_ms: u64) {
        if now_ms.saturating_sub(self.reviewed_ms) < HALF_LIFE_MS {
            return;
        }
        self.reviewed_ms = now_ms;
        for extent in &mut self.extents {
            if let State::Mapped(mapped) = &mut extent.state {
                mapped.rate = std::mem::take(&mut mapped.reads);
            }
        }
    }

    /// The mapped extent that was read the longest ago, of those that are hardly read.
    fn least(&self) -> Option<usize> {
        let quiet = |extent: &Extent<M>| match &extent.state {
            State::Mapped(mapped) => mapped.reads.max(mapped.rate) <= QUIET_READS,
            _ => false,
        };
        let quiet = self.extents.iter().enumerate().filter(|(_, extent)| quiet(extent));
        quiet.min_by_key(|(_, extent)| extent.used).map(|(index, _)| index)
    }

    /// Where an extent is remembered: as from now, if it was not. One that waits is not forgotten for it.
    fn remembered(&mut self, now_ms: u64, number: u64) -> Option<usize> {
        if let Some(index) = self.extents.iter().position(|extent| extent.number == number) {
            return Some(index);
        }
        let new =
            Extent { number, used: self.turn, failures: 0, not_before_ms: 0, tail: (0, 0), state: cold() };
        if self.extents.len() < EXTENTS_MAX {
            self.extents.push(new);
            return Some(self.extents.len() - 1);
        }
        let idle =
            |extent: &Extent<M>| matches!(extent.state, State::Cold(_)) && extent.not_before_ms <= now_ms;
        let idle = self.extents.iter().enumerate().filter(|(_, extent)| idle(extent));
        let index = idle.min_by_key(|(_, extent)| extent.used).map(|(index, _)| index)?;
        self.extents[index] = new;
        Some(index)
    }
}

fn cold<M>() -> State<M> {
    State::Cold(Score::default())
}

impl<M> Extent<M> {
    /// Cools down, after so long a life as a mapping: one that was long begins the waits anew.
    fn fail(&mut self, now_ms: u64, lived_ms: u64) {
        self.failures = if lived_ms >= COOL_MS_MAX { 1 } else { self.failures.saturating_add(1) };
        self.not_before_ms = now_ms + cooling_ms(self.failures);
    }
}

#[cfg(test)]
mod tests;
