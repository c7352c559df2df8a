//! Which volumes there are, and what each principal may do on them.

use super::refusal;
use crate::auth::MacPolicy;
use crate::types::{Status, VolumeId, VolumePath};
use crate::wire::control::{Place, Refusal, VolumeInfo};
use std::collections::BTreeMap;

/// What a principal may do on a volume.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Right {
    /// Read files, list directories.
    Read,
    /// Everything.
    ReadWrite,
}

/// What locks mean on a volume.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, minicbor::Encode, minicbor::Decode)]
#[cbor(index_only)]
pub enum LockMode {
    /// Reads and writes that a lock forbids are refused, whoever asks: as in SMB.
    #[default]
    #[n(0)]
    Mandatory,
    /// Locks count against locks only: as with POSIX `fcntl`.
    #[n(1)]
    Advisory,
}

/// One volume.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct VolumeRules {
    /// Its id.
    pub id: VolumeId,
    /// Its name.
    pub name: String,
    /// What protects the frames of its channels.
    pub policy: MacPolicy,
    /// Who may use it. A principal that is not here may not.
    pub grants: BTreeMap<String, Right>,
    /// What locks mean.
    pub lock_mode: LockMode,
    /// How long a detached open is held if its client did not say, milliseconds.
    pub hold_default_ms: u64,
    /// The longest that a client may ask for, milliseconds.
    pub hold_max_ms: u64,
    /// Clients on the server's host may be given the descriptors of opens for reading.
    pub local_descriptors: bool,
    /// Its files are read and written past the page cache.
    pub direct: bool,
}

/// All volumes, by name.
#[derive(Debug)]
pub(super) struct Volumes(BTreeMap<String, VolumeRules>);

impl Volumes {
    pub(super) fn new(volumes: Vec<VolumeRules>) -> Self {
        Self(volumes.into_iter().map(|v| (v.name.clone(), v)).collect())
    }

    /// The volume, if `principal` has at least `right` on it.
    pub(super) fn admit(&self, principal: &str, volume: &str, right: Right) -> Result<&VolumeRules, Refusal> {
        let rules = self.0.get(volume).ok_or_else(|| refusal(Status::NotFound, "there is no such volume"))?;
        match rules.grants.get(principal) {
            None => Err(refusal(Status::AccessDenied, "this principal has no right on the volume")),
            Some(Right::Read) if right == Right::ReadWrite => Err(refusal(Status::ReadOnly, "")),
            Some(_) => Ok(rules),
        }
    }

    /// The volume and the checked path of a place, if `principal` has at least `right` there.
    pub(super) fn place(
        &self,
        principal: &str,
        place: &Place,
        right: Right,
    ) -> Result<(&VolumeRules, VolumePath), Refusal> {
        let rules = self.admit(principal, &place.volume, right)?;
        let path = VolumePath::parse(&place.path).map_err(|error| {
            let status = match error {
                crate::types::PathError::Absolute | crate::types::PathError::Parent => Status::PathEscape,
                crate::types::PathError::TooLong => Status::NameTooLong,
                crate::types::PathError::Zero => Status::Invalid,
            };
            refusal(status, &error.to_string())
        })?;
        Ok((rules, path))
    }

    /// Refuses a principal that does not have this right on a volume any more.
    pub(super) fn allow(&self, principal: &str, volume: VolumeId, right: Right) -> Result<(), Refusal> {
        let name = self.0.values().find(|rules| rules.id == volume).map(|rules| rules.name.clone());
        let name = name.ok_or_else(|| refusal(Status::AccessDenied, "the volume is not served any more"))?;
        self.admit(principal, &name, right).map(drop)
    }

    /// What locks mean on a volume.
    pub(super) fn lock_mode(&self, volume: VolumeId) -> LockMode {
        self.0.values().find(|rules| rules.id == volume).map(|rules| rules.lock_mode).unwrap_or_default()
    }

    /// True if clients on the server's host may be given descriptors.
    pub(super) fn local_descriptors(&self, volume: VolumeId) -> bool {
        self.0.values().any(|rules| rules.id == volume && rules.local_descriptors)
    }

    /// True if its files are read and written past the page cache.
    pub(super) fn direct(&self, volume: VolumeId) -> bool {
        self.0.values().any(|rules| rules.id == volume && rules.direct)
    }

    /// True if `principal` may write on the volume.
    pub(super) fn may_write(&self, principal: &str, volume: VolumeId) -> bool {
        let rules = self.0.values().find(|rules| rules.id == volume);
        rules.is_some_and(|rules| rules.grants.get(principal) == Some(&Right::ReadWrite))
    }

    /// What `principal` may see.
    pub(super) fn seen_by(&self, principal: &str) -> Vec<VolumeInfo> {
        let seen = |v: &VolumeRules| {
            let right = v.grants.get(principal)?;
            let writable = *right == Right::ReadWrite;
            Some(VolumeInfo { name: v.name.clone(), writable, policy: v.policy })
        };
        self.0.values().filter_map(seen).collect()
    }
}
