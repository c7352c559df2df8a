//! The engine over the memory transport: what a well-behaved client gets.

use crate::common::{Msg, Rig, Told, eventually, pattern};
use holdfast_shared::auth::MacPolicy;
use holdfast_shared::types::{Access, RegionDescriptor, Status};
use holdfast_shared::wire::data::Opcode;
use std::sync::atomic::{AtomicBool, Ordering};

#[test]
fn bytes_are_read_and_written() {
    let rig = Rig::new();
    let content = pattern(1 << 20, 1);
    let (mut client, binding, open) = rig.bound(&content);
    assert_eq!(client.credits, 64);
    assert_eq!(client.read(binding, 0, 1 << 20), (Status::Ok, content.clone()));
    assert_eq!(client.read(binding, 4097, 4096), (Status::Ok, content[4097..4097 + 4096].to_vec()));
    let new = pattern(700_000, 2);
    assert_eq!(client.write(binding, 123_457, &new), (Status::Ok, 700_000));
    assert_eq!(open.content()[123_457..823_457], new[..]);
    assert_eq!(client.write_inline(binding, 5, b"inline"), (Status::Ok, 6));
    assert_eq!(open.content()[..12], [&content[..5], b"inline", &content[11..12]].concat()[..]);
    assert_eq!(client.flush(binding), Status::Ok);
    assert_eq!(rig.gauge("bytes_written_total"), 700_006);
}

#[test]
fn all_policies_carry_reads_and_writes() {
    let rig = Rig::new();
    for policy in [MacPolicy::None, MacPolicy::Header, MacPolicy::Payload, MacPolicy::Sealed] {
        let content = pattern(300_000, 3);
        let open = rig.control.open(&content, Access::ALL, policy);
        let mut client = rig.client();
        let binding = client.bind(&open).unwrap();
        assert_eq!(
            client.read(binding, 10, 200_000),
            (Status::Ok, content[10..200_010].to_vec()),
            "{policy:?}"
        );
        let new = pattern(200_000, 4);
        assert_eq!(client.write(binding, 1000, &new), (Status::Ok, 200_000), "{policy:?}");
        assert_eq!(client.write_inline(binding, 0, b"small"), (Status::Ok, 5), "{policy:?}");
        assert_eq!(client.read(binding, 999, 200_001).1[1..], new[..], "{policy:?}");
        assert_eq!(open.content()[1000..201_000], new[..], "what is stored is plain");
        assert_eq!(client.flush(binding), Status::Ok);
        assert_eq!(client.read(binding, 299_990, 100), (Status::Ok, content[299_990..].to_vec()), "short");
        assert_eq!(client.read(binding, 300_000, 100), (Status::Ok, vec![]), "past the end");
        if policy.covers_payload() {
            let max = u32::try_from(256 << 10).unwrap();
            assert_eq!(client.hello.unwrap().sealed_transfer_max.get(), max);
            assert_eq!(client.read(binding, 0, max + 1).0, Status::TooLong);
            // A digest of other bytes: nothing is applied.
            let before = open.content();
            client.region().copy_in(0, b"other bytes").unwrap();
            let region = client.descriptor();
            let request = client.send_request(Opcode::Write, binding, 0, 11, region, &[], Some([9; 16]));
            assert_eq!(client.answer(request), (Status::Integrity, 0));
            let request = client.send_request(Opcode::Write, binding, 0, 11, region, &[], None);
            assert_eq!(client.answer(request), (Status::Integrity, 0), "no digest");
            assert_eq!(open.content(), before);
        }
    }
}

