//! The only place that sees rdma-sys: its names, its types and the ways round its traps.
//!
//! Nothing here is public outside the crate, so that the binding can be replaced. Traps that this module stands for:
//!
//! * `ibv_query_port` in the library fills the *old*, shorter structure: [`query_port`] zeroes it first.
//! * `ibv_event_type` is a Rust enum there, so an unknown event would be undefined behaviour: it is never read.
//! * The extended create and query verbs report "unsupported" there: none is used.
//! * `RDMA_OPTION_*` and `IBV_LINK_LAYER_*` are missing: spelled out here.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};

pub(crate) use rdma_sys::{
    ibv_access_flags, ibv_ack_cq_events, ibv_alloc_pd, ibv_comp_channel, ibv_context, ibv_cq,
    ibv_create_comp_channel, ibv_create_cq, ibv_dealloc_pd, ibv_dereg_mr, ibv_destroy_comp_channel,
    ibv_destroy_cq, ibv_destroy_qp, ibv_device_attr, ibv_get_cq_event, ibv_get_device_name, ibv_gid,
    ibv_modify_qp, ibv_mr, ibv_pd, ibv_poll_cq, ibv_port_attr, ibv_port_state, ibv_post_recv, ibv_post_send,
    ibv_qp, ibv_qp_attr, ibv_qp_attr_mask, ibv_qp_init_attr, ibv_qp_state, ibv_qp_type, ibv_query_device,
    ibv_query_gid, ibv_query_qp, ibv_recv_wr, ibv_reg_mr, ibv_req_notify_cq, ibv_send_flags, ibv_send_wr,
    ibv_sge, ibv_wc, ibv_wc_status, ibv_wr_opcode, rdma_accept, rdma_ack_cm_event, rdma_bind_addr,
    rdma_cm_event, rdma_cm_event_type, rdma_cm_id, rdma_conn_param, rdma_connect, rdma_create_event_channel,
    rdma_create_id, rdma_create_qp, rdma_destroy_id, rdma_disconnect, rdma_event_channel, rdma_get_cm_event,
    rdma_get_devices, rdma_listen, rdma_port_space, rdma_resolve_addr, rdma_resolve_route, rdma_set_option,
    rdma_t,
};

/// `IBV_LINK_LAYER_INFINIBAND`
pub(crate) const LINK_LAYER_INFINIBAND: u8 = 1;
/// `IBV_LINK_LAYER_ETHERNET`
pub(crate) const LINK_LAYER_ETHERNET: u8 = 2;
/// `IBV_WC_WITH_IMM`
pub(crate) const WC_WITH_IMM: u32 = 2;
/// `RDMA_OPTION_ID`
pub(crate) const OPTION_LEVEL_ID: i32 = 0;
/// `RDMA_OPTION_ID_REUSEADDR`
pub(crate) const OPTION_REUSE_ADDRESS: i32 = 1;
/// `RDMA_OPTION_ID_ACK_TIMEOUT`
pub(crate) const OPTION_ACK_TIMEOUT: i32 = 3;

/// Turns the answer of a verb that returns an error number into a result.
pub(crate) fn check_errno(code: i32) -> io::Result<()> {
    match code {
        0 => Ok(()),
        // Some providers return -1 and set errno, some the number, some its negative.
        -1 => Err(io::Error::last_os_error()),
        code => Err(io::Error::from_raw_os_error(code.saturating_abs())),
    }
}

/// Turns the answer of a call that returns a pointer and sets errno into a result.
pub(crate) fn check_pointer<T>(pointer: *mut T) -> io::Result<*mut T> {
    if pointer.is_null() { Err(io::Error::last_os_error()) } else { Ok(pointer) }
}

/// Port attributes, with everything zero that this version of the library doesn't fill.
pub(crate) fn query_port(context: *mut ibv_context, port: u8) -> io::Result<ibv_port_attr> {
    // SAFETY: a plain C structure of integers; all zeroes is a value of it.
    let mut attr: ibv_port_attr = unsafe { std::mem::zeroed() };
    // SAFETY: callers pass a context that lives as long as the process. The function fills a prefix of ibv_port_attr,
    // under its older name; `attr` has room for it.
    check_errno(unsafe { rdma_sys::ibv_query_port(context, port, (&raw mut attr).cast()) })?;
    Ok(attr)
}

