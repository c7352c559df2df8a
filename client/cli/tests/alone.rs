//! One plane alone, or both, killed under a load that checks everything it sees.
//!
//! What is measured is printed: run with `--nocapture` to see it.

#![allow(clippy::unwrap_used)] // helpers of tests stand outside of #[test] functions

mod common;

use common::load::{Load, Plan, now};
use common::{Deployment, transports};
use std::time::Duration;

/// These tests measure: one at a time.
static ALONE: std::sync::Mutex<()> = std::sync::Mutex::new(());

fn alone() -> std::sync::MutexGuard<'static, ()> {
    ALONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Not a test: the load, in a process of its own.
#[test]
#[ignore = "it is the load that the other tests start"]
fn load_process() {
    common::load::run_if_asked();
}

/// A load that asks nothing of control once it runs.
fn data_load(server: &Deployment, kind: &str) -> Load {
    let mut load = Load::start(Plan { lockers: 0, ..Plan::new(server, kind, 1, 7) });
    load.goes_on(500);
    load
}

fn ms(ns: u64) -> f64 {
    ns as f64 / 1e6
}

/// The longest time without a completion that ended after `since`, and the first completion after it.
fn longest_gap(timeline: &[u64], since: u64) -> (u64, u64) {
    let mut sorted = timeline.to_vec();
    sorted.sort_unstable();
    let gaps = sorted.windows(2).filter(|pair| pair[1] > since).map(|pair| (pair[1] - pair[0], pair[1]));
    gaps.max().expect("completions after the kill")
}

#[test]
fn rsm_18_control_alone_killed_neither_fails_nor_delays_a_data_request() {
    let _alone = alone();
    for kind in transports() {
        let mut server = Deployment::start();
        let mut load = data_load(&server, kind);
        // From here on the file lives only as long as the open does: were it closed, no byte would come back.
        std::fs::remove_file(server.volume().join(load.plan.file())).unwrap();
        load.ledger().phase();
        load.goes_on(500);
        let calm = load.ledger().phase();
        let before = server.control_pid;
        // Who would start control again stands still: all of this is completed while there is surely none.
        server.freeze_serve();
        server.kill_control();
        load.goes_on(500);
        server.thaw_serve();
        server.await_planes();
        load.goes_on(200);
        let under = load.ledger().phase();
        assert_ne!(server.control_pid, before);
        println!(
            "{kind}: control killed: longest gap {:.1} ms (calm {:.1} ms), longest request {:.1} ms (calm {:.1} ms)",
            ms(under.gap),
            ms(calm.gap),
            ms(under.latency),
            ms(calm.latency),
        );
        load.wait("the open is resumed", |ledger| !ledger.fresh.is_empty());
        assert!(
            load.ledger()
                .fresh
                .iter()
                .filter(|(open, ..)| open == "load-1")
                .all(|(_, v, kept)| v == "Unchanged" && *kept),
            "{:?}",
            load.ledger().fresh
        );
        load.goes_on(200);
        assert!(load.ledger().notes.is_empty(), "{:?}", load.ledger().notes);
        // Reads everything back through the same open.
        load.stop();
        assert!(!server.volume().join(load.plan.file()).exists());
        server.until("nothing is left", |g| g["control.opens"] == 0 && g["dataplane.bindings"] == 0);
    }
}

#[test]
fn rsm_18_dataplane_alone_killed_keeps_opens_and_clients_bind_again() {
    let _alone = alone();
    for kind in transports() {
        let mut server = Deployment::start();
        let mut load = data_load(&server, kind);
        for round in 1..=3 {
            load.ledger().timeline = Some(Vec::new());
            load.goes_on(200);
            let killed = now();
            server.kill_dataplane();
            server.await_planes();
            load.goes_on(300);
            let (gap, resumed) = longest_gap(&load.ledger().timeline.take().unwrap(), killed);
            let back = ms(resumed.saturating_sub(killed));
            println!(
                "{kind}: dataplane killed: first request after {back:.1} ms (gap {:.1} ms), round {round}",
                ms(gap)
            );
            // A plane that dies young is started again later.
            std::thread::sleep(Duration::from_millis(1200));
        }
        assert!(load.ledger().fresh.is_empty(), "the opens were never detached: {:?}", load.ledger().fresh);
        load.stop();
        load.check_file(&server);
    }
}

#[test]
fn crs_13_both_planes_killed_and_the_load_goes_on_with_its_locks() {
    let _alone = alone();
    for kind in transports() {
        let mut server = Deployment::start();
        let mut load = Load::start(Plan::new(&server, kind, 1, 8));
        load.goes_on(500);
        for round in 1..=3 {
            load.ledger().timeline = Some(Vec::new());
            load.goes_on(200);
            let killed = now();
            server.kill_both();
            server.await_planes();
            load.goes_on(300);
            let (gap, resumed) = longest_gap(&load.ledger().timeline.take().unwrap(), killed);
            let back = ms(resumed.saturating_sub(killed));
            println!(
                "{kind}: both killed: first request after {back:.1} ms (gap {:.1} ms), round {round}",
                ms(gap)
            );
            load.wait("the open is resumed", |ledger| ledger.fresh.iter().any(|(open, ..)| open == "load-1"));
            for (open, verdict, locks_kept) in std::mem::take(&mut load.ledger().fresh) {
                assert!(
                    locks_kept && verdict == "Unchanged",
                    "{kind}: {open}: {verdict}, locks kept: {locks_kept}"
                );
            }
            std::thread::sleep(Duration::from_millis(1200));
        }
        load.stop();
        load.check_file(&server);
    }
}

/// Dies while bytes are on their way into the server's buffers: no block of the file is torn, and none that was
/// acknowledged is missing.
#[test]
fn crs_11_a_dataplane_killed_within_writes_tears_no_block() {
    let _alone = alone();
    for kind in transports() {
        let mut server = Deployment::start();
        let mut load = Load::start(Plan {
            lockers: 0,
            readers: 0,
            writers: 6,
            rest_us: 0,
            ..Plan::new(&server, kind, 1, 9)
        });
        for _ in 0..4 {
            load.goes_on(300);
            // The client can't make up for anything while it is stopped: what is seen is what the kill left.
            let dataplane = server.dataplane_pid;
            common::signal(dataplane, rustix::process::Signal::STOP);
            load.freeze();
            server.kill_dataplane();
            // A thread of it may be within a write until all of it is gone.
            common::until_gone(dataplane);
            load.check_file(&server);
            load.thaw();
            server.await_planes();
        }
        load.goes_on(300);
        load.stop();
        load.check_file(&server);
        server.until("nothing is left", |g| g["control.opens"] == 0 && g["control.bindings"] == 0);
    }
}
