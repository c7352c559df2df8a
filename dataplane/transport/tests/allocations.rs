//! In the steady state no operation allocates. A program of its own, because the allocator is the process's.
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

use fabrics::{Local, Tcp, Verbs};
use holdfast_transport::{Armed, Channel, Completion, Kind, Operation, RemoteAccess};
use kit::*;
use stats_alloc::{INSTRUMENTED_SYSTEM, Region as Counted, StatsAlloc};
use std::alloc::System;
use std::time::Instant;

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

fn poll(channel: &mut dyn Channel, done: &mut Vec<Completion>) {
    let _ = channel.poll(done);
    // What a sleeper does must not allocate either.
    let _: Armed = channel.arm();
}

/// The server places, fetches and sends; the client takes the message and posts the receive again.
fn rounds<F: Fabric>(
    client: &mut End,
    server: &mut End,
    remote: holdfast_transport::RegionDescriptor,
    count: usize,
) {
    let (mut ours, mut theirs) = (Vec::with_capacity(64), Vec::with_capacity(64));
    for _ in 0..count {
        let begun = Instant::now();
        for (token, length) in [(1, 64 << 10), (2, 100)] {
            let part = remote.part(0, length).unwrap();
            server.submit(token, Operation::Place { buffer: server.pool.take().unwrap(), remote: part });
            server.submit(token, Operation::Fetch { buffer: server.pool.take().unwrap(), remote: part });
            server.submit(token, Operation::Send { buffer: server.pool.take().unwrap(), length: 100 });
        }
        let (mut received, mut finished) = (0, 0);
        while received < 2 || finished < 6 {
            assert!(begun.elapsed() < PATIENCE, "{}: nothing moves", F::NAME);
            poll(&mut *server.channel, &mut ours);
            for completion in ours.drain(..) {
                completion.outcome.unwrap();
                finished += 1;
            }
            poll(&mut *client.channel, &mut theirs);
            for completion in theirs.drain(..) {
                if completion.kind == Kind::Recv {
                    received += 1;
                    client.submit(completion.token, Operation::Recv { buffer: completion.buffer });
                }
            }
            std::thread::yield_now();
        }
    }
}

fn steady<F: Fabric>() {
    let (mut client, mut server) = ends::<F>(Sizes::default(), 8);
    let registration = client.register(64 << 10, RemoteAccess::FetchAndPlace);
    let remote = registration.descriptor();
    rounds::<F>(&mut client, &mut server, remote, 50);
    let counted = Counted::new(ALLOCATOR);
    rounds::<F>(&mut client, &mut server, remote, 300);
    let change = counted.change();
    // The test's own two lists are allocated anew.
    assert!(change.allocations <= 2, "{}: {change:?}", F::NAME);
    assert_eq!(change.reallocations, 0, "{}: {change:?}", F::NAME);
}

#[test]
fn no_operation_allocates() {
    steady::<Tcp>();
    steady::<Local>();
    if <Verbs as Fabric>::is_available() {
        steady::<Verbs>();
    }
}
