//! [`FileRegistration`]: a file's pages made readable for one peer, until they are withdrawn.
//!
//! ```text
//!   FileMapping ──new──► FileRegistration ── rkey, address ──► the peer reads, without this host's processor
//!                              │
//!                           withdraw() returns: the device serves not one byte more
//! ```
//!
//! The pages are pinned for reading only, and the key works on the queue pairs of one [`ProtectionDomain`]: give it one of its
//! own with one queue pair, and one peer can use it, to exactly these bytes.
//!
//! Withdrawing is deregistering, which the kernel completes only when the device has let go. A memory window would
//! be quicker to take back, but can't be had here: to bind one, the registration needs `IBV_ACCESS_MW_BIND`, for which
//! the kernel pins the pages *for writing*. It refuses that (`EFAULT`) to every file that is open for reading alone, and
//! to every file, however open, of a file system that writes back (ext4, xfs; kernels from 6.5 on).

use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;

use crate::device::Device;
use crate::error::{VerbsError, memlock_limit};
use crate::ffi;
use crate::gauges::{MEMORY_REGISTRATIONS, PINNED_BYTES, REGISTRATIONS_TOTAL};
use crate::memory::FileMapping;
use crate::pd::ProtectionDomain;

/// A pinned range of a file that a peer may read. Has one owner, so that whoever withdraws it knows that nobody keeps it.
pub struct FileRegistration {
    mr: *mut ffi::ibv_mr,
    rkey: u32,
    mapping: ManuallyDrop<FileMapping>,
    domain: ManuallyDrop<Arc<ProtectionDomain>>,
}

// SAFETY: libibverbs is thread-safe; the pointer is used only to deregister, once.
unsafe impl Send for FileRegistration {}

impl FileRegistration {
    /// Pins the pages, reading them from the disk if need be, and lets the peers of `domain` read them. Blocks for that
    /// long.
    ///
    /// # Errors
    /// `EFAULT` if the file ends before the mapping does, or this kernel pins no read-only mappings (6.1 does not, 6.12 does);
    /// [`VerbsError::Register`] if more would be locked than this process may.
    pub fn new(domain: &Arc<ProtectionDomain>, mapping: FileMapping) -> Result<Self, VerbsError> {
        let bytes = mapping.len();
        let flags = i32::try_from(ffi::ibv_access_flags::IBV_ACCESS_REMOTE_READ.0).unwrap_or_default();
        // SAFETY: the range lies within the mapping, which self keeps until after deregistration. Nobody, here or at the
        // peer, may write it by this registration, and this process holds no reference to its bytes.
        let mr = unsafe { ffi::ibv_reg_mr(domain.as_ptr(), mapping.addr() as *mut _, bytes, flags) };
        let mr = ffi::check_pointer(mr).map_err(|source| match source.raw_os_error() {
            Some(libc::ENOMEM | libc::EAGAIN | libc::EPERM) => {
                VerbsError::Register { bytes, limit: memlock_limit(), source }
            }
            _ => VerbsError::call("ibv_reg_mr", source),
        })?;
        MEMORY_REGISTRATIONS.add(1);
        REGISTRATIONS_TOTAL.add(1);
        PINNED_BYTES.add(bytes as u64);
        Ok(Self {
            mr,
            // SAFETY: a registration that was just made; nobody else knows it.
            rkey: unsafe { (*mr).rkey },
            mapping: ManuallyDrop::new(mapping),
            domain: ManuallyDrop::new(Arc::clone(domain)),
        })
    }

    /// Whether this kernel pins pages for reading alone: 6.12 and later do, 6.1 does not. Tried out, with a file in memory.
    ///
    /// # Errors
    /// Whatever else keeps a domain, a file or a registration from being made.
    pub fn is_possible(device: &Arc<Device>) -> Result<bool, VerbsError> {
        let failed = |errno: rustix::io::Errno| VerbsError::call("memfd_create", errno.into());
        let made =
            rustix::fs::memfd_create("holdfast-probe", rustix::fs::MemfdFlags::CLOEXEC).map_err(failed)?;
        rustix::fs::ftruncate(&made, 1).map_err(failed)?;
        // The same file, open for reading alone.
        let file = std::fs::File::open(format!("/proc/self/fd/{}", made.as_raw_fd()))
            .map_err(|source| VerbsError::call("open", source))?;
        let mapping =
            FileMapping::new(file.as_fd(), 0, 1).map_err(|source| VerbsError::call("mmap", source))?;
        match Self::new(&ProtectionDomain::new(device)?, mapping) {
            Ok(registration) => registration.withdraw().map(|()| true),
            Err(VerbsError::Call { source, .. }) if source.raw_os_error() == Some(libc::EFAULT) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// The key by which a peer names the bytes.
    pub fn rkey(&self) -> u32 {
        self.rkey
    }

    /// Address of the first byte: as a peer names it.
    pub fn addr(&self) -> u64 {
        self.mapping.addr()
    }

    /// Length in bytes.
    #[allow(clippy::len_without_is_empty)] // never empty
    pub fn len(&self) -> usize {
        self.mapping.len()
    }

    /// Withdraws it. When this returns without an error the device serves nothing of it any more: what a peer still
    /// receives was read before.
    ///
    /// # Errors
    /// The device may go on serving; the mapping is leaked on purpose. No provider does that to a registration without
    /// windows.
    pub fn withdraw(self) -> Result<(), VerbsError> {
        let mut this = ManuallyDrop::new(self);
        this.deregister()
    }

    /// At most once.
    fn deregister(&mut self) -> Result<(), VerbsError> {
        let bytes = self.mapping.len() as u64;
        // SAFETY: made by ibv_reg_mr and deregistered once: `withdraw` forgets self, else it is done on drop. No local work
        // request can name it, as nobody is given its lkey.
        ffi::check_errno(unsafe { ffi::ibv_dereg_mr(self.mr) })
            .map_err(|source| VerbsError::call("ibv_dereg_mr", source))?;
        MEMORY_REGISTRATIONS.sub(1);
        PINNED_BYTES.sub(bytes);
        // SAFETY: both are dropped once, here, and not used after: deregister is called at most once.
        unsafe {
            ManuallyDrop::drop(&mut self.mapping);
            ManuallyDrop::drop(&mut self.domain);
        }
        Ok(())
    }
}

impl Drop for FileRegistration {
    fn drop(&mut self) {
        if let Err(error) = self.deregister() {
            tracing::error!(%error, "a file's registration could not be withdrawn: leaked on purpose");
        }
    }
}

impl std::fmt::Debug for FileRegistration {
    // Not its key: who knows an rkey can try it.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FileRegistration").finish_non_exhaustive()
    }
}
