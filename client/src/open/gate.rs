//! [`Gate`]: whether an open may be read and written at this moment, in one word that every request loads.

use crate::error::{Error, Result};
use crate::recovery::Over;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

const CHANGED: u64 = 1;
const OVER: u64 = 2;
const SHUT: u64 = CHANGED | OVER;
/// One more change.
const TURN: u64 = 4;

/// Open, changed or over; and how often the file was found changed. What was begun at one count must not be repeated at
/// another.
#[derive(Default)]
pub(crate) struct Gate {
    word: AtomicU64,
    over: OnceLock<Over>,
}

impl Gate {
    /// The count of changes, if the way is free.
    pub(crate) fn check(&self) -> Result<u64> {
        let word = self.word.load(Ordering::Acquire);
        if word & SHUT == 0 { Ok(word) } else { Err(self.error(word)) }
    }

    #[cold]
    fn error(&self, word: u64) -> Error {
        match self.over.get() {
            Some(over) if word & OVER != 0 => over.error(),
            _ => Error::Changed,
        }
    }

    /// Why the open is over, if it is.
    pub(crate) fn over(&self) -> Option<&Over> {
        self.over.get()
    }

    /// The file was changed by somebody else.
    pub(crate) fn changed(&self) {
        let next = |word: u64| Some((word + TURN) | CHANGED);
        let _ = self.word.fetch_update(Ordering::AcqRel, Ordering::Acquire, next);
    }

    /// The application knows. True if there was something to know.
    pub(crate) fn accept(&self) -> bool {
        self.word.fetch_and(!CHANGED, Ordering::AcqRel) & CHANGED != 0
    }

    /// It is over; the first reason stays. True for the first.
    pub(crate) fn end(&self, over: &Over) -> bool {
        let first = self.over.set(over.clone()).is_ok();
        self.word.fetch_or(OVER, Ordering::AcqRel);
        first
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Ended;

    #[test]
    fn a_change_shuts_until_it_is_accepted_and_is_counted() {
        let gate = Gate::default();
        let before = gate.check().unwrap();
        assert!(!gate.accept());
        gate.changed();
        assert!(matches!(gate.check(), Err(Error::Changed)));
        assert!(gate.accept() && !gate.accept());
        assert_ne!(gate.check().unwrap(), before, "what was begun before is of another time");
    }

    #[test]
    fn the_end_is_final() {
        let gate = Gate::default();
        assert!(gate.end(&Over::Ended(Ended::Closed)) && !gate.end(&Over::Ended(Ended::BadMac)));
        gate.changed();
        gate.accept();
        assert!(matches!(gate.check(), Err(Error::Ended { why: Ended::Closed, .. })));
    }
}
