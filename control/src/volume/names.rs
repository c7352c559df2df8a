//! Names: found, made, removed, renamed. Always the last component of a directory opened beneath the root.

use super::{Volume, identity, stat_at};
use crate::errno::{refusal, refused};
use holdfast_shared::state::FileIdentity;
use holdfast_shared::types::{Status, VolumePath};
use holdfast_shared::wire::control::{FileKind, Refusal};
use rustix::fs::{AtFlags, Mode, RenameFlags};
use rustix::io::Errno;
use std::os::fd::OwnedFd;

impl Volume {
    /// Which file a name stands for; `None` if nothing is there.
    ///
    /// # Errors
    /// A refusal for the client, also if the directory above is not there.
    pub fn identify(&self, path: &VolumePath) -> Result<Option<FileIdentity>, Refusal> {
        let (above, name) = self.parent(path)?;
        identify_at(&above, name)
    }

    /// Makes a directory.
    ///
    /// # Errors
    /// A refusal for the client.
    pub fn make_directory(&self, path: &VolumePath, mode: u32) -> Result<(), Refusal> {
        if path.is_root() {
            return Err(refusal(Status::Exists, ""));
        }
        let (above, name) = self.parent(path)?;
        rustix::fs::mkdirat(&above, name, Mode::from_raw_mode(mode & 0o777)).map_err(refused)
    }

    /// Makes a symbolic link.
    ///
    /// # Errors
    /// A refusal for the client.
    pub fn make_symlink(&self, path: &VolumePath, text: &str) -> Result<(), Refusal> {
        let (above, name) = self.parent(path)?;
        rustix::fs::symlinkat(text, &above, name).map_err(refused)
    }

    /// Reads a symbolic link.
    ///
    /// # Errors
    /// A refusal for the client; `Unsupported` if the text is not UTF-8.
    pub fn read_symlink(&self, path: &VolumePath) -> Result<String, Refusal> {
        let (above, name) = self.parent(path)?;
        let text = rustix::fs::readlinkat(&above, name, Vec::new()).map_err(|error| match error {
            Errno::INVAL => refusal(Status::Invalid, "not a symbolic link"),
            other => refused(other),
        })?;
        text.into_string().map_err(|_| refusal(Status::Unsupported, "the link's text is not UTF-8"))
    }

    /// Removes a name, if it still stands for `expected`.
    ///
    /// # Errors
    /// A refusal for the client.
    pub fn remove(&self, path: &VolumePath, expected: FileIdentity) -> Result<(), Refusal> {
        let (above, name) = self.parent(path)?;
        let _alone = self.name_changes.lock();
        let stat = stat_at(&above, name).map_err(refused)?;
        if identity(&stat) != expected {
            return Err(meanwhile());
        }
        let directory = super::attributes::kind(stat.stx_mode) == FileKind::Directory;
        let flags = if directory { AtFlags::REMOVEDIR } else { AtFlags::empty() };
        rustix::fs::unlinkat(&above, name, flags).map_err(|error| match error {
            // What POSIX allows for a directory that is not empty.
            Errno::EXIST => refusal(Status::NotEmpty, ""),
            other => refused(other),
        })
    }

    /// Renames, if both names still stand for what they did: `from` for its file, `to` for its own or for nothing.
    ///
    /// # Errors
    /// A refusal for the client.
    pub fn rename(
        &self,
        from: (&VolumePath, FileIdentity),
        to: (&VolumePath, Option<FileIdentity>),
    ) -> Result<(), Refusal> {
        let (from_above, from_name) = self.parent(from.0)?;
        let (to_above, to_name) = self.parent(to.0)?;
        let _alone = self.name_changes.lock();
        if identify_at(&from_above, from_name)? != Some(from.1) || identify_at(&to_above, to_name)? != to.1 {
            return Err(meanwhile());
        }
        // Nothing was there, so nothing may be replaced: what appeared meanwhile was not asked about.
        let flags = if to.1.is_none() { RenameFlags::NOREPLACE } else { RenameFlags::empty() };
        rustix::fs::renameat_with(&from_above, from_name, &to_above, to_name, flags).map_err(|error| {
            match error {
                Errno::EXIST if to.1.is_none() => meanwhile(),
                Errno::EXIST => refusal(Status::NotEmpty, ""),
                Errno::XDEV => refusal(Status::Unsupported, "the names are on different file systems"),
                other => refused(other),
            }
        })
    }
}

fn identify_at(above: &OwnedFd, name: &str) -> Result<Option<FileIdentity>, Refusal> {
    match stat_at(above, name) {
        Ok(stat) => Ok(Some(identity(&stat))),
        Err(Errno::NOENT) => Ok(None),
        Err(error) => Err(refused(error)),
    }
}

fn meanwhile() -> Refusal {
    Refusal { retry_ms: Some(1), ..refusal(Status::Busy, "the name was changed meanwhile") }
}
