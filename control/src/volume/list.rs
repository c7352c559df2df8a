//! Directories, a page at a time, in byte order of the names.
//!
//! Each page reads the whole directory and keeps only the names that fit: memory is bounded whatever the directory's size,
//! and a page is right whatever happened since the last one. Names that are not UTF-8 cannot travel and
//! are left out.

use super::{Volume, attributes, stat_at};
use crate::errno::refused;
use holdfast_shared::types::VolumePath;
use holdfast_shared::wire::control::{Entries, Entry, Refusal};
use rustix::fs::{Dir, Mode, OFlags, Statx};
use rustix::io::Errno;
use std::collections::BTreeSet;

/// Names kept for one page.
const NAMES_MAX: usize = 512;
/// Encoded bytes of one page's entries: well within a message.
const PAGE_BYTES_MAX: usize = 48 * 1024;

impl Volume {
    /// The entries of a directory after the name `after` (empty: from the first).
    ///
    /// # Errors
    /// A refusal for the client.
    pub fn list(&self, path: &VolumePath, after: &str) -> Result<Entries, Refusal> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY;
        let fd = self.resolve(path.as_str(), flags, Mode::empty()).map_err(refused)?;
        let mut names = BTreeSet::new();
        let mut more = false;
        let mut directory = Dir::read_from(&fd).map_err(refused)?;
        while let Some(entry) = directory.read() {
            let entry = entry.map_err(refused)?;
            let Ok(name) = entry.file_name().to_str() else { continue };
            if name == "." || name == ".." || name <= after {
                continue;
            }
            if names.len() == NAMES_MAX {
                more = true;
                match names.last() {
                    Some(last) if name < String::as_str(last) => names.pop_last(),
                    _ => continue,
                };
            }
            names.insert(name.to_owned());
        }
        page(names, more, |name| stat_at(&fd, name))
    }
}

/// One page of the names kept. `more` is true if the directory has others after them.
fn page(
    names: BTreeSet<String>,
    mut more: bool,
    mut stat: impl FnMut(&str) -> Result<Statx, Errno>,
) -> Result<Entries, Refusal> {
    let mut entries: Vec<Entry> = Vec::with_capacity(names.len());
    let mut bytes = 0;
    let mut last = None;
    for name in names {
        let stat = match stat(&name) {
            Ok(stat) => stat,
            // Removed since: the next page begins after it all the same.
            Err(Errno::NOENT) => {
                last = Some(name);
                continue;
            }
            Err(error) => return Err(refused(error)),
        };
        let entry = Entry { name, attributes: attributes::of(&stat) };
        bytes += holdfast_shared::wire::to_cbor(&entry).len();
        if bytes > PAGE_BYTES_MAX {
            more = true;
            break;
        }
        last = Some(entry.name.clone());
        entries.push(entry);
    }
    Ok(Entries { entries, next: last.filter(|_| more) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_whose_names_all_vanished_is_not_the_last() {
        let names = || ["a", "b"].map(str::to_owned).into_iter().collect();
        let gone = page(names(), true, |_| Err(Errno::NOENT)).unwrap();
        assert_eq!((gone.entries.len(), gone.next.as_deref()), (0, Some("b")));
        let end = page(names(), false, |_| Err(Errno::NOENT)).unwrap();
        assert_eq!(end.next, None);
    }
}
