//! Rules for what an open's I/O may touch: refused where they say, and confirmed when what began before has ended.

use crate::common::{Client, Gate, Open, Rig, Told, eventually, gated, pattern};
use holdfast_shared::auth::MacPolicy;
use holdfast_shared::types::{Access, ByteRange, IoRule, OpenId, Status};
use holdfast_shared::wire::data::Opcode;
use holdfast_shared::wire::link::{Fence, Restrict, Restricted};
use holdfast_transport::{Kind, tcp};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

fn deny(offset: u64, length: u64, deny: Access) -> IoRule {
    IoRule { range: ByteRange::new(offset, length).unwrap(), deny }
}

fn everything(offset: u64, length: u64) -> Vec<IoRule> {
    vec![deny(offset, length, Access::READ | Access::WRITE)]
}

fn restrict(rig: &Rig, open: OpenId, version: u64, rules: Vec<IoRule>) -> Told {
    rig.engine.restrict(Restrict { open, version, rules });
    Told::Restricted(Restricted { open, version })
}

/// With all rules in force.
fn restricted(rig: &Rig, open: OpenId, version: u64, rules: Vec<IoRule>) {
    let told = restrict(rig, open, version, rules);
    eventually("restricted", || rig.control.told().contains(&told));
}

fn all_ways(client: &mut Client, binding: u32, at: u64, length: usize) -> [Status; 3] {
    let data = pattern(length, at);
    [
        client.read(binding, at, length as u32).0,
        client.write_inline(binding, at, &data).0,
        client.write(binding, at, &data).0,
    ]
}

#[test]
fn lck_01_io_in_a_denied_range_is_refused_and_elsewhere_it_is_not() {
    let rig = Rig::new();
    let content = pattern(1000, 1);
    let (mut client, binding, open) = rig.bound(&content);
    let second = client.bind(&open).unwrap();
    let (mut other, others, _) = rig.bound(&content);
    let rules = vec![
        deny(100, 100, Access::READ | Access::WRITE),
        deny(200, 100, Access::WRITE),
        deny(400, 1, Access::READ),
    ];
    restricted(&rig, open.id, 7, rules);
    let (ok, no) = (Status::Ok, Status::LockConflict);
    for binding in [binding, second] {
        for (at, length, wanted) in [
            (100, 100, [no, no, no]),
            (0, 101, [no, no, no]),
            (199, 1, [no, no, no]),
            (50, 300, [no, no, no]),
            (200, 100, [ok, no, no]),
            (399, 3, [no, ok, ok]),
            (0, 100, [ok, ok, ok]),
            (300, 100, [ok, ok, ok]),
            (401, 500, [ok, ok, ok]),
        ] {
            assert_eq!(all_ways(&mut client, binding, at, length), wanted, "{length} bytes at {at}");
        }
    }
    assert!(open.content()[100..300] == content[100..300], "a refused write changed something");
    assert_eq!(all_ways(&mut other, others, 100, 100), [ok, ok, ok], "another open");
    assert_eq!(rig.gauge("lock_conflicts_total"), 2 * (4 * 3 + 2 + 1));
    assert_eq!(client.flush(binding), ok);
    restricted(&rig, open.id, 8, vec![]);
    assert_eq!(all_ways(&mut client, binding, 100, 300), [ok, ok, ok], "looser again");
}

#[test]
fn lck_04_a_zero_byte_request_passes_in_a_denied_range() {
    let rig = Rig::new();
    let (mut client, binding, open) = rig.bound(&pattern(100, 1));
    restricted(&rig, open.id, 1, everything(0, 100));
    for at in [0, 10, 99, 100] {
        let read = client.send_io(Opcode::Read, binding, at, 0, client.descriptor());
        assert_eq!(client.answer(read), (Status::Ok, 0));
        let write = client.send_io(Opcode::Write, binding, at, 0, client.descriptor());
        assert_eq!(client.answer(write), (Status::Ok, 0));
    }
    assert_eq!(client.read(binding, 10, 1).0, Status::LockConflict);
}

