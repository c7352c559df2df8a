//! What the journal asks of a disk, so that the code that ships runs on a file system and on the simulator's faults.

/// Why a disk did not do what it was asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DiskError {
    /// It is full, or a quota is used up. It may pass.
    #[error("no space left on the device")]
    NoSpace,
    /// Anything else, in the system's words.
    #[error("{0}")]
    Failed(String),
}

/// One directory of flat files. Nothing is durable before it is synced: bytes by [`Disk::sync_data`], names that were
/// made or removed by [`Disk::sync_directory`]. Until then a crash may keep any part of it.
pub trait Disk {
    /// An open file.
    type File;

    /// The names of all files, in any order.
    ///
    /// # Errors
    /// [`DiskError`].
    fn list(&self) -> Result<Vec<String>, DiskError>;

    /// Makes a file that must not be there yet, to be read and written.
    ///
    /// # Errors
    /// [`DiskError`].
    fn create(&self, name: &str) -> Result<Self::File, DiskError>;

    /// Opens a file that is there, to be read and written.
    ///
    /// # Errors
    /// [`DiskError`].
    fn open(&self, name: &str) -> Result<Self::File, DiskError>;

    /// Bytes in the file.
    ///
    /// # Errors
    /// [`DiskError`].
    fn length(&self, file: &Self::File) -> Result<u64, DiskError>;

    /// Reads from `offset`; how many bytes it was, 0 at the file's end.
    ///
    /// # Errors
    /// [`DiskError`].
    fn read_at(&self, file: &Self::File, offset: u64, into: &mut [u8]) -> Result<usize, DiskError>;

    /// Writes all bytes at `offset`. On an error any part of them may be written.
    ///
    /// # Errors
    /// [`DiskError`].
    fn write_at(&self, file: &Self::File, offset: u64, bytes: &[u8]) -> Result<(), DiskError>;

    /// Gives `length` bytes from `offset`, the file's end, their space: they read as zeros, and a write to them does
    /// not meet [`DiskError::NoSpace`] where the file system keeps such promises.
    ///
    /// # Errors
    /// [`DiskError`]. The file may have become longer all the same.
    fn allocate(&self, file: &Self::File, offset: u64, length: u64) -> Result<(), DiskError>;

    /// Makes the file shorter and gives its space back.
    ///
    /// # Errors
    /// [`DiskError`].
    fn truncate(&self, file: &Self::File, length: u64) -> Result<(), DiskError>;

    /// Returns when the file's bytes and length are durable.
    ///
    /// # Errors
    /// [`DiskError`]. What was written since the last sync may then be lost, though it still reads well.
    fn sync_data(&self, file: &Self::File) -> Result<(), DiskError>;

    /// Returns when made and removed names are durable.
    ///
    /// # Errors
    /// [`DiskError`].
    fn sync_directory(&self) -> Result<(), DiskError>;

    /// Removes a file by name.
    ///
    /// # Errors
    /// [`DiskError`].
    fn remove(&self, name: &str) -> Result<(), DiskError>;
}