/// DPL-10: short reads, reads past the end, holes, and never a byte past the count.
#[test]
fn dpl_10_reads_at_the_end_of_the_file() {
    let rig = Rig::new();
    let content = pattern(10_000, 5);
    let (mut client, binding, open) = rig.bound(&content);
    client.region().copy_in(0, &[0xEE; 8192]).unwrap();
    assert_eq!(client.read(binding, 9_990, 4096), (Status::Ok, content[9_990..].to_vec()));
    let mut rest = vec![0; 8182];
    client.region().copy_out(10, &mut rest).unwrap();
    assert!(rest.iter().all(|byte| *byte == 0xEE), "bytes past the count were touched");
    assert_eq!(client.read(binding, 10_000, 4096), (Status::Ok, vec![]));
    assert_eq!(client.read(binding, (1 << 63) - 1 - 4096, 4096), (Status::Ok, vec![]));
    assert_eq!(client.read(binding, (1 << 63) - 1, 4096).0, Status::BadRange);
    // A hole, and a fresh block.
    open.file.set_len(1 << 20).unwrap();
    assert_eq!(client.read(binding, 500_000, 4096), (Status::Ok, vec![0; 4096]));
    assert_eq!(client.write_inline(binding, 600_000, &[1]), (Status::Ok, 1));
    let fresh = client.read(binding, 599_999, 4096).1;
    assert!(fresh.iter().enumerate().all(|(n, byte)| *byte == u8::from(n == 1)), "stale memory");
}

/// DPL-11: zero length, the longest, one more, unaligned.
#[test]
fn dpl_11_lengths() {
    let rig = Rig::with(|s| s.limits.transfer_bytes_max = 1 << 20);
    let content = pattern(2 << 20, 6);
    let (mut client, binding, open) = rig.bound(&content);
    let before = open.file.metadata().unwrap().modified().unwrap();
    let polls = rig.gauge("bytes_read_total");
    let nowhere = RegionDescriptor::NONE;
    for opcode in [Opcode::Read, Opcode::Write] {
        let request = client.send_io(opcode, binding, 77, 0, nowhere);
        assert_eq!(client.answer(request), (Status::Ok, 0));
    }
    assert_eq!(
        open.file.metadata().unwrap().modified().unwrap(),
        before,
        "a zero-length write changed the file"
    );
    assert_eq!(rig.gauge("bytes_read_total"), polls);
    let max = 1u32 << 20;
    assert_eq!(client.read(binding, 0, max), (Status::Ok, content[..1 << 20].to_vec()));
    assert_eq!(client.read(binding, 0, max + 1).0, Status::TooLong);
    let long = vec![1; (1 << 20) + 1];
    assert_eq!(client.write(binding, 0, &long), (Status::TooLong, 0));
    assert_eq!(client.write(binding, 0, &long[1..]), (Status::Ok, max));
    assert_eq!(client.read(binding, 1_234_567, 77_777).1, content[1_234_567..1_234_567 + 77_777]);
    assert_eq!(open.content()[1 << 20..], content[1 << 20..]);
}

/// DPL-08: fields at their edges are refused before anything moves.
#[test]
fn dpl_08_fields_at_their_edges() {
    let rig = Rig::with(|s| s.limits.transfer_bytes_max = 1 << 20);
    let content = pattern(100, 7);
    let (mut client, binding, open) = rig.bound(&content);
    let whole = client.descriptor();
    for length in [(1 << 20) + 1, 1 << 31, u32::MAX] {
        for opcode in [Opcode::Read, Opcode::Write] {
            let request = client.send_io(opcode, binding, 0, length, whole);
            assert_eq!(client.answer(request), (Status::TooLong, 0));
        }
    }
    for offset in [u64::MAX, 1 << 63, (1 << 63) - 1, u64::MAX - 9, (1 << 63) - 9] {
        for opcode in [Opcode::Read, Opcode::Write] {
            let request = client.send_io(opcode, binding, offset, 10, whole);
            assert_eq!(client.answer(request), (Status::BadRange, 0), "{offset}");
        }
    }
    for region in [
        RegionDescriptor::NONE,
        RegionDescriptor::new(whole.address(), whole.rkey(), 9),
        RegionDescriptor::new(u64::MAX - 5, whole.rkey(), 10),
    ] {
        for opcode in [Opcode::Read, Opcode::Write] {
            let request = client.send_io(opcode, binding, 0, 10, region);
            assert_eq!(client.answer(request), (Status::BadRegion, 0), "{region:?}");
        }
    }
    for length in [0, 1, 4, 6, 4096] {
        let request = client.send_inline(binding, 0, length, b"12345");
        assert_eq!(client.answer(request).0, Status::Invalid, "inline of 5 said to be {length}");
    }
    let request = client.send_request(Opcode::Read, binding, 0, 5, RegionDescriptor::NONE, b"12345", None);
    assert_eq!(client.answer(request).0, Status::Invalid, "a read with a payload");
    let request = client.send_request(Opcode::Write, binding, 0, 5, whole, b"12345", None);
    assert_eq!(client.answer(request).0, Status::Invalid, "a payload and a region");
    assert_eq!(open.content(), content, "nothing was applied");
    assert_eq!(client.read(binding, 0, 100), (Status::Ok, content), "the channel lives");
    rig.wait_gauge("buffers_free", rig.gauge("buffers_total"));
}