#[test]
fn an_open_without_bindings_is_confirmed_at_once() {
    let rig = Rig::new();
    let (mut client, binding, open) = rig.bound(b"abc");
    let unknown = OpenId([0xEE; 16]);
    assert_eq!(rig.control.told().len(), 0);
    let told = restrict(&rig, unknown, 3, everything(0, 10));
    assert_eq!(rig.control.told(), [told], "nobody has to be asked");
    assert_eq!(client.read(binding, 0, 3).0, Status::Ok);
    // One that had a binding has none once it is gone.
    let unbind = client.send_unbind(binding);
    assert_eq!(client.answer(unbind).0, Status::Ok);
    eventually("released", || rig.control.told().len() == 2);
    let told = restrict(&rig, open.id, 4, vec![]);
    assert_eq!(rig.control.told().last(), Some(&told));
}

#[test]
fn lck_09_a_write_whose_fetch_is_held_back_delays_the_confirmation() {
    let rig = Rig::new();
    let (mut client, faults) = rig.client_and_faults();
    let open = rig.open(&pattern(100_000, 1));
    let binding = client.bind(&open).unwrap();
    faults.hold(Kind::Fetch);
    let data = pattern(50_000, 2);
    // Beside where reads put their bytes.
    client.region().copy_in(1000, &data).unwrap();
    let part = client.descriptor().part(1000, 50_000).unwrap();
    let write = client.send_io(Opcode::Write, binding, 10_000, 50_000, part);
    eventually("the fetch is under way", || {
        client.pump();
        faults.held() >= 1
    });
    let told = restrict(&rig, open.id, 1, everything(0, 100_000));
    eventually("the rules are in force", || rig.gauge("restricts_pending") == 1);
    // What comes now is refused, and holds up nothing; what began before goes on.
    assert_eq!(client.read(binding, 0, 10).0, Status::LockConflict);
    assert_eq!(client.write_inline(binding, 99_000, b"abc").0, Status::LockConflict);
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(rig.control.told(), [], "confirmed with a write under way");
    // A later restriction waits for it as well.
    let later = restrict(&rig, open.id, 2, vec![]);
    eventually("the looser rules are in force", || client.read(binding, 0, 10).0 == Status::Ok);
    assert_eq!(rig.control.told(), []);
    faults.release(Kind::Fetch);
    assert_eq!(client.answer(write), (Status::Ok, 50_000));
    eventually("both", || [told, later].iter().all(|told| rig.control.told().contains(told)));
    assert!(open.content()[10_000..60_000] == data[..]);
    assert_eq!(rig.gauge("restricts_pending"), 0);
    assert_eq!(client.read(binding, 0, 10).0, Status::Ok, "the later rules stand");
}

#[test]
fn lck_09_a_peer_that_holds_up_a_restriction_is_cut_off() {
    let rig = Rig::with(|s| s.limits.fence_ms = 200);
    let (mut client, faults) = rig.client_and_faults();
    let content = pattern(1000, 1);
    let open = rig.open(&content);
    let binding = client.bind(&open).unwrap();
    let (mut bystander, theirs) = (rig.client(), rig.open(b"abc"));
    let unharmed = bystander.bind(&theirs).unwrap();
    faults.hold(Kind::Fetch);
    client.send_io(Opcode::Write, binding, 0, 1000, client.descriptor());
    eventually("the fetch is under way", || {
        client.pump();
        faults.held() >= 1
    });
    let begun = Instant::now();
    let told = restrict(&rig, open.id, 1, everything(0, 1000));
    eventually("restricted", || rig.control.told().contains(&told));
    assert!(begun.elapsed() >= Duration::from_millis(200));
    faults.release(Kind::Fetch);
    while client.next().is_some() {}
    assert!(client.channel.ended().is_some(), "the channel is cut off");
    assert_eq!(open.content(), content, "bytes of the write landed after the confirmation");
    assert_eq!(bystander.read(unharmed, 0, 3).0, Status::Ok);
}

