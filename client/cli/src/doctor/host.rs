//! What this host has: RDMA devices, and how much memory may be pinned.

use crate::output::{line, size};
use holdfast_verbs::{Device, LinkLayer};
use rustix::process::{Resource, getrlimit};
use serde_json::{Value, json};
use std::net::IpAddr;

/// What a client with defaults pins: 64 MiB of chunks, and its message buffers.
const PINNED_BYTES: u64 = 72 << 20;

pub(super) struct Host {
    devices: Result<Vec<Value>, String>,
    /// Bytes; `None`: no limit.
    memlock: Option<u64>,
    privileged: bool,
}

pub(super) fn look() -> Host {
    let devices = Device::list()
        .map(|devices| devices.iter().map(|device| describe(device)).collect())
        .map_err(|error| error.to_string());
    Host { devices, memlock: getrlimit(Resource::Memlock).current, privileged: may_lock_all() }
}

fn describe(device: &Device) -> Value {
    let ports = match device.ports() {
        Ok(ports) => ports,
        Err(error) => return json!({ "name": device.name(), "error": error.to_string() }),
    };
    let ports: Vec<Value> = ports
        .iter()
        .map(|port| {
            let gids: Vec<Value> = port
                .gids
                .iter()
                .map(|(index, gid)| {
                    let ipv4 = match gid.ip() {
                        IpAddr::V4(ip) => Some(ip.to_string()),
                        IpAddr::V6(_) => None,
                    };
                    json!({ "index": index, "gid": format!("{gid:?}"), "ipv4": ipv4 })
                })
                .collect();
            let link = match port.link_layer {
                LinkLayer::InfiniBand => "InfiniBand",
                LinkLayer::Ethernet => "Ethernet",
                LinkLayer::Unspecified => "unspecified",
            };
            json!({
                "number": port.number, "active": port.active, "link_layer": link,
                "mtu": port.active_mtu, "gids": gids,
            })
        })
        .collect();
    json!({ "name": device.name(), "software": is_software(device.name()), "ports": ports })
}

/// True if a device is a driver only (rxe, siw): it has no place on a bus.
fn is_software(name: &str) -> bool {
    let place = std::fs::canonicalize(format!("/sys/class/infiniband/{name}"));
    // Older kernels show it under the network card it is attached to; then its usual name must do.
    place.is_ok_and(|place| place.starts_with("/sys/devices/virtual"))
        || ["rxe", "siw"].iter().any(|kind| name.starts_with(kind))
}

/// True if this process may pin without limit (CAP_IPC_LOCK, bit 14 of the effective capabilities).
fn may_lock_all() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    effective.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok()).is_some_and(|caps| caps >> 14 & 1 == 1)
}

impl Host {
    /// True if all devices of this host are software, `None` if only some are.
    pub(super) fn software(&self) -> Option<bool> {
        let devices = self.devices.as_deref().unwrap_or_default();
        let software = devices.iter().filter(|device| device["software"] == true).count();
        match software {
            0 => Some(false),
            some => (some == devices.len()).then_some(true),
        }
    }

    fn memlock_is_enough(&self) -> bool {
        self.privileged || self.memlock.is_none_or(|limit| limit >= PINNED_BYTES)
    }

    pub(super) fn json(&self) -> Value {
        json!({
            "devices": self.devices.as_deref().unwrap_or_default(),
            "devices_error": self.devices.as_ref().err(),
            "memlock_bytes": self.memlock,
            "memlock_unlimited": self.memlock.is_none() || self.privileged,
            "memlock_is_enough": self.memlock_is_enough(),
        })
    }

    pub(super) fn print(&self) -> anyhow::Result<()> {
        match &self.devices {
            Err(error) => line(format_args!("rdma      the devices cannot be used: {error}"))?,
            Ok(devices) if devices.is_empty() => {
                line(
                    "rdma      no device on this host; without a network card that has RDMA, software can stand in:",
                )?;
                line("          modprobe rdma_rxe && rdma link add rxe0 type rxe netdev eth0")?;
            }
            Ok(devices) => {
                for device in devices {
                    print_device(device)?;
                }
            }
        }
        let limit = match self.memlock {
            _ if self.privileged => "no limit (this process has CAP_IPC_LOCK)".to_owned(),
            None => "no limit".to_owned(),
            Some(limit) => size(limit),
        };
        line(format_args!("memlock   {limit}"))?;
        if !self.memlock_is_enough() {
            line(format_args!(
                "          too little to pin {} for RDMA: raise it with `ulimit -l`, limits.conf, or LimitMEMLOCK=",
                size(PINNED_BYTES)
            ))?;
        }
        Ok(())
    }
}

fn print_device(device: &Value) -> anyhow::Result<()> {
    let name = device["name"].as_str().unwrap_or("?");
    if let Some(error) = device["error"].as_str() {
        return line(format_args!("rdma      {name}: {error}"));
    }
    for port in device["ports"].as_array().into_iter().flatten() {
        let state = if port["active"] == true { "active" } else { "down" };
        let link = port["link_layer"].as_str().unwrap_or("?");
        line(format_args!("rdma      {name} port {}: {state}, {link}, MTU {}", port["number"], port["mtu"]))?;
        for gid in port["gids"].as_array().into_iter().flatten() {
            let ipv4 = gid["ipv4"].as_str().map(|ip| format!(" ({ip})")).unwrap_or_default();
            line(format_args!(
                "          GID {}: {}{ipv4}",
                gid["index"],
                gid["gid"].as_str().unwrap_or("?")
            ))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn software_devices_are_told_apart() {
        let host = |names: &[&str]| Host {
            devices: Ok(names.iter().map(|n| json!({ "name": n, "software": is_software(n) })).collect()),
            memlock: None,
            privileged: true,
        };
        assert_eq!(host(&["rxe0", "siw_eth0"]).software(), Some(true));
        assert_eq!(host(&["mlx5_0"]).software(), Some(false));
        assert_eq!(host(&["mlx5_0", "rxe0"]).software(), None);
    }
}
