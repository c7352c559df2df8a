//! What channels over verbs, and local ones, leave behind: nothing. A program of its own, because the gauges are the process's.
#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_possible_wrap
)]
// The suite's helpers, of which this uses a part.
#![allow(dead_code)]

#[path = "conformance/fabrics.rs"]
mod fabrics;
#[path = "conformance/kit.rs"]
mod kit;

use fabrics::{Local, Verbs};
use holdfast_transport::{Kind, RemoteAccess};
use kit::*;

/// One connection through its life, and one more way to end it.
fn live_once<F: Fabric>(ending: usize) {
    let (mut client, mut server) = ends::<F>(Sizes::default(), 4);
    let registration = client.register(32 << 10, RemoteAccess::FetchAndPlace);
    server.place(1, &pattern(1, 32 << 10), registration.descriptor());
    server.send(2, b"placed");
    drive(&mut [&mut client, &mut server], |ends| ends[0].count(Kind::Recv) == 1);
    for token in 0..4 {
        server.fetch(token, registration.descriptor());
    }
    server.pump();
    match ending {
        0 => {}
        1 => client.channel.close(),
        2 => server.channel.close(),
        _ => {
            let gone = registration.descriptor();
            drop(registration);
            server.fetch(9, gone);
            drive(&mut [&mut client, &mut server], |ends| ends.iter().all(|end| end.has_ended()));
        }
    }
}

fn totals(gauges: holdfast_verbs::Gauges) -> holdfast_verbs::Gauges {
    holdfast_verbs::Gauges { registrations_total: 0, ..gauges }
}

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// One after the other: both count what the process has.
#[test]
fn connections_leave_nothing_behind() {
    live_once::<Local>(0);
    let before = (totals(holdfast_verbs::gauges()), descriptors());
    for round in 0..40 {
        live_once::<Local>(round % 4);
    }
    assert_eq!((totals(holdfast_verbs::gauges()), descriptors()), before, "local");

    if !<Verbs as Fabric>::is_available() {
        return;
    }
    live_once::<Verbs>(0);
    let before = holdfast_verbs::gauges();
    for round in 0..12 {
        live_once::<Verbs>(round % 4);
    }
    let after = holdfast_verbs::gauges();
    assert_eq!(totals(after), totals(before));
    assert_eq!((after.queue_pairs, after.outstanding_work_requests, after.cm_ids), (0, 0, 0));
    assert_eq!((after.memory_registrations, after.pinned_bytes, after.protection_domains), (0, 0, 0));
}