#[test]
fn a_slow_peer_that_makes_progress_is_not_cut_off() {
    const PIECES: u32 = 12;
    let rig = Rig::with(|s| {
        s.limits.fence_ms = 2000;
        s.engine.fetches = 1;
        s.engine.buffer_bytes = 4096;
    });
    let (mut client, faults) = rig.client_and_faults();
    let open = rig.open(b"");
    let binding = client.bind(&open).unwrap();
    faults.hold(Kind::Fetch);
    let part = client.descriptor().part(0, PIECES * 4096).unwrap();
    let write = client.send_io(Opcode::Write, binding, 0, PIECES * 4096, part);
    let mut told = None;
    // Each piece takes less than the limit, all of them together more.
    for _ in 0..PIECES {
        eventually("a fetch is under way", || {
            client.pump();
            faults.held() >= 1
        });
        told.get_or_insert_with(|| restrict(&rig, open.id, 1, vec![]));
        std::thread::sleep(Duration::from_millis(250));
        faults.step(Kind::Fetch);
    }
    assert_eq!(client.answer(write), (Status::Ok, PIECES * 4096));
    eventually("restricted", || rig.control.told() == [told.unwrap()]);
}

#[test]
fn a_restriction_waits_for_storage_and_cuts_nobody_off() {
    let (rig, gate) = gated();
    let (mut client, binding, open) = rig.bound(b"old content");
    gate.set(true);
    let write = client.send_inline(binding, 0, 3, b"new");
    eventually("the write is with storage", || gate.waiting.load(Ordering::SeqCst) == 1);
    let told = restrict(&rig, open.id, 1, everything(0, 100));
    eventually("pending", || rig.gauge("restricts_pending") == 1);
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(rig.control.told(), []);
    gate.set(false);
    assert_eq!(client.answer(write), (Status::Ok, 3), "it began before");
    eventually("restricted", || rig.control.told() == [told]);
    assert_eq!(open.content(), b"new content");
}

#[test]
fn a_client_that_goes_ends_the_wait() {
    let (rig, gate) = gated();
    let (mut client, binding, open) = rig.bound(b"old content");
    gate.set(true);
    client.send_inline(binding, 0, 3, b"new");
    eventually("the write is with storage", || gate.waiting.load(Ordering::SeqCst) == 1);
    let told = restrict(&rig, open.id, 1, everything(0, 100));
    eventually("pending", || rig.gauge("restricts_pending") == 1);
    drop(client);
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(rig.control.told(), [], "its write is still with storage");
    gate.set(false);
    eventually("restricted", || rig.control.told().contains(&told));
    rig.wait_gauge("restricts_pending", 0);
    rig.wait_gauge("channels", 0);
}

#[test]
fn every_channel_and_worker_is_asked() {
    let gate = std::sync::Arc::new(Gate::default());
    let rig = Rig::with_files(|s| s.engine.workers = 3, gate.opener());
    let open = rig.open(&pattern(1000, 1));
    let mut clients: Vec<(Client, u32)> = (0..6)
        .map(|_| {
            let mut client = rig.client();
            let binding = client.bind(&open).unwrap();
            (client, binding)
        })
        .collect();
    gate.set(true);
    let (last, number) = clients.last_mut().unwrap();
    let write = last.send_inline(*number, 0, 3, b"new");
    eventually("the write is with storage", || gate.waiting.load(Ordering::SeqCst) == 1);
    let told = restrict(&rig, open.id, 1, everything(0, 1000));
    eventually("pending", || rig.gauge("restricts_pending") == 1);
    for (client, binding) in &mut clients {
        assert_eq!(client.write_inline(*binding, 5, b"x").0, Status::LockConflict);
    }
    assert_eq!(rig.control.told(), []);
    gate.set(false);
    assert_eq!(clients.last_mut().unwrap().0.answer(write).0, Status::Ok);
    eventually("restricted", || rig.control.told() == [told]);
}

/// A bind whose grant control has made and not yet told.
fn bind_in_between(rig: &Rig, client: &mut Client, open: &Open, between: impl FnOnce()) -> u32 {
    rig.control.keeping.store(true, Ordering::SeqCst);
    std::thread::scope(|scope| {
        let bind = scope.spawn(|| client.bind(open).unwrap());
        let mut kept = Vec::new();
        eventually("the grant is made", || {
            kept.extend(rig.control.kept());
            !kept.is_empty()
        });
        between();
        kept.into_iter().for_each(|redemption| rig.engine.redeemed(redemption));
        rig.control.keeping.store(false, Ordering::SeqCst);
        bind.join().unwrap()
    })
}

