//! What a session can ask besides opening: attributes, directories, names, volumes.

use crate::error::Result;
use crate::session::{Session, unexpected};
use holdfast_shared::types::FileTime;
use holdfast_shared::wire::control::{
    Attributes, Entry, List, MakeDirectory, MakeSymlink, Place, Rename, Reply, Request, SetAttributes,
    Target, VolumeInfo, VolumeName, VolumeStatus,
};

/// Attributes to change; those absent stay as they are.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct Changes {
    /// New size, bytes.
    pub size: Option<u64>,
    /// New permission bits.
    pub mode: Option<u32>,
    /// New access time.
    pub accessed: Option<FileTime>,
    /// New modification time.
    pub modified: Option<FileTime>,
}

impl Changes {
    pub(crate) fn of(&self, target: Target) -> SetAttributes {
        SetAttributes {
            target,
            size: self.size,
            mode: self.mode,
            accessed: self.accessed,
            modified: self.modified,
        }
    }
}

/// A directory's entries, a page at a time, in byte order of their names.
///
/// ```no_run
/// # async fn example(session: holdfast_client::Session) -> holdfast_client::Result<()> {
/// let mut listing = session.list(&holdfast_client::Place { volume: "data".into(), path: String::new() });
/// while let Some(entries) = listing.next_page().await? {
///     for entry in entries {
///         println!("{} {}", entry.attributes.size, entry.name);
///     }
/// }
/// # Ok(()) }
/// ```
#[derive(Debug)]
pub struct Listing {
    session: Session,
    place: Place,
    /// Where the next page begins; `None` at the end.
    after: Option<String>,
}

impl Listing {
    /// The next page; `None` at the end.
    ///
    /// # Errors
    /// As any request.
    pub async fn next_page(&mut self) -> Result<Option<Vec<Entry>>> {
        let Some(after) = &self.after else { return Ok(None) };
        let list = List { place: self.place.clone(), after: after.clone() };
        let Reply::Entries(page) = self.session.call(Request::List(list)).await? else {
            return Err(unexpected("list"));
        };
        if page.next.as_ref() == Some(after) {
            return Err(crate::Error::Misbehaved("the listing does not advance".into()));
        }
        self.after = page.next;
        Ok(Some(page.entries))
    }
}

impl Session {
    async fn done(&self, what: &str, request: Request) -> Result<()> {
        match self.call(request).await? {
            Reply::Done => Ok(()),
            _ => Err(unexpected(what)),
        }
    }

    async fn attributes_of(&self, request: Request) -> Result<Attributes> {
        match self.call(request).await? {
            Reply::Attributes(attributes) => Ok(attributes),
            _ => Err(unexpected("attributes")),
        }
    }

    /// Attributes of what stands at a place; a symbolic link at its end is not followed.
    ///
    /// # Errors
    /// As any request.
    pub async fn attributes(&self, place: &Place) -> Result<Attributes> {
        self.attributes_of(Request::GetAttributes(Target::Path(place.clone()))).await
    }

    /// Changes attributes and returns the new ones.
    ///
    /// # Errors
    /// As any request.
    pub async fn set_attributes(&self, place: &Place, changes: &Changes) -> Result<Attributes> {
        self.attributes_of(Request::SetAttributes(changes.of(Target::Path(place.clone())))).await
    }

    /// Lists a directory, a page at a time.
    pub fn list(&self, place: &Place) -> Listing {
        Listing { session: self.clone(), place: place.clone(), after: Some(String::new()) }
    }

    /// Makes a directory.
    ///
    /// # Errors
    /// As any request.
    pub async fn make_directory(&self, place: &Place, mode: u32) -> Result<()> {
        self.done("make directory", Request::MakeDirectory(MakeDirectory { place: place.clone(), mode }))
            .await
    }

    /// Removes a file, symbolic link or empty directory.
    ///
    /// # Errors
    /// As any request.
    pub async fn remove(&self, place: &Place) -> Result<()> {
        self.done("remove", Request::Remove(place.clone())).await
    }

    /// Renames within a volume, replacing an existing file unless `no_replace`.
    ///
    /// # Errors
    /// As any request.
    pub async fn rename(&self, from: &Place, to: &Place, no_replace: bool) -> Result<()> {
        self.done("rename", Request::Rename(Rename { from: from.clone(), to: to.clone(), no_replace })).await
    }

    /// Makes a symbolic link with the given text.
    ///
    /// # Errors
    /// As any request.
    pub async fn make_symlink(&self, place: &Place, text: &str) -> Result<()> {
        self.done("make link", Request::MakeSymlink(MakeSymlink { place: place.clone(), text: text.into() }))
            .await
    }

    /// Reads a symbolic link's text.
    ///
    /// # Errors
    /// As any request.
    pub async fn read_symlink(&self, place: &Place) -> Result<String> {
        match self.call(Request::ReadSymlink(place.clone())).await? {
            Reply::Symlink(text) => Ok(text),
            _ => Err(unexpected("read link")),
        }
    }

    /// Size and room of a volume.
    ///
    /// # Errors
    /// As any request.
    pub async fn volume_status(&self, volume: &str) -> Result<VolumeStatus> {
        match self.call(Request::VolumeStatus(VolumeName { volume: volume.into() })).await? {
            Reply::VolumeStatus(status) => Ok(status),
            _ => Err(unexpected("volume status")),
        }
    }

    /// The volumes this client may use.
    ///
    /// # Errors
    /// As any request.
    pub async fn volumes(&self) -> Result<Vec<VolumeInfo>> {
        match self.call(Request::Volumes).await? {
            Reply::Volumes(volumes) => Ok(volumes),
            _ => Err(unexpected("volumes")),
        }
    }
}
