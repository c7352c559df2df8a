//! [`MemoryRegistration`]: memory made known to a device, with the keys that name it.
//!
//! A registration holds its memory and its domain. It is itself held by every work request that names it, so the
//! device can't be told of memory that is gone.

use std::sync::Arc;

use crate::error::{VerbsError, memlock_limit};
use crate::ffi;
use crate::gauges::{MEMORY_REGISTRATIONS, PINNED_BYTES, REGISTRATIONS_TOTAL};
use crate::memory::{FileMapping, Memory, Pool, Region};
use crate::pd::ProtectionDomain;

/// What a peer may do with registered memory. The device of this host may always write it for local work requests, unless
/// it is a file's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Nothing: only local work requests name it.
    LocalOnly,
    /// Nothing, and local work requests only read it: what a file's pages are registered for.
    LocalRead,
    /// RDMA READ.
    RemoteRead,
    /// RDMA WRITE.
    RemoteWrite,
    /// RDMA READ and RDMA WRITE.
    RemoteReadWrite,
}

impl Access {
    fn flags(self) -> i32 {
        const LOCAL: u32 = ffi::ibv_access_flags::IBV_ACCESS_LOCAL_WRITE.0;
        const READ: u32 = ffi::ibv_access_flags::IBV_ACCESS_REMOTE_READ.0;
        const WRITE: u32 = ffi::ibv_access_flags::IBV_ACCESS_REMOTE_WRITE.0;
        let flags = match self {
            Self::LocalOnly => LOCAL,
            Self::LocalRead => 0,
            Self::RemoteRead => LOCAL | READ,
            Self::RemoteWrite => LOCAL | WRITE,
            Self::RemoteReadWrite => LOCAL | READ | WRITE,
        };
        // The three flags are 1, 2 and 4.
        i32::try_from(flags).unwrap_or_default()
    }
}

/// What was registered; kept alive by the registration.
#[derive(Clone, Debug)]
enum Target {
    Memory(Arc<Memory>),
    Region(Arc<Region>),
    Pool(Pool),
    File(Arc<FileMapping>),
}

impl Target {
    /// What this process can touch; `None` for a file's pages.
    fn memory(&self) -> Option<&Arc<Memory>> {
        match self {
            Self::Memory(memory) => Some(memory),
            Self::Region(region) => Some(region.memory()),
            Self::Pool(pool) => Some(pool.memory()),
            Self::File(_) => None,
        }
    }

    fn addr(&self) -> u64 {
        match self {
            Self::File(mapping) => mapping.addr(),
            other => other.memory().map_or(0, |memory| memory.addr()),
        }
    }

    fn len(&self) -> usize {
        match self {
            Self::File(mapping) => mapping.len(),
            other => other.memory().map_or(0, |memory| memory.len()),
        }
    }
}

/// Memory registered in a protection domain, pinned until this is dropped.
pub struct MemoryRegistration {
    mr: *mut ffi::ibv_mr,
    lkey: u32,
    rkey: u32,
    access: Access,
    target: Target,
    domain: Arc<ProtectionDomain>,
}

// SAFETY: libibverbs is thread-safe; the pointer is used only to deregister, once, on drop.
unsafe impl Send for MemoryRegistration {}
// SAFETY: as above.
unsafe impl Sync for MemoryRegistration {}

impl MemoryRegistration {
    /// Registers a whole pool, for local use.
    pub fn of_pool(domain: &Arc<ProtectionDomain>, pool: &Pool) -> Result<Arc<Self>, VerbsError> {
        Self::register(domain, Target::Pool(pool.clone()), Access::LocalOnly)
    }

    /// Registers a region, so that a peer may do with it what `access` says.
    pub fn of_region(
        domain: &Arc<ProtectionDomain>,
        region: &Arc<Region>,
        access: Access,
    ) -> Result<Arc<Self>, VerbsError> {
        Self::register(domain, Target::Region(Arc::clone(region)), access)
    }

    /// Registers bare memory. The memory of a pool is refused, unless `access` is local only.
    pub fn of_memory(
        domain: &Arc<ProtectionDomain>,
        memory: &Arc<Memory>,
        access: Access,
    ) -> Result<Arc<Self>, VerbsError> {
        Self::register(domain, Target::Memory(Arc::clone(memory)), access)
    }

