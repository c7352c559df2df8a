//! The steady state allocates nothing. The client beside it allocates nothing either, so every allocation counted is
//! the server's.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)] // helpers of tests

mod common;

use common::{Client, Rig, pattern};
use holdfast_shared::auth::MacPolicy;
use holdfast_shared::types::{Access, Status};
use holdfast_shared::wire::data::Opcode;
use holdfast_transport::{Listener, tcp};
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};
use std::alloc::System;
use std::time::Duration;

#[global_allocator]
static HEAP: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

fn run(client: &mut Client, binding: u32, rounds: u32) {
    let small = client.descriptor().part(0, 4096).unwrap();
    let large = client.descriptor().part(0, 600_000).unwrap();
    for n in 0..rounds {
        let at = u64::from(n % 100) * 4096;
        let mut requests = [0; 10];
        for (k, request) in requests.iter_mut().enumerate() {
            *request = match k {
                0..=4 => client.send_io(Opcode::Read, binding, at, 4096, small),
                5 | 6 => client.send_io(Opcode::Write, binding, at, 4096, small),
                7 => client.send_inline(binding, at, 100, &[7; 100]),
                8 if n % 16 == 0 => client.send_io(Opcode::Read, binding, 0, 600_000, large),
                8 => client.send_io(Opcode::Read, binding, at, 0, small),
                _ => client.send_flush(binding),
            };
        }
        for request in requests {
            assert_eq!(client.answer(request).0, Status::Ok);
        }
    }
}

/// One test: the count is of the whole process.
#[test]
fn ten_thousand_requests_allocate_nothing() {
    let rig = Rig::new();
    for policy in [MacPolicy::Header, MacPolicy::None] {
        let open = rig.control.open(&pattern(1 << 20, 1), Access::ALL, policy);
        let mut client = rig.client();
        let binding = client.bind(&open).unwrap();
        measure("memory", &rig, &mut client, binding);

        let mut listener = tcp::TcpListener::bind(([127, 0, 0, 1], 0).into()).unwrap();
        let address = listener.address();
        let parts = Client::parts();
        let engine = std::sync::Arc::clone(&rig.engine);
        let accepting = std::thread::spawn(move || {
            engine.adopt(listener.accept(&mut |peer| engine.setup(peer)).unwrap())
        });
        let channel = tcp::connect(address, Duration::from_secs(5), parts.setup()).unwrap();
        accepting.join().unwrap();
        let mut client = Client::new(Box::new(channel), parts);
        client.hello();
        let binding = client.bind(&open).unwrap();
        measure("tcp", &rig, &mut client, binding);
    }
}

fn measure(name: &str, rig: &Rig, client: &mut Client, binding: u32) {
    run(client, binding, 100);
    let registrations = rig.gauge("registrations_total");
    // What happens once for a thread (a lock's first contention, say) is not the steady state: of a few windows of ten
    // thousand requests one must be clean. One allocation in ten thousand requests would fail every window.
    let mut changes = [(usize::MAX, 0); 5];
    for change in &mut changes {
        let before = rig.gauge("requests_read_total");
        let region = Region::new(HEAP);
        run(client, binding, 1000);
        let stats = region.change();
        *change = (stats.allocations, stats.reallocations);
        assert_eq!(rig.gauge("requests_read_total") - before, 6000);
        if *change == (0, 0) {
            break;
        }
    }
    assert!(changes.contains(&(0, 0)), "{name}: {changes:?}");
    assert_eq!(rig.gauge("registrations_total"), registrations);
}
