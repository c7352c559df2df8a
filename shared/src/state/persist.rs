//! Persist before reply: what the authority says waits until the journal has what it relies on.
//!
//! ```text
//!  one call:   Fence  Reply a │ Persist 7  Reply b  Persist 8  CloseFile
//!                  │     │    │     │         └────────┬───────────┘
//!                  ▼     ▼    │     ▼                  ▼
//!                 at once     │  at once        held until Persisted(8)
//! ```
//!
//! Numbers rise by one. A later call that relies on an earlier one's records, but has none of its own, says so with
//! [`Authority::defer`]. Fences are never held, nor are rules that forbid more than before: they take nothing away that a
//! crash would have to give back. Rules that forbid less are held by [`Authority::hold`].

use super::{Authority, Effect, refusal};
use crate::journal::record::Record;
use crate::types::Status;
use crate::wire::control::Refusal;
use std::collections::BTreeMap;

#[derive(Debug, Default)]
pub(super) struct Journal {
    /// The highest number given.
    pub(super) last: u64,
    /// The highest number that is durable.
    pub(super) durable: u64,
    /// There is room for the ends of things only.
    pub(super) full: bool,
    /// What waits for each number.
    held: BTreeMap<u64, Vec<Effect>>,
}

impl Journal {
    /// Numbering goes on behind a journal that was read.
    pub(super) fn after(last: u64) -> Self {
        Self { last, durable: last, ..Self::default() }
    }

    /// Lets go of what one call may say at once, and holds the rest.
    pub(super) fn gate(&mut self, effects: Vec<Effect>, out: &mut Vec<Effect>) {
        let number = |effect: &Effect| match effect {
            Effect::Persist { sequence, .. } => Some(*sequence),
            _ => None,
        };
        let Some(last) = effects.iter().rev().find_map(number) else { return out.extend(effects) };
        let mut persisting = false;
        for effect in effects {
            persisting |= number(&effect).is_some();
            let free = matches!(
                effect,
                Effect::Persist { .. } | Effect::Fence(_) | Effect::FenceOverdue(_) | Effect::Restrict(_)
            );
            if free || !persisting {
                out.push(effect);
            } else {
                self.held.entry(last).or_default().push(effect);
            }
        }
    }

    /// How much waits.
    pub(super) fn held(&self) -> usize {
        self.held.values().map(Vec::len).sum()
    }

    /// True if nothing waits for what is durable already, and numbers are in order.
    pub(super) fn is_consistent(&self) -> bool {
        self.durable <= self.last
            && self.held.first_key_value().is_none_or(|(first, _)| *first > self.durable)
            && self.held.last_key_value().is_none_or(|(last, _)| *last <= self.last)
    }
}

impl Authority {
    /// Writes a record. Answers its number.
    pub(super) fn persist(&mut self, record: Record, effects: &mut Vec<Effect>) -> u64 {
        self.journal.last += 1;
        let sequence = self.journal.last;
        let releasing = !matches!(
            record,
            Record::Started(_) | Record::Opened(_) | Record::Resumed(_) | Record::Locked(_)
        );
        effects.push(Effect::Persist { sequence, record: Box::new(record), releasing });
        sequence
    }

    /// Says something when a record is durable: at once if it is.
    pub(super) fn defer(&mut self, until: u64, effect: Effect, effects: &mut Vec<Effect>) {
        // What this call writes itself holds all that follows it.
        let writes = || effects.iter().any(|effect| matches!(effect, Effect::Persist { .. }));
        if until <= self.journal.durable || writes() {
            effects.push(effect);
        } else {
            self.journal.held.entry(until).or_default().push(effect);
        }
    }

    /// Says something when all that was written so far is durable: for what changes the world without a record of its
    /// own.
    pub(super) fn defer_all(&mut self, effect: Effect, effects: &mut Vec<Effect>) {
        self.defer(self.journal.last, effect, effects);
    }

    /// Holds what would be let go at once otherwise until a record is durable.
    pub(super) fn hold(&mut self, until: u64, effect: Effect, effects: &mut Vec<Effect>) {
        if until <= self.journal.durable {
            effects.push(effect);
        } else {
            self.journal.held.entry(until).or_default().push(effect);
        }
    }

    pub(super) fn persisted(&mut self, sequence: u64, effects: &mut Vec<Effect>) {
        let durable = sequence.min(self.journal.last).max(self.journal.durable);
        self.journal.durable = durable;
        let later = self.journal.held.split_off(&durable.saturating_add(1));
        let free = std::mem::replace(&mut self.journal.held, later);
        effects.extend(free.into_values().flatten());
    }

    /// Refuses what must be written while there is no room for it.
    pub(super) fn have_room(&self) -> Result<(), Refusal> {
        if self.journal.full {
            return Err(Refusal {
                retry_ms: Some(1000),
                ..refusal(Status::NoSpace, "the journal has no room for it")
            });
        }
        Ok(())
    }
}
