//! Peers that break the rules: the documented status, the channel's end where it must be, and a server unharmed.

use crate::common::{Client, Msg, Rig, eventually, pattern};
use holdfast_shared::auth::MacPolicy;
use holdfast_shared::types::{Access, RegionDescriptor, Status};
use holdfast_shared::wire::data::{Flush, Header, Opcode, Writer};
use holdfast_transport::Kind;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// Another client is served as before, and nothing is left behind.
fn unharmed(rig: &Rig) {
    let (mut client, binding, _open) = rig.bound(b"unharmed");
    assert_eq!(client.read(binding, 0, 100), (Status::Ok, b"unharmed".to_vec()));
    drop(client);
    rig.wait_gauge("channels", 0);
    rig.wait_gauge("half_open_channels", 0);
    rig.wait_gauge("requests_in_flight", 0);
    rig.wait_gauge("buffers_free", rig.gauge("buffers_total"));
    rig.wait_gauge("message_buffers_free", rig.gauge("message_buffers_total"));
    eventually("every binding is released", || rig.control.all_released());
}

/// A flush frame, changed before it is sent.
fn flush_frame(client: &mut Client, sequence: u64, change: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = [0; 128];
    let mut w = Writer::new(&mut bytes, Opcode::Flush, 0, 0, 99, sequence).unwrap();
    w.body(&Flush { reserved: 0.into() }).unwrap();
    let length = w.finish(|_, _| {});
    let mut bytes = bytes[..length].to_vec();
    change(&mut bytes);
    client.send_bytes(&bytes);
}

#[test]
fn requests_before_bind_are_not_bound_and_bounded() {
    let rig = Rig::new();
    let mut client = rig.client();
    let nowhere = RegionDescriptor::NONE;
    for binding in [0, 0x101, u32::MAX] {
        let request = client.send_io(Opcode::Read, binding, 0, 10, nowhere);
        assert_eq!(client.answer(request), (Status::NotBound, 0), "binding {binding:#x}");
    }
    client.expect_end(Status::TooMany);
    unharmed(&rig);
}

#[test]
fn requests_to_an_unknown_binding_do_not_end_a_bound_channel() {
    let rig = Rig::new();
    let (mut client, binding, _open) = rig.bound(b"abc");
    for _ in 0..10 {
        let request = client.send_io(Opcode::Write, binding + 1, 0, 3, client.descriptor());
        assert_eq!(client.answer(request), (Status::NotBound, 0));
    }
    assert_eq!(client.read(binding, 0, 3), (Status::Ok, b"abc".to_vec()));
}

#[test]
fn a_binding_is_of_one_channel_only() {
    let rig = Rig::new();
    let (_owner, binding, _open) = rig.bound(b"secret");
    let mut other = rig.client();
    let request = other.send_io(Opcode::Read, binding, 0, 6, other.descriptor());
    assert_eq!(other.answer(request), (Status::NotBound, 0));
}

#[test]
fn more_than_the_credits_ends_the_channel() {
    let rig = Rig::new();
    let (mut client, faults) = rig.client_and_faults();
    let open = rig.open(&pattern(1 << 20, 1));
    let binding = client.bind(&open).unwrap();
    // Fetches that never come keep the requests in flight.
    faults.hold(Kind::Fetch);
    for n in 0..65 {
        client.send_io(Opcode::Write, binding, n * 10, 10, client.descriptor());
    }
    client.expect_end(Status::OverCredit);
    assert_eq!(open.content(), pattern(1 << 20, 1));
    drop(client);
    unharmed(&rig);
}

#[test]
fn more_than_the_first_credits_ends_the_channel() {
    let rig = Rig::new();
    rig.control.silent.store(true, Ordering::SeqCst);
    let mut client = rig.client();
    let open = rig.open(b"");
    assert_eq!(client.credits, 2);
    client.send_bind(&open, open.access, open.policy, |_| {});
    client.send_bind(&open, open.access, open.policy, |_| {});
    client.expect_end(Status::Protocol);
    rig.control.silent.store(false, Ordering::SeqCst);
    unharmed(&rig);
}

