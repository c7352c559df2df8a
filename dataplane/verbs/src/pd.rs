//! [`ProtectionDomain`]: which registrations a queue pair can use, and a peer reach through it.

use std::sync::Arc;

use crate::device::Device;
use crate::error::VerbsError;
use crate::ffi;
use crate::gauges::PROTECTION_DOMAINS;

/// A protection domain. A key that a peer holds works only on queue pairs of the domain it was registered in: give
/// each client its own, if memory is exposed to it.
pub struct ProtectionDomain {
    pd: *mut ffi::ibv_pd,
    device: Arc<Device>,
}

// SAFETY: libibverbs is thread-safe; the pointer is used only while self is alive.
unsafe impl Send for ProtectionDomain {}
// SAFETY: as above.
unsafe impl Sync for ProtectionDomain {}

impl ProtectionDomain {
    /// Makes a domain on `device`.
    pub fn new(device: &Arc<Device>) -> Result<Arc<Self>, VerbsError> {
        // SAFETY: the context is open as long as the process.
        let pd = ffi::check_pointer(unsafe { ffi::ibv_alloc_pd(device.context()) })
            .map_err(|source| VerbsError::call("ibv_alloc_pd", source))?;
        PROTECTION_DOMAINS.add(1);
        Ok(Arc::new(Self { pd, device: Arc::clone(device) }))
    }

    /// Its device.
    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }

    pub(crate) fn as_ptr(&self) -> *mut ffi::ibv_pd {
        self.pd
    }
}

impl Drop for ProtectionDomain {
    fn drop(&mut self) {
        // SAFETY: registrations and queue pairs hold an Arc to self, so none is left; it is freed once, here.
        if let Err(error) = ffi::check_errno(unsafe { ffi::ibv_dealloc_pd(self.pd) }) {
            tracing::error!(%error, "ibv_dealloc_pd failed: a protection domain is leaked");
        }
        PROTECTION_DOMAINS.sub(1);
    }
}

impl std::fmt::Debug for ProtectionDomain {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ProtectionDomain").field("device", &self.device.name()).finish()
    }
}
