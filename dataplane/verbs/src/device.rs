//! [`Device`]: an RDMA device as librdmacm opened it, and what can be asked about it.
//!
//! Contexts come from `rdma_get_devices`, so that they equal the `verbs` of every connection manager id. They are never
//! closed: a [`Device`] is valid as long as the process, and everything below it holds an `Arc` to it.

use std::collections::BTreeMap;
use std::ffi::CStr;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use parking_lot::Mutex;

use crate::error::VerbsError;
use crate::ffi;

/// All devices seen so far. Entries are never removed.
static DEVICES: Mutex<Vec<Arc<Device>>> = Mutex::new(Vec::new());

/// An RDMA device.
pub struct Device {
    context: *mut ffi::ibv_context,
    name: String,
    limits: DeviceLimits,
}

// SAFETY: libibverbs is thread-safe, and the context is never closed.
unsafe impl Send for Device {}
// SAFETY: as above.
unsafe impl Sync for Device {}

/// What a device can do at most.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceLimits {
    /// Work requests in one queue.
    pub work_requests: u32,
    /// Entries of one completion queue.
    pub completions: u32,
    /// RDMA READs one queue pair may have in flight as their issuer.
    pub reads_issued: u8,
    /// RDMA READs one queue pair may be asked to answer at once.
    pub reads_answered: u8,
    /// Bytes in one registration.
    pub registration_bytes: u64,
    /// Number of ports.
    pub ports: u8,
}

/// What connects a port to others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkLayer {
    /// InfiniBand.
    InfiniBand,
    /// Ethernet: RoCE or iWARP.
    Ethernet,
    /// Not told.
    Unspecified,
}

/// One port of a device, as it is at the moment.
#[derive(Clone, Debug)]
pub struct Port {
    /// 1 and up.
    pub number: u8,
    /// True if it can carry data.
    pub active: bool,
    /// Path MTU in bytes (256 to 4096).
    pub active_mtu: u32,
    /// Longest message in bytes.
    pub max_message: u32,
    /// What connects it to others.
    pub link_layer: LinkLayer,
    /// Global identifiers in use, with their index.
    pub gids: Vec<(u32, Gid)>,
}

/// A global identifier: 16 bytes, an IPv6 address in form. RoCE maps IPv4 addresses into it.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Gid(pub [u8; 16]);

impl Gid {
    /// The address it stands for.
    pub fn ip(&self) -> IpAddr {
        let v6 = Ipv6Addr::from(self.0);
        v6.to_ipv4_mapped().map_or(IpAddr::V6(v6), IpAddr::V4)
    }
}

impl std::fmt::Debug for Gid {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", Ipv6Addr::from(self.0))
    }
}

impl Device {
    /// All RDMA devices of this host, devices that came lately included; empty if there are none.
    pub fn list() -> Result<Vec<Arc<Self>>, VerbsError> {
        // Without any device librdmacm fails in several ways; that there is none is an answer, not an error.
        if std::fs::read_dir("/sys/class/infiniband").map_or(true, |mut entries| entries.next().is_none()) {
            return Ok(Vec::new());
        }
        let mut known = DEVICES.lock();
        let mut count = 0;
        // SAFETY: `count` outlives the call; the list that comes back is null or has `count` entries.
        let list = ffi::check_pointer(unsafe { ffi::rdma_get_devices(&raw mut count) })
            .map_err(|source| VerbsError::call("rdma_get_devices", source))?;
        for index in 0..usize::try_from(count).unwrap_or(0) {
            // SAFETY: index < count. The list itself is never freed, which keeps the contexts open.
            let context = unsafe { *list.add(index) };
            if !context.is_null() && !known.iter().any(|device| device.context == context) {
                known.push(Arc::new(Self::new(context)?));
            }
        }
        Ok(known.clone())
    }

    /// The device that `context`, taken from a connection manager id, belongs to.
    pub(crate) fn of_context(context: *mut ffi::ibv_context) -> Result<Arc<Self>, VerbsError> {
        let find = |devices: &[Arc<Self>]| devices.iter().find(|device| device.context == context).cloned();
        if let Some(device) = find(&DEVICES.lock()) {
            return Ok(device);
        }
        find(&Self::list()?).ok_or_else(|| {
            VerbsError::call("rdma_get_devices", std::io::Error::from_raw_os_error(libc::ENODEV))
        })
    }

    fn new(context: *mut ffi::ibv_context) -> Result<Self, VerbsError> {
        // SAFETY: `context` is open; the name is a C string inside the device, which lives as long as the context.
        let name = unsafe { CStr::from_ptr(ffi::ibv_get_device_name((*context).device)) };
        // SAFETY: a plain C structure of integers; all zeroes is a value of it.
        let mut attr: ffi::ibv_device_attr = unsafe { std::mem::zeroed() };
        // SAFETY: `context` is open and `attr` outlives the call.
        ffi::check_errno(unsafe { ffi::ibv_query_device(context, &raw mut attr) })
            .map_err(|source| VerbsError::call("ibv_query_device", source))?;
        let limits = DeviceLimits {
            work_requests: u32::try_from(attr.max_qp_wr).unwrap_or(0),
            completions: u32::try_from(attr.max_cqe).unwrap_or(0),
            reads_issued: u8::try_from(attr.max_qp_init_rd_atom.clamp(0, 255)).unwrap_or(0),
            reads_answered: u8::try_from(attr.max_qp_rd_atom.clamp(0, 255)).unwrap_or(0),
            registration_bytes: attr.max_mr_size,
            ports: attr.phys_port_cnt,
        };
        Ok(Self { context, name: name.to_string_lossy().into_owned(), limits })
    }