#[test]
fn a_wrong_mac_ends_the_channel() {
    let rig = Rig::new();
    for policy in [MacPolicy::None, MacPolicy::Header, MacPolicy::Payload, MacPolicy::Sealed] {
        let mut client = rig.client();
        let open = rig.control.open(b"abc", Access::ALL, policy);
        let binding = client.bind(&open).unwrap();
        let mut bytes = [0; 128];
        let mut w = Writer::new(&mut bytes, Opcode::Flush, 0, binding, 9, client.sequence).unwrap();
        w.body(&Flush { reserved: 0.into() }).unwrap();
        let length = w.finish(|_, mac| *mac = [1; 16]);
        client.send_bytes(&bytes[..length]);
        client.expect_end(Status::BadMac);
    }
    let mut client = rig.client();
    flush_frame(&mut client, 0, |bytes| bytes[Header::SIZE + 8] = 1);
    client.expect_end(Status::BadMac);
    unharmed(&rig);
}

#[test]
fn a_gap_a_repeat_and_a_step_back_end_the_channel() {
    let rig = Rig::new();
    for off in [1u64, 5, u64::MAX, u64::MAX - 1] {
        let (mut client, binding, _open) = rig.bound(b"abc");
        assert_eq!(client.read(binding, 0, 3).0, Status::Ok);
        client.sequence = client.sequence.wrapping_add(off);
        client.send_flush(binding);
        client.expect_end(Status::BadMac);
    }
    unharmed(&rig);
}

#[test]
fn malformed_frames_end_the_channel() {
    let rig = Rig::new();
    type Change = fn(&mut Vec<u8>);
    let cases: [(&str, Status, Change); 11] = [
        ("version", Status::Version, |b| b[0] = 9),
        ("unknown opcode", Status::Protocol, |b| b[1] = 0x7f),
        ("server's opcode", Status::Protocol, |b| {
            b[1] = 0x83;
        }),
        ("unknown flags", Status::Protocol, |b| b[3] = 0x80),
        ("length too long", Status::Protocol, |b| b[4] += 1),
        ("length too short", Status::Protocol, |b| b[4] -= 1),
        ("length huge", Status::Protocol, |b| b[4..8].fill(0xff)),
        ("reserved", Status::Protocol, |b| b[Header::SIZE] = 1),
        ("cut in the header", Status::Protocol, |b| b.truncate(10)),
        ("cut in the MAC", Status::Protocol, |b| b.truncate(Header::SIZE + 8 + 15)),
        ("trailing bytes", Status::Protocol, |b| b.push(0)),
    ];
    for (name, status, change) in cases {
        let mut client = rig.client();
        flush_frame(&mut client, 0, change);
        println!("{name}");
        client.expect_end(status);
        // The same behind a binding.
        let (mut client, _binding, _open) = rig.bound(b"abc");
        let sequence = client.sequence;
        flush_frame(&mut client, sequence, change);
        client.expect_end(status);
    }
    let mut client = rig.client();
    client.send_bytes(&[]);
    client.expect_end(Status::Protocol);
    unharmed(&rig);
}

#[test]
fn binds_that_prove_nothing_are_all_alike_and_bounded() {
    let rig = Rig::new();
    let open = rig.open(b"abc");
    let mut client = rig.client();
    let nonces = [client.nonce];
    assert_eq!(client.bind_as(&open, open.access, open.policy, |b| b.proof[0] ^= 1), Err(Status::BadKey));
    assert_ne!(client.nonce, nonces[0], "an attempt uses its nonce up");
    let mut strange = open.clone();
    strange.key = b"another server's key".to_vec();
    assert_eq!(client.bind(&strange), Err(Status::BadKey));
    assert_eq!(
        client.bind_as(&open, open.access, MacPolicy::None, |_| {}),
        Err(Status::BadKey),
        "a lower policy"
    );
    client.expect_end(Status::TooMany);

    let mut client = rig.client();
    let old = client.nonce;
    assert_eq!(client.bind_as(&open, open.access, open.policy, |b| b.access = 0x80), Err(Status::Invalid));
    let fresh = std::mem::replace(&mut client.nonce, old);
    assert_eq!(client.bind(&open), Err(Status::BadKey), "a proof over a used nonce");
    assert_ne!(fresh, client.nonce);
    assert!(client.bind(&open).is_ok(), "the third attempt is right");
    drop(client);
    unharmed(&rig);
}

