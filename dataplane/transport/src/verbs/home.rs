//! [`Home`]: a protection domain with the pools registered in it.

use super::io_error;
use super::lane::Lane;
use crate::channel::{Registrar, Registration, RemoteAccess};
use holdfast_shared::types::RegionDescriptor;
use holdfast_verbs::memory::{Buffer, Pool, Region};
use holdfast_verbs::{Access, Device, Local, MemoryRegistration, ProtectionDomain, VerbsError};
use std::io;
use std::net::SocketAddr;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

/// Where the buffers of one or more channels are registered, for local use.
#[derive(Clone)]
pub(super) struct Home {
    pub(super) domain: Arc<ProtectionDomain>,
    /// By pool id. Few: searched one by one.
    pools: Vec<(u64, Arc<MemoryRegistration>)>,
}

impl Home {
    pub(super) fn new(device: &Arc<Device>) -> Result<Self, VerbsError> {
        Ok(Self { domain: ProtectionDomain::new(device)?, pools: Vec::new() })
    }

    /// Registers those pools that are not yet.
    pub(super) fn add(&mut self, pools: &[Pool]) -> Result<(), VerbsError> {
        for pool in pools {
            if self.registration(pool.id()).is_none() {
                self.pools.push((pool.id(), MemoryRegistration::of_pool(&self.domain, pool)?));
            }
        }
        Ok(())
    }

    fn registration(&self, pool: u64) -> Option<&Arc<MemoryRegistration>> {
        self.pools.iter().find(|(id, _)| *id == pool).map(|(_, registration)| registration)
    }

    /// Part of a buffer, as a work request takes it. On failure the buffer goes back to its pool.
    pub(super) fn local(&self, buffer: Buffer, range: Range<usize>) -> Result<Local, VerbsError> {
        let registration = self.registration(buffer.pool_id()).ok_or(VerbsError::WrongRegistration)?;
        Local::buffer(registration, buffer, range)
    }
}

/// Registers regions in a client's own domain.
pub(super) struct Exporting(pub(super) Arc<ProtectionDomain>);

impl Registrar for Exporting {
    fn register(&self, region: Arc<Region>, access: RemoteAccess) -> io::Result<Registration> {
        let length = u32::try_from(region.len())
            .map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, "a region of 4 GiB or more"))?;
        let access = match access {
            RemoteAccess::Fetch => Access::RemoteRead,
            RemoteAccess::Place => Access::RemoteWrite,
            RemoteAccess::FetchAndPlace => Access::RemoteReadWrite,
        };
        let held = MemoryRegistration::of_region(&self.0, &region, access).map_err(io_error)?;
        let descriptor = RegionDescriptor::new(held.addr(), held.rkey(), length);
        Ok(Registration::new(descriptor, region, Box::new(held)))
    }

    fn lane(&self, address: SocketAddr, timeout: Duration, depth: usize) -> io::Result<Lane> {
        Lane::connect(&self.0, address, timeout, depth)
    }
}

/// Of a channel whose domain is shared with others: a key given to one peer would work for all.
pub(super) struct NotExporting;

impl Registrar for NotExporting {
    fn register(&self, _region: Arc<Region>, _access: RemoteAccess) -> io::Result<Registration> {
        Err(io::Error::new(
            io::ErrorKind::Unsupported,
            "the accepting side of a verbs channel exports no memory",
        ))
    }
}
