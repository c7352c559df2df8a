//! What the planes do not do: touch control during I/O, allocate or register per request, burn CPU when idle, keep anything
//! of a killed client but its opens, for their hold time.

#![allow(clippy::unwrap_used)] // helpers of tests stand outside of #[test] functions

mod common;

use common::{Deployment, Wish, finish, pattern, signal, transports};
use holdfast_client::{Config, Disposition, OpenOptions, Place, Region, Session, Transport};
use std::time::{Duration, Instant};

/// User and system time a process has used, in clock ticks (10 ms).
fn ticks(pid: u32) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let after = stat.rsplit_once(") ").unwrap().1;
    let field = |n: usize| after.split(' ').nth(n).unwrap().parse::<u64>().unwrap();
    field(11) + field(12)
}

/// System calls a process made that moved bytes by read(2) and write(2) and their kin.
fn io_calls(pid: u32) -> (u64, u64) {
    let io = std::fs::read_to_string(format!("/proc/{pid}/io")).unwrap_or_default();
    let field = |name: &str| {
        io.lines().find_map(|l| l.strip_prefix(name)).and_then(|v| v.trim().parse::<u64>().ok()).unwrap_or(0)
    };
    (field("syscr:"), field("syscw:"))
}

/// These tests measure: one at a time.
static ALONE: std::sync::Mutex<()> = std::sync::Mutex::new(());

fn alone() -> std::sync::MutexGuard<'static, ()> {
    ALONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