#[test]
fn access_is_what_was_granted() {
    let rig = Rig::new();
    let open = rig.control.open(b"content", Access::ALL, MacPolicy::Header);
    let mut client = rig.client();
    let reader = client.bind_as(&open, Access::READ, open.policy, |_| {}).unwrap();
    let writer = client.bind_as(&open, Access::WRITE, open.policy, |_| {}).unwrap();
    assert_eq!(client.write(reader, 0, b"x").0, Status::AccessDenied);
    assert_eq!(client.write_inline(reader, 0, b"x").0, Status::AccessDenied);
    assert_eq!(client.read(writer, 0, 1).0, Status::AccessDenied);
    assert_eq!(client.write_inline(writer, 0, b"C"), (Status::Ok, 1));
    assert_eq!(client.read(reader, 0, 100), (Status::Ok, b"Content".to_vec()), "two bindings on one channel");
    let narrow = rig.control.open(b"", Access::READ, MacPolicy::Header);
    assert_eq!(client.bind_as(&narrow, Access::ALL, narrow.policy, |_| {}), Err(Status::AccessDenied));
}

#[test]
fn many_requests_in_flight() {
    let rig = Rig::new();
    let content = pattern(64 * 8192, 8);
    let (mut client, binding, open) = rig.bound(&content);
    let whole = client.descriptor();
    for round in 0..5u8 {
        let requests: Vec<u32> = (0..64)
            .map(|n| {
                client.send_io(
                    Opcode::Read,
                    binding,
                    u64::from(n) * 8192,
                    8192,
                    whole.part(n * 8192, 8192).unwrap(),
                )
            })
            .collect();
        for request in requests {
            assert_eq!(client.answer(request), (Status::Ok, 8192));
        }
        let mut all = vec![0; content.len()];
        client.region().copy_out(0, &mut all).unwrap();
        assert_eq!(all, if round == 0 { content.clone() } else { open.content() });
        client.region().copy_in(0, &pattern(64 * 8192, u64::from(round) + 100)).unwrap();
        let requests: Vec<u32> = (0..64)
            .map(|n| {
                client.send_io(
                    Opcode::Write,
                    binding,
                    u64::from(n) * 8192,
                    8192,
                    whole.part(n * 8192, 8192).unwrap(),
                )
            })
            .collect();
        for request in requests {
            assert_eq!(client.answer(request), (Status::Ok, 8192));
        }
        assert_eq!(open.content(), pattern(64 * 8192, u64::from(round) + 100));
    }
}

#[test]
fn unbind_closes_the_handle_and_the_channel_goes_on() {
    let rig = Rig::new();
    let (mut client, binding, open) = rig.bound(b"abc");
    let link = rig.control.last();
    let request = client.send_unbind(binding);
    assert_eq!(client.answer(request), (Status::Ok, 0));
    eventually("released", || rig.control.told() == [Told::Released(link)]);
    assert_eq!(client.read(binding, 0, 3).0, Status::Closed);
    let again = client.bind(&open).unwrap();
    assert_ne!(again, binding, "a binding's number is not used again");
    assert_eq!(client.read(again, 0, 3), (Status::Ok, b"abc".to_vec()));
    assert_eq!(client.read(binding, 0, 3).0, Status::Closed);
}