    /// Pins the pages of a file, reading them from the disk if need be, for local work requests to send from: no peer can
    /// name them, and nobody can write them by this registration. Blocks for that long.
    ///
    /// # Errors
    /// As [`crate::FileRegistration::new`].
    pub fn of_file(domain: &Arc<ProtectionDomain>, mapping: FileMapping) -> Result<Arc<Self>, VerbsError> {
        Self::register(domain, Target::File(Arc::new(mapping)), Access::LocalRead)
    }

    fn register(
        domain: &Arc<ProtectionDomain>,
        target: Target,
        access: Access,
    ) -> Result<Arc<Self>, VerbsError> {
        if target.memory().is_some_and(|memory| memory.is_exclusive()) && access != Access::LocalOnly {
            return Err(VerbsError::Exclusive);
        }
        let bytes = target.len();
        // SAFETY: the range is the whole mapping, which `target` keeps until after deregistration. With remote access
        // its bytes are touched by atomics and system calls only (checked above: no slices of it are handed out). A file's
        // pages are registered for reading alone (`of_file`), and this process holds no reference to their bytes.
        let mr = unsafe { ffi::ibv_reg_mr(domain.as_ptr(), target.addr() as *mut _, bytes, access.flags()) };
        let mr = ffi::check_pointer(mr).map_err(|source| match source.raw_os_error() {
            Some(libc::ENOMEM | libc::EAGAIN | libc::EPERM) => {
                VerbsError::Register { bytes, limit: memlock_limit(), source }
            }
            _ => VerbsError::call("ibv_reg_mr", source),
        })?;
        // SAFETY: a registration that was just made; nobody else knows it.
        let (lkey, rkey) = unsafe { ((*mr).lkey, (*mr).rkey) };
        MEMORY_REGISTRATIONS.add(1);
        REGISTRATIONS_TOTAL.add(1);
        PINNED_BYTES.add(bytes as u64);
        Ok(Arc::new(Self { mr, lkey, rkey, access, target, domain: Arc::clone(domain) }))
    }

    /// The key by which this host's work requests name the memory.
    pub fn lkey(&self) -> u32 {
        self.lkey
    }

    /// The key by which a peer names the memory. Of use only if the access allows anything.
    pub fn rkey(&self) -> u32 {
        self.rkey
    }

    /// Address of the first byte: as a peer names it.
    pub fn addr(&self) -> u64 {
        self.target.addr()
    }

    /// Length in bytes.
    #[allow(clippy::len_without_is_empty)] // never empty
    pub fn len(&self) -> usize {
        self.target.len()
    }

    /// What a peer may do.
    pub fn access(&self) -> Access {
        self.access
    }

    /// The domain it belongs to.
    pub fn domain(&self) -> &Arc<ProtectionDomain> {
        &self.domain
    }

    /// The region it was made of, if it was made of one.
    pub fn region(&self) -> Option<&Arc<Region>> {
        match &self.target {
            Target::Region(region) => Some(region),
            _ => None,
        }
    }

    /// True if it was made of a file's pages, which no processor may touch.
    pub fn is_file(&self) -> bool {
        matches!(self.target, Target::File(_))
    }

    /// The id of the pool it was made of, if it was made of one.
    pub fn pool_id(&self) -> Option<u64> {
        match &self.target {
            Target::Pool(pool) => Some(pool.id()),
            _ => None,
        }
    }
}

impl Drop for MemoryRegistration {
    fn drop(&mut self) {
        // SAFETY: made by ibv_reg_mr and deregistered once, here. No work request names it any more: each holds an Arc
        // to self until its completion, or until its queue pair is destroyed.
        if let Err(error) = ffi::check_errno(unsafe { ffi::ibv_dereg_mr(self.mr) }) {
            // The device may still reach the memory: it must not be used for anything else, ever.
            std::mem::forget(self.target.clone());
            std::mem::forget(Arc::clone(&self.domain));
            tracing::error!(%error, bytes = self.len(), "ibv_dereg_mr failed: the memory is leaked on purpose");
            return;
        }
        MEMORY_REGISTRATIONS.sub(1);
        PINNED_BYTES.sub(self.len() as u64);
    }
}

impl std::fmt::Debug for MemoryRegistration {
    // Not its keys: who knows an rkey can try it.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MemoryRegistration").field("len", &self.len()).field("access", &self.access).finish()
    }
}