fn open_place() -> (Place, OpenOptions) {
    let place = Place { volume: "data".into(), path: "f".into() };
    (place, OpenOptions::read_write().disposition(Disposition::OpenOrCreate, 0o644))
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

#[test]
fn in_the_steady_state_nothing_is_allocated_registered_or_asked_of_control() {
    let _alone = alone();
    let server = Deployment::start();
    for kind in transports() {
        let transport: Transport = kind.parse().unwrap();
        runtime().block_on(async {
            let session = Session::connect(&Config::load(&server.config()).unwrap()).await.unwrap();
            let (place, options) = open_place();
            let open = session.open(&place, &options).await.unwrap();
            let channel = open.connect(transport).await.unwrap();
            let binding = open.bind(&channel).await.unwrap();
            let region = Region::allocate(16 * 65_536).unwrap();
            region.copy_in(0, &pattern(3, 16 * 65_536)).unwrap();
            let rounds = async |n: u64| {
                for round in 0..n {
                    let mut flying = Vec::new();
                    for slot in 0..16usize {
                        let (start, length) = (slot * 65_536, if slot % 2 == 0 { 4096 } else { 65_536 });
                        let at = (round % 4) * 16 * 65_536 + start as u64;
                        flying.push(if round % 2 == 0 {
                            binding.submit_write(&region, start..start + length, at).await.unwrap()
                        } else {
                            binding.submit_read(&region, start..start + length, at).await.unwrap()
                        });
                    }
                    for one in flying {
                        one.await.unwrap();
                    }
                }
            };
            rounds(50).await;
            // Each look at the gauges costs the link a few allocations itself: what a look costs is measured first.
            let (a, b) = (server.gauges(), server.gauges());
            let look = b["dataplane.heap_allocations_total"] - a["dataplane.heap_allocations_total"];
            let (control_ticks, control_io) = (ticks(server.control_pid), io_calls(server.control_pid));
            let before = server.gauges();
            rounds(200).await;
            let calls = io_calls(server.control_pid);
            let after = server.gauges();
            let grown = |name: &str| after[name] - before[name];
            let requests = grown("dataplane.requests_read_total") + grown("dataplane.requests_write_total");
            assert_eq!(requests, 200 * 16, "{kind}");
            let allocations = grown("dataplane.heap_allocations_total");
            assert!(
                allocations <= 2 * look + 64,
                "{kind}: {allocations} allocations in {requests} requests (a look at the gauges costs {look})"
            );
            assert_eq!(
                grown("dataplane.registrations_total"),
                0,
                "{kind}: nothing is registered per request"
            );
            for (name, value) in &after {
                if name.starts_with("control.requests_total") {
                    assert_eq!(*value, before[name], "{kind}: control was asked: {name}");
                }
            }
            // The one look between costs control a few calls, and so does each second; thousands of requests cost it none.
            let made = (calls.0 - control_io.0) + (calls.1 - control_io.1);
            assert!(
                made < requests / 10,
                "{kind}: control made {made} reading and writing calls during {requests} requests"
            );
            assert!(ticks(server.control_pid) - control_ticks < 20, "{kind}: control was busy");
            open.close().await.unwrap();
        });
    }
}

#[test]
fn an_idle_server_uses_no_cpu() {
    let _alone = alone();
    let server = Deployment::start();
    for kind in transports() {
        let transport: Transport = kind.parse().unwrap();
        let runtime = runtime();
        let held = runtime.block_on(async {
            let session = Session::connect(&Config::load(&server.config()).unwrap()).await.unwrap();
            let (place, options) = open_place();
            let open = session.open(&place, &options).await.unwrap();
            let channel = open.connect(transport).await.unwrap();
            let binding = open.bind(&channel).await.unwrap();
            (session, open, channel, binding)
        });
        std::thread::sleep(Duration::from_millis(500));
        let used = || (ticks(server.control_pid), ticks(server.dataplane_pid), ticks(std::process::id()));
        let (control, dataplane, client) = used();
        let wakeups = server.gauges()["dataplane.wakeups_total"];
        let start = Instant::now();
        std::thread::sleep(Duration::from_secs(3));
        let woken = server.gauges()["dataplane.wakeups_total"] - wakeups;
        let (control_now, dataplane_now, client_now) = used();
        // A tick is 10 ms; reading the gauges may cost one.
        assert!(control_now - control <= 2, "{kind}: idle control used {} ticks", control_now - control);
        assert!(
            dataplane_now - dataplane <= 2,
            "{kind}: idle dataplane used {} ticks",
            dataplane_now - dataplane
        );
        assert!(client_now - client <= 3, "{kind}: idle client used {} ticks", client_now - client);
        let seconds = start.elapsed().as_secs();
        assert!(
            woken <= seconds + 1,
            "{kind}: the workers of an idle server woke {woken} times in {seconds} s"
        );
        drop(held);
    }
}

#[test]
fn a_client_killed_in_the_middle_leaves_its_open_behind_and_nothing_else() {
    let _alone = alone();
    let server = Deployment::with(&Wish::default());
    let source = server.scratch("big");
    std::fs::write(&source, pattern(9, 256 << 20)).unwrap();
    server.ok(&["cp", source.to_str().unwrap(), "data:/big"]);
    server.until("idle", |g| g["dataplane.channels"] == 0 && g["control.sessions"] == 0);
    for kind in transports() {
        for (from, to) in [
            (source.to_str().unwrap().to_owned(), "data:/copy".to_owned()),
            ("data:/big".into(), server.scratch("back").to_str().unwrap().into()),
        ] {
            let before = server.gauges();
            let moved = |g: &std::collections::BTreeMap<String, u64>| {
                g["dataplane.bytes_read_total"] + g["dataplane.bytes_written_total"]
            };
            // One that was through before it could be killed is started again.
            loop {
                let child = server
                    .holdfast(&["cp", "--chunk", "16384", "--transport", kind, &from, &to])
                    .stdout(std::process::Stdio::null())
                    .stderr(std::process::Stdio::null())
                    .spawn()
                    .unwrap();
                let (start, begun) = (Instant::now(), moved(&server.gauges()));
                while moved(&server.gauges()) < begun + (8 << 20) {
                    assert!(start.elapsed() < common::DEADLINE, "{kind}: the copy does not move");
                    std::thread::sleep(Duration::from_millis(2));
                }
                signal(child.id(), rustix::process::Signal::KILL);
                if !finish(child).status.success() {
                    break;
                }
            }
            // What it had open is kept for it. Nobody will resume it here: the operator ends it.
            server.until(&format!("{kind}: its session is lost"), |g| g["control.sessions"] == 0);
            let kept = server.ids(&["--state", "detached"]);
            assert_eq!(kept.len(), 1, "{kind}: one file was under way");
            server.ok(&["opens", "--close", &kept[0]]);
            let same = [
                "control.sessions",
                "control.opens",
                "control.open_files",
                "control.bindings",
                "dataplane.channels",
                "dataplane.bindings",
                "dataplane.requests_in_flight",
                "dataplane.buffers_free",
                "dataplane.message_buffers_free",
                "dataplane.mrs",
                "dataplane.pinned_bytes",
                "dataplane.qps",
                "dataplane.cqs",
                "dataplane.open_fds",
            ];
            server.until(&format!("{kind}: back to the baseline, {before:#?}"), |g| {
                same.iter().all(|name| g[*name] == before[*name])
            });
        }
    }
}
