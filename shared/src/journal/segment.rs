//! Segment files: how they are made, and how much space they keep ahead.

use super::disk::{Disk, DiskError};
use super::layout::{HEADER_BYTES, Header, file_name};

/// The least reserve for records that release something, bytes.
pub const RELEASE_RESERVE_BYTES: u64 = 256 * 1024;

/// How a journal uses its disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// Space is taken ahead in steps of this, bytes.
    pub step_bytes: u64,
    /// Space that is always kept allocated, bytes; at least [`RELEASE_RESERVE_BYTES`].
    pub reserve_bytes: u64,
    /// A checkpoint is due when the segments hold more than this, bytes, and more than twice the last checkpoint.
    pub checkpoint_bytes: u64,
}

impl Default for Options {
    fn default() -> Self {
        Self { step_bytes: 1 << 20, reserve_bytes: RELEASE_RESERVE_BYTES, checkpoint_bytes: 64 << 20 }
    }
}

impl Options {
    /// The reserve that is kept, bytes.
    pub(super) fn reserve(&self) -> u64 {
        self.reserve_bytes.max(RELEASE_RESERVE_BYTES)
    }
}

/// A segment that is no longer written.
#[derive(Clone, Debug)]
pub(super) struct Older {
    pub(super) name: String,
    pub(super) bytes: u64,
}

/// The segment that is written.
#[derive(Debug)]
pub(super) struct Segment<F> {
    pub(super) name: String,
    pub(super) file: F,
    pub(super) salt: u32,
    /// Where what is durable ends.
    pub(super) end: u64,
    pub(super) allocated: u64,
}

impl<F> Segment<F> {
    /// Makes a segment's file, with its space and header, durable under its name. Where `bare` allows it, it is made
    /// without space if there is none. A failure for want of space leaves no file.
    pub(super) fn create<D: Disk<File = F>>(
        disk: &D,
        header: Header,
        options: &Options,
        bare: bool,
    ) -> Result<Self, DiskError> {
        let name = file_name(header.segment);
        match Self::fill(disk, &name, header, options, bare) {
            Err(DiskError::NoSpace) => {
                let made = disk.list()?.contains(&name);
                if made {
                    disk.remove(&name)?;
                    disk.sync_directory()?;
                }
                Err(DiskError::NoSpace)
            }
            done => done,
        }
    }

    fn fill<D: Disk<File = F>>(
        disk: &D,
        name: &str,
        header: Header,
        options: &Options,
        bare: bool,
    ) -> Result<Self, DiskError> {
        let file = disk.create(name)?;
        let least = HEADER_BYTES as u64 + options.reserve();
        let allocated = match allocate(disk, &file, 0, [least + options.step_bytes, least]) {
            Err(DiskError::NoSpace) if bare => what_there_is(disk, &file, least)?,
            done => done?,
        };
        let encoded = header.encode();
        disk.write_at(&file, 0, &encoded)?;
        disk.sync_data(&file)?;
        disk.sync_directory()?;
        let end = HEADER_BYTES as u64;
        Ok(Self { name: name.to_owned(), file, salt: Header::salt(&encoded), end, allocated })
    }
}

/// Allocates a part of what a segment should have, as large as there is space for.
fn what_there_is<D: Disk>(disk: &D, file: &D::File, least: u64) -> Result<u64, DiskError> {
    let mut length = least / 2;
    while length > HEADER_BYTES as u64 {
        match disk.allocate(file, 0, length) {
            Err(DiskError::NoSpace) => length /= 2,
            done => return done.map(|()| length),
        }
    }
    Ok(HEADER_BYTES as u64)
}

/// Allocates up to the first length for which there is space.
pub(super) fn allocate<D: Disk>(disk: &D, file: &D::File, from: u64, to: [u64; 2]) -> Result<u64, DiskError> {
    for length in to {
        if length <= from {
            continue;
        }
        match disk.allocate(file, from, length - from) {
            Err(DiskError::NoSpace) => {}
            done => return done.map(|()| length),
        }
    }
    Err(DiskError::NoSpace)
}
