//! Changes of a file's size, which wait until dataplane serves nothing of the file one-sided.
//!
//! ```text
//!   Perform(size) ─► Withdraw ─► dataplane: nothing is mapped any more, nor will be ─► Withdrawn ─► work ─► Performed
//!                       ▲                                                                                     │
//!                       └── again, on each new link                                            Mappable ◄─────┘
//! ```
//!
//! What is mapped is pinned, and is served as it was though the file has lost it. So nobody is told that a file was cut short
//! while a client can still read what is gone: *fence before grant*, as ever. A dataplane that has not registered maps nothing new, but
//! what it had mapped it still serves while it lives: the change waits for its link, or its end. If dataplane maps nothing at
//! all, nothing waits.

use super::{Driver, OperationId};
use holdfast_shared::state::{Subject, Work};
use holdfast_shared::wire::link::{MAPPABLE_AS_SAID, ToDataplane, Withdraw};

/// A change that waits or is under way.
pub(super) struct Shrinking {
    withdraw: Withdraw,
    /// `None` once it is under way.
    work: Option<Work>,
}

impl Driver {
    /// Does work, and what must be done before.
    pub(super) fn perform(&mut self, operation: OperationId, work: Work) {
        let sized = match &work {
            Work::SetAttributes(Subject::File(file), changes) if changes.size.is_some() => Some(*file),
            _ => None,
        };
        let maps = match (&self.link, &self.silent) {
            (Some(link), _) => link.maps,
            (None, Some(silent)) => silent.maps,
            (None, None) => false,
        };
        let stat = match sized {
            // Of a descriptor of ours, which is no work for a thread of its own.
            Some(file) if maps => self.fd(file).ok().and_then(|fd| rustix::fs::fstat(&fd).ok()),
            _ => None,
        };
        match stat {
            Some(stat) => {
                let withdraw = Withdraw { id: self.next_withdraw(), device: stat.st_dev, inode: stat.st_ino };
                self.shrinking.insert(operation, Shrinking { withdraw, work: Some(work) });
                self.to_dataplane(ToDataplane::Withdraw(withdraw), None);
            }
            None => self.work(operation, work),
        }
    }

    /// A number that no answer to an earlier question bears, not even to one of an earlier control: those may still come.
    fn next_withdraw(&mut self) -> u64 {
        self.last_withdraw = self.last_withdraw.max(super::wall_ms() << 16) + 1;
        self.last_withdraw
    }

    /// Nothing of a file is mapped any more.
    pub(super) fn withdrawn(&mut self, id: u64) {
        let answered = self.shrinking.iter_mut().find(|(_, shrinking)| shrinking.withdraw.id == id);
        if let Some((operation, work)) =
            answered.and_then(|(id, shrinking)| Some((*id, shrinking.work.take()?)))
        {
            self.work(operation, work);
        }
    }

    /// Work has ended.
    pub(super) fn performed(&mut self, operation: OperationId) {
        if let Some(shrinking) = self.shrinking.remove(&operation) {
            self.to_dataplane(ToDataplane::Mappable(shrinking.withdraw.id), None);
        }
    }

    /// A dataplane has registered, which keeps to what was asked before until it is told otherwise. What waits or is under way
    /// is asked again.
    pub(super) fn withdraw_again(&mut self) {
        let mut all = std::mem::take(&mut self.shrinking);
        for shrinking in all.values_mut() {
            shrinking.withdraw.id = self.next_withdraw();
            self.to_dataplane(ToDataplane::Withdraw(shrinking.withdraw), None);
        }
        self.shrinking = all;
        self.to_dataplane(ToDataplane::Mappable(MAPPABLE_AS_SAID), None);
    }

    /// There is no dataplane that maps anything.
    pub(super) fn nothing_is_mapped(&mut self) {
        let waiting: Vec<u64> = self.shrinking.values().map(|shrinking| shrinking.withdraw.id).collect();
        for id in waiting {
            self.withdrawn(id);
        }
    }
}