#[test]
fn a_bind_that_races_with_a_restriction_gets_the_newer_rules() {
    let rig = Rig::new();
    let (mut client, first, open) = rig.bound(&pattern(100, 1));
    let no = Status::LockConflict;
    // The grant says version 1, and a newer Restrict comes before it.
    *rig.control.rules.lock().unwrap() = (1, vec![]);
    let late = bind_in_between(&rig, &mut client, &open, || restricted(&rig, open.id, 2, everything(0, 50)));
    assert_eq!(client.read(late, 0, 10).0, no, "the grant's older rules were installed");
    assert_eq!(client.read(first, 0, 10).0, no);
    // The grant says the newer ones.
    *rig.control.rules.lock().unwrap() = (9, everything(50, 50));
    let late = bind_in_between(&rig, &mut client, &open, || restricted(&rig, open.id, 8, vec![]));
    assert_eq!(client.read(late, 50, 10).0, no);
    assert_eq!(client.read(late, 0, 10).0, Status::Ok);
    assert_eq!(client.read(first, 50, 10).0, Status::Ok, "version 8, until it is told the next");
    // An older Restrict is answered and changes nothing.
    restricted(&rig, open.id, 3, vec![]);
    assert_eq!(client.read(late, 50, 10).0, no);
    // Another control may count anew.
    let mut snapshot = rig.engine.snapshot();
    assert!(snapshot.gather(Duration::from_secs(5)));
    assert_eq!(snapshot.into_bindings().len(), 3);
    restricted(&rig, open.id, 1, vec![]);
    assert_eq!(client.read(late, 50, 10).0, Status::Ok);
}

#[test]
fn a_snapshot_has_the_bindings_whose_grants_were_just_left() {
    let rig = Rig::new();
    let (mut client, _first, open) = rig.bound(b"abc");
    let mut gathered = Vec::new();
    rig.control.keeping.store(true, Ordering::SeqCst);
    std::thread::scope(|scope| {
        let bind = scope.spawn(|| client.bind(&open).unwrap());
        let mut kept = Vec::new();
        eventually("the grant is made", || {
            kept.extend(rig.control.kept());
            !kept.is_empty()
        });
        kept.into_iter().for_each(|redemption| rig.engine.redeemed(redemption));
        let mut snapshot = rig.engine.snapshot();
        assert!(snapshot.gather(Duration::from_secs(5)));
        gathered = snapshot.into_bindings();
        bind.join().unwrap()
    });
    assert_eq!(gathered.len(), 2);
    assert!(gathered.iter().any(|binding| binding.held.binding == rig.control.last()));
}

#[test]
fn a_snapshot_ends_restrictions_that_nobody_waits_for() {
    let (rig, gate) = gated();
    let (mut client, binding, open) = rig.bound(b"old content");
    gate.set(true);
    let write = client.send_inline(binding, 0, 3, b"new");
    eventually("the write is with storage", || gate.waiting.load(Ordering::SeqCst) == 1);
    restrict(&rig, open.id, 1, everything(4, 100));
    eventually("pending", || rig.gauge("restricts_pending") == 1);
    let mut snapshot = rig.engine.snapshot();
    assert!(snapshot.gather(Duration::from_secs(5)));
    assert_eq!(rig.gauge("restricts_pending"), 0);
    let gathered = snapshot.into_bindings();
    assert_eq!(gathered[0].held.rules_version, 1, "in force, though never confirmed");
    gate.set(false);
    assert_eq!(client.answer(write).0, Status::Ok);
    assert_eq!(client.read(binding, 4, 1).0, Status::LockConflict);
    assert_eq!(rig.control.told(), [], "confirmed to a control that never asked");
}