#[test]
fn everything_returns_to_the_baseline_when_a_client_goes() {
    let rig = Rig::new();
    let base = rig.gauge("message_buffers_free");
    let (mut client, binding, _open) = rig.bound(&pattern(1 << 20, 9));
    let whole = client.descriptor();
    for n in 0..32 {
        client.send_io(Opcode::Read, binding, n * 1000, 100_000, whole);
        client.send_io(Opcode::Write, binding, n * 1000, 100_000, whole);
    }
    drop(client);
    rig.wait_gauge("channels", 0);
    rig.wait_gauge("bindings", 0);
    rig.wait_gauge("half_open_channels", 0);
    rig.wait_gauge("requests_in_flight", 0);
    rig.wait_gauge("storage_queue", 0);
    rig.wait_gauge("buffers_free", rig.gauge("buffers_total"));
    rig.wait_gauge("message_buffers_free", base);
    eventually("every binding is released", || rig.control.all_released());
}

#[test]
fn an_idle_engine_sleeps() {
    let rig = Rig::new();
    let (mut client, binding, _open) = rig.bound(b"abc");
    client.read(binding, 0, 3);
    // Once it has found out that there is nothing to do.
    eventually("an idle worker sleeps", || {
        let polls = rig.gauge("polls_total");
        std::thread::sleep(std::time::Duration::from_millis(300));
        rig.gauge("polls_total") - polls <= 2
    });
    assert_eq!(client.read(binding, 0, 3), (Status::Ok, b"abc".to_vec()), "and wakes");
}

/// DPL-16: the connection breaks after every possible number of operations; nothing is left, nothing is done twice.
#[test]
fn dpl_16_a_connection_that_breaks_anywhere_leaves_nothing() {
    let rig = Rig::new();
    let free = rig.gauge("message_buffers_free");
    for count in 0..6 {
        let (mut client, faults) = rig.silent_client();
        faults.drop_at(count);
        let open = rig.open(b"");
        if let Some(Msg::Hello(hello)) = client.next() {
            client.nonce = hello.nonce;
            client.send_bind(&open, open.access, open.policy, |_| {});
            client.next();
        }
    }
    for count in 3..60 {
        let (mut client, faults) = rig.client_and_faults();
        let open = rig.open(&pattern(600_000, 1));
        let binding = client.bind(&open).unwrap();
        faults.drop_at(faults.effects() + count);
        for n in 0..6 {
            client.send_io(Opcode::Read, binding, n, 300_000, client.descriptor());
            client.send_io(Opcode::Write, binding, n, 300_000, client.descriptor());
            client.send_flush(binding);
        }
        // All 18 answers, or the end.
        let answers = (0..18).take_while(|_| client.next().is_some()).count();
        assert!(answers == 18 || client.channel.ended().is_some());
    }
    rig.wait_gauge("channels", 0);
    rig.wait_gauge("bindings", 0);
    rig.wait_gauge("half_open_channels", 0);
    rig.wait_gauge("requests_in_flight", 0);
    rig.wait_gauge("buffers_free", rig.gauge("buffers_total"));
    rig.wait_gauge("message_buffers_free", free);
    eventually("every binding is released", || rig.control.all_released());
}

#[test]
fn workers_share_the_channels() {
    let rig = Rig::with(|s| s.engine.workers = 3);
    let content = pattern(300_000, 2);
    let mut clients: Vec<_> = (0..7).map(|_| rig.bound(&content)).collect();
    for (client, binding, open) in &mut clients {
        assert_eq!(client.read(*binding, 0, 300_000), (Status::Ok, content.clone()));
        assert_eq!(client.write(*binding, 5, &[1; 70_000]), (Status::Ok, 70_000));
        assert_eq!(open.content()[5..70_005], [1; 70_000]);
    }
    drop(clients);
    rig.wait_gauge("channels", 0);
    rig.wait_gauge("buffers_free", rig.gauge("buffers_total"));
    eventually("every binding is released", || rig.control.all_released());
}

