//! Which opens of one file exclude each other.
//!
//! Per file and right it is counted how many claims want it and how many deny it, so that a check costs the same
//! beside one open and beside a million. A claim is an open, or an operation that acts like one for a
//! moment: a removal claims `DELETE`, a change of size by name claims `WRITE`.

use super::input::FileIdentity;
use crate::types::{Access, ShareMode};
use std::collections::BTreeMap;

const RIGHTS: [(Access, ShareMode); 3] =
    [(Access::READ, ShareMode::READ), (Access::WRITE, ShareMode::WRITE), (Access::DELETE, ShareMode::DELETE)];

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Claims {
    wants: [u32; 3],
    denies: [u32; 3],
    claims: u32,
}

impl Claims {
    fn count(&mut self, access: Access, share: ShareMode, step: fn(u32) -> u32) {
        for (i, (want, admit)) in RIGHTS.into_iter().enumerate() {
            if access.contains(want) {
                self.wants[i] = step(self.wants[i]);
            }
            if !share.contains(admit) {
                self.denies[i] = step(self.denies[i]);
            }
        }
        self.claims = step(self.claims);
    }
}

#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct ShareTable(BTreeMap<FileIdentity, Claims>);

impl ShareTable {
    /// True if a claim can stand beside those there are ([`crate::types::conflicts`] with none of them).
    pub(super) fn admits(&self, file: FileIdentity, access: Access, share: ShareMode) -> bool {
        let Some(there) = self.0.get(&file) else { return true };
        access.is_empty()
            || RIGHTS.into_iter().enumerate().all(|(i, (want, admit))| {
                let denied = access.contains(want) && there.denies[i] > 0;
                let denies = !share.contains(admit) && there.wants[i] > 0;
                !denied && !denies
            })
    }

    /// Enters a claim. One without access (metadata only) excludes nothing and is not entered.
    pub(super) fn enter(&mut self, file: FileIdentity, access: Access, share: ShareMode) {
        if !access.is_empty() {
            self.0.entry(file).or_default().count(access, share, |n| n + 1);
        }
    }

    /// Takes a claim out that was entered with the same words.
    pub(super) fn leave(&mut self, file: FileIdentity, access: Access, share: ShareMode) {
        if access.is_empty() {
            return;
        }
        if let Some(there) = self.0.get_mut(&file) {
            there.count(access, share, |n| n.saturating_sub(1));
            if there.claims == 0 {
                self.0.remove(&file);
            }
        }
    }

    /// True if there is any claim on a file.
    pub(super) fn is_claimed(&self, file: FileIdentity) -> bool {
        self.0.contains_key(&file)
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }
}
