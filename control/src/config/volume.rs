//! A volume: which directory is served, how, and to whom.

use holdfast_shared::auth::MacPolicy;
use holdfast_shared::state::{LockMode, Right};
use holdfast_shared::types::VOLUME_NAME_BYTES_MAX;
use serde::Deserialize;
use std::collections::BTreeSet;
use std::path::PathBuf;

/// A directory that is served.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Volume {
    /// Its name, 1 to 64 bytes, without `/`, `:` and control characters.
    pub name: String,
    /// The directory; it must be there, and the server's state, journal and private key must not lie in it.
    pub directory: PathBuf,
    /// Its id, 32 hex digits. Give one to keep resume keys good when the volume is renamed. Default: made from the
    /// cluster's id and the name.
    #[serde(default)]
    pub id: Option<String>,
    /// What protects frames and payloads of its channels: `header`, `payload`, `sealed`, or `none` (private
    /// networks only). Default: `header`.
    #[serde(default)]
    pub mac_policy: Policy,
    /// How long a detached open is held for a client that does not ask for a time, milliseconds; 0 closes it with its
    /// session. Default: 60000.
    #[serde(default = "hold_ms")]
    pub hold_ms: u64,
    /// The longest that a client may ask for, milliseconds. Default: 86400000, a day.
    #[serde(default = "hold_max_ms")]
    pub hold_max_ms: u64,
    /// `mandatory`: locks restrict every read and write. `advisory`: they exclude only each other. Default: `mandatory`.
    #[serde(default)]
    pub locks: Locks,
    /// Nobody changes it through this server: all grants are for reading. Default: false.
    #[serde(default)]
    pub immutable: bool,
    /// Clients on this host are given the descriptors of opens for reading, and read without the server. They can't be taken
    /// back: neither locks nor fences bind who has one. Default: as `immutable`.
    #[serde(default)]
    pub local_descriptors: Option<bool>,
    /// `cached`: files are read and written through the page cache. `direct`: past it, straight between disk and buffers, what is
    /// aligned, where the file system can. Default: `cached`.
    #[serde(default)]
    pub file_io: FileIo,
    /// Who may use it. Nobody by default.
    #[serde(default, rename = "grant")]
    pub grants: Vec<Grant>,
}

const fn hold_ms() -> u64 {
    60_000
}

const fn hold_max_ms() -> u64 {
    86_400_000
}

/// See [`Volume::locks`].
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "kebab-case")]
pub enum Locks {
    /// They restrict every read and write.
    #[default]
    Mandatory,
    /// They exclude only each other.
    Advisory,
}

impl From<Locks> for LockMode {
    fn from(locks: Locks) -> Self {
        match locks {
            Locks::Mandatory => Self::Mandatory,
            Locks::Advisory => Self::Advisory,
        }
    }
}

/// See [`Volume::file_io`].
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "kebab-case")]
pub enum FileIo {
    /// Through the page cache.
    #[default]
    Cached,
    /// Past it.
    Direct,
}

/// See [`Volume::mac_policy`].
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Policy {
    /// Nothing.
    None,
    /// A MAC over each frame.
    #[default]
    Header,
    /// And a digest of the payload.
    Payload,
    /// And the payload encrypted.
    Sealed,
}

impl From<Policy> for MacPolicy {
    fn from(policy: Policy) -> Self {
        match policy {
            Policy::None => Self::None,
            Policy::Header => Self::Header,
            Policy::Payload => Self::Payload,
            Policy::Sealed => Self::Sealed,
        }
    }
}

/// A principal's right on a volume.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Grant {
    /// As in its certificate: first DNS name, URI or e-mail address of the SAN, else the CN.
    pub principal: String,
    /// `read` or `read-write`.
    pub access: GrantAccess,
}

/// See [`Grant::access`].
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum GrantAccess {
    /// Read files, list directories.
    Read,
    /// Everything.
    ReadWrite,
}

impl From<GrantAccess> for Right {
    fn from(access: GrantAccess) -> Self {
        match access {
            GrantAccess::Read => Self::Read,
            GrantAccess::ReadWrite => Self::ReadWrite,
        }
    }
}

impl Volume {
    /// True if clients on this host may be given descriptors.
    pub fn gives_descriptors(&self) -> bool {
        self.local_descriptors.unwrap_or(self.immutable)
    }

    /// True if its files are read and written past the page cache.
    pub fn is_direct(&self) -> bool {
        self.file_io == FileIo::Direct
    }

    /// The id, if it is given.
    ///
    /// # Errors
    /// If it is not 32 hex digits.
    pub fn id_bytes(&self) -> Result<Option<[u8; 16]>, String> {
        let Some(text) = &self.id else { return Ok(None) };
        let problem = || format!("volume {:?}: id must be 32 hex digits", self.name);
        if text.len() != 32 || !text.is_ascii() {
            return Err(problem());
        }
        let mut id = [0; 16];
        for (i, byte) in id.iter_mut().enumerate() {
            *byte = u8::from_str_radix(&text[2 * i..2 * i + 2], 16).map_err(|_| problem())?;
        }
        Ok(Some(id))
    }

    /// # Errors
    /// What is wrong, in words.
    pub(super) fn check(&self) -> Result<(), String> {
        let name = &self.name;
        let bad = |c: char| c == '/' || c == ':' || c.is_control();
        if name.is_empty() || name.len() > VOLUME_NAME_BYTES_MAX || name.contains(bad) {
            return Err(format!(
                "volume {name:?}: a name has 1 to {VOLUME_NAME_BYTES_MAX} bytes, none of them '/', ':' or control"
            ));
        }
        if !self.directory.is_dir() {
            return Err(format!("volume {name:?}: {} is not a directory", self.directory.display()));
        }
        if self.hold_ms > self.hold_max_ms {
            return Err(format!("volume {name:?}: hold_ms must be at most hold_max_ms"));
        }
        self.id_bytes()?;
        let mut principals = BTreeSet::new();
        for grant in &self.grants {
            if grant.principal.is_empty() || !principals.insert(&grant.principal) {
                return Err(format!(
                    "volume {name:?}: principal {:?} is empty or there twice",
                    grant.principal
                ));
            }
        }
        Ok(())
    }
}
