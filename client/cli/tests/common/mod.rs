//! A real deployment for the process tests: `holdfast init`, `holdfast serve`, both planes as processes of their own.
//!
//! Every test file compiles this module and uses a part of it.
#![allow(dead_code, unreachable_pub, unused_imports)]

mod cut;
pub mod deployment;
pub mod load;
pub mod probe;
pub mod raw;

pub use cut::{cut, cut_some};
pub use deployment::{Deployment, Wish};

use std::path::{Path, PathBuf};
use std::process::{Child, Output};
use std::time::Duration;

/// How long anything may take before the test fails instead of hanging.
pub const DEADLINE: Duration = Duration::from_secs(60);

/// A program of ours, beside the one under test.
pub fn program(name: &str) -> PathBuf {
    let here = Path::new(env!("CARGO_BIN_EXE_holdfast")).with_file_name(name);
    assert!(
        here.exists(),
        "{} is not built: run ci/test, or `cargo build --workspace --bins` first",
        here.display()
    );
    here
}

/// The address of an RDMA device, if there is one. Absence is a failure where HOLDFAST_REQUIRE_RDMA is 1.
pub fn rdma_address() -> Option<String> {
    let found = holdfast_verbs::Device::list().ok().and_then(|devices| {
        devices.iter().filter_map(|d| d.ipv4_addresses().ok()).flatten().next().map(|a| a.to_string())
    });
    if found.is_none() {
        assert!(
            std::env::var("HOLDFAST_REQUIRE_RDMA").as_deref() != Ok("1"),
            "HOLDFAST_REQUIRE_RDMA=1, and no RDMA device"
        );
        eprintln!("skipped over verbs: no RDMA device");
    }
    found
}

/// The transports that can be tested here. `local` only where there is no RDMA device: a guest that has one is slow, and its host
/// has tested `local`.
pub fn transports() -> Vec<&'static str> {
    if rdma_address().is_some() { vec!["tcp", "verbs"] } else { vec!["tcp", "local"] }
}

/// The client library's name for a transport.
pub fn transport_of(kind: &str) -> holdfast_client::Transport {
    kind.parse().unwrap()
}

/// Sends a signal to a process that this test started.
pub fn signal(pid: u32, signal: rustix::process::Signal) {
    let pid = rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    let _ = rustix::process::kill_process(pid, signal);
}

/// Stops a process, and returns when each of its threads stands still.
pub fn freeze(pid: u32) {
    signal(pid, rustix::process::Signal::STOP);
    let start = std::time::Instant::now();
    let stands = || {
        let Ok(threads) = std::fs::read_dir(format!("/proc/{pid}/task")) else { return true };
        let stats = threads.flatten().filter_map(|t| std::fs::read_to_string(t.path().join("stat")).ok());
        stats
            .into_iter()
            .all(|stat| stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with(['T', 'Z', 'X'])))
    };
    while !stands() {
        assert!(start.elapsed() < DEADLINE, "process {pid} cannot be stopped");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Waits until nothing is left of a process that was killed and whose parent looks after it.
pub fn until_gone(pid: u32) {
    let start = std::time::Instant::now();
    while std::path::Path::new(&format!("/proc/{pid}")).exists() {
        assert!(start.elapsed() < DEADLINE, "process {pid} does not go");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Lets a process go on that was stopped.
pub fn thaw(pid: u32) {
    signal(pid, rustix::process::Signal::CONT);
}

/// Waits for a child, killing it at the deadline.
pub fn finish(child: Child) -> Output {
    let pid = child.id();
    let (done, over) = std::sync::mpsc::channel::<()>();
    let guard = std::thread::spawn(move || {
        if over.recv_timeout(DEADLINE) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
            signal(pid, rustix::process::Signal::KILL);
        }
    });
    let output = child.wait_with_output().unwrap();
    let _ = done.send(());
    guard.join().unwrap();
    output
}

/// Bytes that differ everywhere and are the same in each run.
pub fn pattern(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}