/// A socket address in the form the kernel takes.
pub(crate) struct RawAddress(libc::sockaddr_storage);

impl RawAddress {
    pub(crate) fn new(address: SocketAddr) -> Self {
        // SAFETY: a plain C structure of integers; all zeroes is a value of it.
        let mut storage: libc::sockaddr_storage = unsafe { std::mem::zeroed() };
        match address {
            SocketAddr::V4(v4) => {
                let raw = libc::sockaddr_in {
                    sin_family: family(libc::AF_INET),
                    sin_port: v4.port().to_be(),
                    sin_addr: libc::in_addr { s_addr: u32::from_ne_bytes(v4.ip().octets()) },
                    sin_zero: [0; 8],
                };
                // SAFETY: sockaddr_storage is at least as large and as aligned as every socket address.
                unsafe { (&raw mut storage).cast::<libc::sockaddr_in>().write(raw) };
            }
            SocketAddr::V6(v6) => {
                let raw = libc::sockaddr_in6 {
                    sin6_family: family(libc::AF_INET6),
                    sin6_port: v6.port().to_be(),
                    sin6_flowinfo: v6.flowinfo(),
                    sin6_addr: libc::in6_addr { s6_addr: v6.ip().octets() },
                    sin6_scope_id: v6.scope_id(),
                };
                // SAFETY: as above.
                unsafe { (&raw mut storage).cast::<libc::sockaddr_in6>().write(raw) };
            }
        }
        Self(storage)
    }

    pub(crate) fn as_mut_ptr(&mut self) -> *mut libc::sockaddr {
        (&raw mut self.0).cast()
    }
}

/// Reads a socket address back. `None` for families other than IPv4 and IPv6.
pub(crate) fn socket_address(storage: &libc::sockaddr_storage) -> Option<SocketAddr> {
    match i32::from(storage.ss_family) {
        libc::AF_INET => {
            // SAFETY: the family says which structure it holds; storage is large and aligned enough for it.
            let raw = unsafe { (&raw const *storage).cast::<libc::sockaddr_in>().read() };
            let ip = Ipv4Addr::from(raw.sin_addr.s_addr.to_ne_bytes());
            Some(SocketAddrV4::new(ip, u16::from_be(raw.sin_port)).into())
        }
        libc::AF_INET6 => {
            // SAFETY: as above.
            let raw = unsafe { (&raw const *storage).cast::<libc::sockaddr_in6>().read() };
            let ip = Ipv6Addr::from(raw.sin6_addr.s6_addr);
            Some(
                SocketAddrV6::new(ip, u16::from_be(raw.sin6_port), raw.sin6_flowinfo, raw.sin6_scope_id)
                    .into(),
            )
        }
        _ => None,
    }
}

/// Address families are tiny constants of type int that the structures hold as u16.
fn family(family: i32) -> libc::sa_family_t {
    libc::sa_family_t::try_from(family).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn socket_addresses_round_trip() {
        for text in ["10.9.0.1:4791", "[fe80::1]:7"] {
            let address: SocketAddr = text.parse().unwrap();
            assert_eq!(socket_address(&RawAddress::new(address).0), Some(address));
        }
        let mut unknown = RawAddress::new("1.2.3.4:5".parse().unwrap());
        unknown.0.ss_family = family(libc::AF_UNIX);
        assert_eq!(socket_address(&unknown.0), None);
    }

    #[test]
    fn answers_of_every_provider_style_become_errors() {
        assert!(check_errno(0).is_ok());
        assert_eq!(check_errno(libc::ENOMEM).unwrap_err().raw_os_error(), Some(libc::ENOMEM));
        assert_eq!(check_errno(-libc::EINVAL).unwrap_err().raw_os_error(), Some(libc::EINVAL));
    }
}
