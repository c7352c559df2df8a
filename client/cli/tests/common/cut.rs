//! Broken networks: TCP connections of a process, ended from outside as a network ends them. What was queued in either
//! direction is lost, and the other side gets a reset.
//!
//! The socket is duplicated out of the process and disconnected: the process is not asked, and finds out by itself.

use rustix::net::{SocketAddrAny, connect_unspec, getpeername, getsockname};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
use std::net::SocketAddr;
use std::os::fd::OwnedFd;

/// Breaks every TCP connection of the process `pid` to `port`, and says how many there were.
pub fn cut(pid: u32, port: u16) -> usize {
    cut_some(pid, port, usize::MAX)
}

/// As [`cut`], but no more than so many of them.
pub fn cut_some(pid: u32, port: u16, most: usize) -> usize {
    let sockets = sockets(pid);
    let broken =
        sockets.iter().filter(|socket| peer_port(socket) == Some(port) && connect_unspec(socket).is_ok());
    broken.take(most).count()
}

fn peer_port(socket: &OwnedFd) -> Option<u16> {
    let port = |address: SocketAddrAny| SocketAddr::try_from(address).ok().map(|a| a.port());
    // A listener has no peer.
    getsockname(socket).ok().and_then(port)?;
    getpeername(socket).ok().flatten().and_then(port)
}

fn sockets(pid: u32) -> Vec<OwnedFd> {
    let Some(process) = Pid::from_raw(i32::try_from(pid).unwrap()) else { return Vec::new() };
    let Ok(pidfd) = pidfd_open(process, PidfdFlags::empty()) else { return Vec::new() };
    let Ok(entries) = std::fs::read_dir(format!("/proc/{pid}/fd")) else { return Vec::new() };
    entries
        .flatten()
        .filter(|e| std::fs::read_link(e.path()).is_ok_and(|to| to.to_string_lossy().starts_with("socket:")))
        .filter_map(|e| e.file_name().to_str()?.parse().ok())
        .filter_map(|number| pidfd_getfd(&pidfd, number, PidfdGetfdFlags::empty()).ok())
        .collect()
}