/// Where looking costs a system call, a worker lets channels go that have nothing while others keep it busy.
#[test]
fn of_many_channels_over_tcp_none_is_forgotten() {
    let rig = Rig::new();
    let content = pattern(64 << 10, 9);
    let open = rig.open(&content);
    let mut clients = rig.tcp_clients(14);
    let bindings: Vec<u32> = clients.iter_mut().map(|client| client.bind(&open).unwrap()).collect();
    // So many in flight each; every round others have nothing to ask. All answers come, whoever keeps the worker busy.
    for round in 0..300usize {
        let asks = |n: usize| if n < 2 { 8 } else { (round / (n + 1) + n) % 4 };
        let mut asked: Vec<Vec<u32>> = Vec::new();
        for (n, (client, binding)) in clients.iter_mut().zip(&bindings).enumerate() {
            let whole = client.descriptor();
            let read = |k: usize| {
                let (at, to) = ((round * 37 + n * 11 + k) % 60_000, u32::try_from(k * 4096).unwrap());
                client.send_io(Opcode::Read, *binding, at as u64, 4096, whole.part(to, 4096).unwrap())
            };
            asked.push((0..asks(n)).map(read).collect());
        }
        for (n, (client, asked)) in clients.iter_mut().zip(asked).enumerate() {
            for (k, request) in asked.into_iter().enumerate() {
                assert_eq!(client.answer(request), (Status::Ok, 4096), "round {round}, client {n}");
                let (at, mut bytes) = ((round * 37 + n * 11 + k) % 60_000, [0; 4096]);
                client.region().copy_out(k * 4096, &mut bytes).unwrap();
                assert_eq!(bytes[..], content[at..at + 4096]);
            }
        }
    }
    // One that had nothing for long, while two never rest.
    let quiet = clients.split_off(2);
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        // Also if something fails here.
        let _rest = Rest(&done);
        for (client, binding) in clients.iter_mut().zip(&bindings) {
            let done = &done;
            scope.spawn(move || {
                while !done.load(Ordering::Relaxed) {
                    assert_eq!(client.read(*binding, 0, 4096).0, Status::Ok);
                }
            });
        }
        for (mut client, binding) in quiet.into_iter().zip(&bindings[2..]) {
            for n in 0..20 {
                let at = usize::try_from(n).unwrap();
                assert_eq!(client.read(*binding, n, 5).1, content[at..at + 5]);
            }
        }
    });
}

/// Ends those who never rest.
struct Rest<'a>(&'a AtomicBool);

impl Drop for Rest<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn a_stop_tells_the_clients_and_releases_the_bindings() {
    let rig = Rig::new();
    let mut bound = rig.bound(b"abc");
    let mut waiting = rig.client();
    rig.engine.stop();
    bound.0.expect_end(Status::Unavailable);
    waiting.expect_end(Status::Unavailable);
    assert!(rig.control.all_released());
    assert!(rig.engine.setup(crate::common::anyone()).is_none(), "nobody is taken any more");
}

#[test]
fn a_channel_without_bindings_is_not_kept_for_ever() {
    let rig = Rig::with(|s| s.limits.unbound_ms = 1500);
    let (mut client, binding, open) = rig.bound(b"abc");
    let request = client.send_unbind(binding);
    assert_eq!(client.answer(request).0, Status::Ok);
    let again = client.bind(&open).unwrap();
    std::thread::sleep(std::time::Duration::from_millis(1700));
    assert_eq!(client.read(again, 0, 3).0, Status::Ok, "it has a binding");
    let request = client.send_unbind(again);
    assert_eq!(client.answer(request).0, Status::Ok);
    client.expect_end(Status::TimedOut);
}