#[test]
fn a_proof_for_another_channel_is_worth_nothing() {
    let rig = Rig::new();
    let open = rig.open(b"abc");
    let (mut a, mut b) = (rig.client(), rig.client());
    b.nonce = a.nonce;
    assert_eq!(b.bind(&open), Err(Status::BadKey));
    assert!(a.bind(&open).is_ok());
}

#[test]
fn control_away_refuses_binds_and_lets_bindings_be() {
    let rig = Rig::new();
    let (mut client, binding, open) = rig.bound(b"abc");
    rig.control.away.store(true, Ordering::SeqCst);
    for _ in 0..5 {
        assert_eq!(client.bind(&open), Err(Status::Unavailable));
    }
    assert_eq!(client.read(binding, 0, 3), (Status::Ok, b"abc".to_vec()));
    rig.control.away.store(false, Ordering::SeqCst);
    assert!(client.bind(&open).is_ok());
}

#[test]
fn half_open_channels_are_bounded_and_timed_out() {
    let rig = Rig::with(|s| {
        s.limits.half_open_max = 3;
        s.limits.bind_deadline_ms = 1500;
    });
    let begun = Instant::now();
    let mut waiting: Vec<Client> = (0..4).map(|_| rig.client()).collect();
    let mut oldest = waiting.remove(0);
    // Not at its deadline: that would be said.
    assert_eq!(oldest.next(), None, "it gave its place to the fourth");
    for client in &mut waiting {
        client.expect_end(Status::TimedOut);
    }
    assert!(begun.elapsed() >= Duration::from_millis(1500));
    drop(waiting);
    rig.wait_gauge("half_open_channels", 0);
    // One that was bound does not count, and stays.
    let (mut client, binding, _open) = rig.bound(b"abc");
    std::thread::sleep(Duration::from_millis(1700));
    assert_eq!(client.read(binding, 0, 3), (Status::Ok, b"abc".to_vec()));
    drop(client);
    unharmed(&rig);
}

#[test]
fn a_peer_that_takes_nothing_is_dropped() {
    let rig = Rig::with(|s| s.limits.stuck_ms = 200);
    let (mut client, faults) = rig.client_and_faults();
    let binding = client.bind(&rig.open(&pattern(10_000, 2))).unwrap();
    faults.hold(Kind::Place);
    client.send_io(Opcode::Read, binding, 0, 10_000, client.descriptor());
    while client.next().is_some() {}
    assert!(client.channel.ended().is_some());
    drop(client);
    unharmed(&rig);
}

#[test]
fn a_region_the_peer_never_registered_ends_its_channel_only() {
    let rig = Rig::new();
    for opcode in [Opcode::Read, Opcode::Write] {
        let (mut client, binding, open) = rig.bound(b"abc");
        let real = client.descriptor();
        let forged = RegionDescriptor::new(real.address(), real.rkey() ^ 0x55, real.length());
        client.send_io(opcode, binding, 0, 3, forged);
        while let Some(msg) = client.next() {
            assert!(!matches!(msg, Msg::Reply { status: Status::Ok, .. }), "{msg:?}");
        }
        assert!(client.channel.ended().is_some());
        assert_eq!(open.content(), b"abc");
        drop(client);
        let (mut client, binding, open) = rig.bound(b"abc");
        let outside = RegionDescriptor::new(real.address() + u64::from(real.length()), real.rkey(), 3);
        client.send_io(opcode, binding, 0, 3, outside);
        while client.next().is_some() {}
        assert_eq!(open.content(), b"abc");
    }
    unharmed(&rig);
}

#[test]
fn too_many_bindings_are_refused() {
    let rig = Rig::with(|s| s.limits.bindings_max = 3);
    let open = rig.open(b"abc");
    let mut client = rig.client();
    let bindings: Vec<u32> = (0..3).map(|_| client.bind(&open).unwrap()).collect();
    assert_eq!(client.bind(&open), Err(Status::TooMany));
    let request = client.send_unbind(bindings[1]);
    assert_eq!(client.answer(request).0, Status::Ok);
    let again = client.bind(&open).unwrap();
    for binding in [bindings[0], again, bindings[2]] {
        assert_eq!(client.read(binding, 0, 3).0, Status::Ok);
    }
    drop(client);
    unharmed(&rig);
}