#[test]
fn a_fence_and_a_restriction_of_the_same_write_are_both_confirmed() {
    let rig = Rig::new();
    let (mut client, faults) = rig.client_and_faults();
    let open = rig.open(b"content");
    let binding = client.bind(&open).unwrap();
    faults.hold(Kind::Fetch);
    let write = client.send_io(Opcode::Write, binding, 0, 7, client.descriptor());
    eventually("the fetch is under way", || {
        client.pump();
        faults.held() >= 1
    });
    let told = restrict(&rig, open.id, 1, vec![]);
    let fence = Fence { binding: rig.control.last(), epoch: 5, reason: Status::Fenced };
    rig.engine.fence(fence);
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(rig.control.told(), []);
    faults.release(Kind::Fetch);
    assert_eq!(client.answer(write), (Status::Fenced, 0));
    eventually("both", || {
        let all = rig.control.told();
        all.len() == 2 && all.contains(&told) && all.contains(&Told::Fenced(fence))
    });
    assert_eq!(open.content(), b"content");
}

#[test]
fn over_tcp_a_peer_that_takes_nothing_holds_up_no_restriction_for_long() {
    let rig = Rig::with(|s| s.limits.fence_ms = 200);
    let open = rig.open(&pattern(4 << 20, 1));
    let mut listener = tcp::TcpListener::bind(([127, 0, 0, 1], 0).into()).unwrap();
    let address = holdfast_transport::Listener::address(&listener);
    let parts = Client::parts();
    let engine = std::sync::Arc::clone(&rig.engine);
    let accepting = std::thread::spawn(move || {
        engine.adopt(
            holdfast_transport::Listener::accept(&mut listener, &mut |peer| engine.setup(peer)).unwrap(),
        )
    });
    let channel = tcp::connect(address, Duration::from_secs(5), parts.setup()).unwrap();
    accepting.join().unwrap();
    let mut client = Client::new(Box::new(channel), parts);
    client.hello();
    let binding = client.bind(&open).unwrap();
    // Reads whose bytes are not taken: some of them can't even begin.
    for _ in 0..32 {
        client.send_io(Opcode::Read, binding, 0, 4 << 20, client.descriptor());
    }
    std::thread::sleep(Duration::from_millis(100));
    let begun = Instant::now();
    restricted(&rig, open.id, 1, everything(0, 100));
    let took = begun.elapsed();
    assert!(took >= Duration::from_millis(150), "{took:?}");
}

#[test]
fn the_time_of_the_last_write_moves_only_with_writes() {
    let rig = Rig::new();
    // In memory: written at once, by the worker; the next test is about storage threads.
    let memory = rustix::fs::memfd_create("last-write", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let open = rig.control.open_file(memory.into(), Access::ALL, MacPolicy::Header);
    let mut client = rig.client();
    let binding = client.bind(&open).unwrap();
    let time = || {
        let mut snapshot = rig.engine.snapshot();
        assert!(snapshot.gather(Duration::from_secs(5)));
        let [only] = &snapshot.into_bindings()[..] else { panic!("one binding") };
        only.held.last_write_ns
    };
    assert_eq!(time(), 0);
    client.read(binding, 0, 100);
    client.flush(binding);
    let none = client.send_io(Opcode::Write, binding, 0, 0, client.descriptor());
    assert_eq!(client.answer(none).0, Status::Ok);
    assert_eq!(time(), 0);
    client.write_inline(binding, 0, b"abc");
    let first = time();
    assert!(first >= open.changed_ns(), "the file says it was changed after the write");
    client.read(binding, 0, 100);
    client.flush(binding);
    restricted(&rig, open.id, 1, everything(0, 10));
    assert_eq!(client.write_inline(binding, 0, b"abc").0, Status::LockConflict);
    assert_eq!(time(), first, "moved without a write");
    client.write(binding, 20, &[1; 50]);
    assert!(time() > first && time() >= open.changed_ns());
}

#[test]
fn storage_threads_note_the_time_of_their_writes() {
    let (rig, gate) = gated();
    let (mut client, binding, open) = rig.bound(b"");
    gate.set(true);
    let write = client.send_inline(binding, 0, 3, b"abc");
    eventually("the write is with storage", || gate.waiting.load(Ordering::SeqCst) == 1);
    std::thread::sleep(Duration::from_millis(50));
    gate.set(false);
    assert_eq!(client.answer(write).0, Status::Ok);
    let mut snapshot = rig.engine.snapshot();
    assert!(snapshot.gather(Duration::from_secs(5)));
    assert!(snapshot.into_bindings()[0].held.last_write_ns >= open.changed_ns());
}