    /// The name, such as `rxe0` or `mlx5_0`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What it can do at most.
    pub fn limits(&self) -> DeviceLimits {
        self.limits
    }

    /// Its ports, as they are now.
    pub fn ports(&self) -> Result<Vec<Port>, VerbsError> {
        (1..=self.limits.ports).map(|number| self.port(number)).collect()
    }

    /// One port, as it is now; numbers start at 1.
    pub fn port(&self, number: u8) -> Result<Port, VerbsError> {
        let attr = ffi::query_port(self.context, number)
            .map_err(|source| VerbsError::call("ibv_query_port", source))?;
        let gids = (0..attr.gid_tbl_len.clamp(0, 1024))
            .filter_map(|index| {
                let gid = self.gid(number, index)?;
                Some((u32::try_from(index).ok()?, gid))
            })
            .collect();
        Ok(Port {
            number,
            active: attr.state == ffi::ibv_port_state::IBV_PORT_ACTIVE,
            active_mtu: if (1..=5).contains(&attr.active_mtu) { 128 << attr.active_mtu } else { 0 },
            max_message: attr.max_msg_sz,
            link_layer: match attr.link_layer {
                ffi::LINK_LAYER_INFINIBAND => LinkLayer::InfiniBand,
                ffi::LINK_LAYER_ETHERNET => LinkLayer::Ethernet,
                _ => LinkLayer::Unspecified,
            },
            gids,
        })
    }

    /// Longest message of port `number`, in bytes.
    pub(crate) fn max_message(&self, number: u8) -> Result<u32, VerbsError> {
        ffi::query_port(self.context, number)
            .map(|attr| attr.max_msg_sz)
            .map_err(|source| VerbsError::call("ibv_query_port", source))
    }

    /// The GID at `index` of port `number`, if there is one.
    pub(crate) fn gid(&self, number: u8, index: i32) -> Option<Gid> {
        let mut gid = ffi::ibv_gid { raw: [0; 16] };
        // SAFETY: the context is open and `gid` outlives the call.
        if unsafe { ffi::ibv_query_gid(self.context, number, index, &raw mut gid) } != 0 {
            return None;
        }
        // SAFETY: every view of the union is 16 plain bytes, all initialised.
        let raw = unsafe { gid.raw };
        (raw != [0; 16]).then_some(Gid(raw))
    }

    /// The IPv4 addresses a RoCE device can be reached at, on its active ports.
    pub fn ipv4_addresses(&self) -> Result<Vec<Ipv4Addr>, VerbsError> {
        let mut addresses = Vec::new();
        for (_, gid) in self.ports()?.into_iter().filter(|port| port.active).flat_map(|port| port.gids) {
            if let IpAddr::V4(address) = gid.ip() {
                if !addresses.contains(&address) {
                    addresses.push(address);
                }
            }
        }
        Ok(addresses)
    }

    /// The counters the driver keeps for a port (such as `sent_pkts`, `rdma_sends`, `rcvd_rnr_err`), by name. Empty if it keeps none.
    pub fn counters(&self, port: u8) -> BTreeMap<String, u64> {
        let mut counters = BTreeMap::new();
        for folder in ["counters", "hw_counters"] {
            let path = format!("/sys/class/infiniband/{}/ports/{port}/{folder}", self.name);
            for entry in std::fs::read_dir(path).into_iter().flatten().flatten() {
                let value =
                    std::fs::read_to_string(entry.path()).ok().and_then(|text| text.trim().parse().ok());
                if let (Some(value), Ok(name)) = (value, entry.file_name().into_string()) {
                    counters.insert(name, value);
                }
            }
        }
        counters
    }

    pub(crate) fn context(&self) -> *mut ffi::ibv_context {
        self.context
    }
}

impl std::fmt::Debug for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Device").field("name", &self.name).field("limits", &self.limits).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gids_of_roce_read_as_ipv4() {
        let gid = Gid([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xFF, 0xFF, 10, 9, 0, 1]);
        assert_eq!(gid.ip(), IpAddr::V4(Ipv4Addr::new(10, 9, 0, 1)));
        let link_local = Gid([0xFE, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
        assert!(link_local.ip().is_ipv6());
    }

    #[test]
    fn listing_never_fails_for_want_of_devices() {
        let devices = Device::list().unwrap();
        for device in devices {
            assert!(!device.name().is_empty());
        }
    }
}
