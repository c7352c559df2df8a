//! Buffers, places and bindings run short: who waits, who gives way, and what must not be mixed up then.

use crate::common::{Client, Rig, anyone, eventually, pattern};
use crate::within::as_within;
use holdfast_shared::types::Status;
use holdfast_shared::wire::data::Opcode;
use holdfast_transport::memory::{Faults, pair};
use holdfast_transport::{Channel, Completion, Kind, Listener, tcp};
use std::sync::Arc;
use std::time::Duration;

/// An engine with one buffer, and a client that holds it until its fetch is released.
fn without_buffers() -> (Rig, Client, Faults) {
    let rig = Rig::with(|s| {
        s.limits.bindings_max = 1;
        s.engine.pool_bytes = s.engine.buffer_bytes;
    });
    let (mut hog, faults) = rig.client_and_faults();
    let binding = hog.bind(&rig.open(b"")).unwrap();
    faults.hold(Kind::Fetch);
    hog.send_io(Opcode::Write, binding, 0, 1000, hog.descriptor());
    rig.wait_gauge("buffers_free", 0);
    (rig, hog, faults)
}

#[test]
fn writes_that_wait_end_with_their_binding_and_never_reach_the_next() {
    let (rig, _hog, faults) = without_buffers();
    let (first, second) = (rig.open(b"first"), rig.open(b"second"));
    let mut client = rig.client();
    let binding = client.bind(&first).unwrap();
    let writes: Vec<u32> =
        (0..40).map(|n| client.send_io(Opcode::Write, binding, n, 10, client.descriptor())).collect();
    let unbind = client.send_unbind(binding);
    assert_eq!(client.answer(unbind), (Status::Ok, 0));
    // Answered while there still is no buffer.
    for write in writes {
        assert_eq!(client.answer(write), (Status::Closed, 0));
    }
    let binding = client.bind(&second).unwrap();
    faults.release(Kind::Fetch);
    assert_eq!(client.write_inline(binding, 0, b"S"), (Status::Ok, 1));
    rig.wait_gauge("buffers_free", 1);
    assert_eq!((first.content(), second.content()), (b"first".to_vec(), b"Second".to_vec()));
}

#[test]
fn what_needs_no_buffer_does_not_wait_for_one() {
    let (rig, _hog, faults) = without_buffers();
    let (mut client, binding, open) = rig.bound(b"old");
    let writes: Vec<u32> =
        (0..40).map(|_| client.send_io(Opcode::Write, binding, 10, 10, client.descriptor())).collect();
    assert_eq!(client.write_inline(binding, 0, b"new"), (Status::Ok, 3));
    assert_eq!(client.flush(binding), Status::Ok);
    assert_eq!(&open.content()[..3], b"new");
    faults.release(Kind::Fetch);
    for write in writes {
        assert_eq!(client.answer(write), (Status::Ok, 10));
    }
}

#[test]
fn the_last_channel_gets_a_place_and_some_credits_too() {
    // Room for what every channel needs to begin with, and little more.
    let rig = Rig::with(|s| {
        s.limits.channels_max = 40;
        s.engine.message_pool_bytes = 620 * 4608;
    });
    let open = rig.open(b"abc");
    let mut clients = Vec::new();
    for n in 0..40 {
        let mut client = rig.client();
        let binding = client.bind(&open).unwrap();
        assert!(client.credits >= 2, "channel {n}");
        assert_eq!(client.read(binding, 0, 3), (Status::Ok, b"abc".to_vec()), "channel {n}");
        clients.push(client);
    }
    assert!(clients[0].credits > clients[39].credits, "a share of what is left");
    assert!(rig.engine.setup(crate::common::anyone()).is_none(), "more than channels_max");
}

#[test]
fn idle_peers_do_not_keep_others_out() {
    let rig = Rig::new();
    let mut listener = tcp::TcpListener::bind(([127, 0, 0, 1], 0).into()).unwrap();
    let (address, stop) = (listener.address(), listener.stopper());
    let engine = Arc::clone(&rig.engine);
    let accepting = std::thread::spawn(move || {
        while let Ok(channel) = listener.accept(&mut |peer| engine.setup(peer)) {
            engine.adopt(channel);
        }
    });
    let idle: Vec<_> = (0..100).map(|_| std::net::TcpStream::connect(address).unwrap()).collect();
    let parts = Client::parts();
    let channel = tcp::connect(address, Duration::from_secs(5), parts.setup()).unwrap();
    let mut client = Client::new(Box::new(channel), parts);
    client.hello();
    let binding = client.bind(&rig.open(b"abc")).unwrap();
    assert_eq!(client.read(binding, 0, 3), (Status::Ok, b"abc".to_vec()));
    eventually("the idle are bounded", || rig.gauge("half_open_channels") <= 32);
    drop((idle, client));
    rig.wait_gauge("channels", 0);
    stop();
    accepting.join().unwrap();
}

#[test]
fn a_peer_that_only_talks_makes_no_progress() {
    let rig = Rig::with(|s| s.limits.stuck_ms = 300);
    let (mut client, faults) = rig.client_and_faults();
    let binding = client.bind(&rig.open(&pattern(1000, 1))).unwrap();
    faults.hold(Kind::Fetch);
    // One request in 60 ms, and fewer than its credits.
    for _ in 0..50 {
        client.send_io(Opcode::Write, binding, 0, 10, client.descriptor());
        std::thread::sleep(Duration::from_millis(60));
        client.pump();
        if client.channel.ended().is_some() {
            break;
        }
    }
    assert!(client.channel.ended().is_some(), "it held its buffers by talking");
    rig.wait_gauge("buffers_free", rig.gauge("buffers_total"));
}

/// A channel that always has something to do, as one whose client never pauses.
struct Restless(Box<dyn Channel>);

impl Channel for Restless {
    as_within!(0);
    fn poll(&mut self, done: &mut Vec<Completion>) -> usize {
        self.0.poll(done) + usize::from(self.0.ended().is_none())
    }
}

#[test]
fn a_channel_that_never_pauses_does_not_keep_sleeping_ones_waiting() {
    // Nor does it end, though it is never bound.
    let rig = Rig::with(|s| s.limits.bind_deadline_ms = 86_400_000);
    let (mut sleeper, binding, _open) = rig.bound(b"content");
    // It is armed, and the worker sleeps.
    let mut before = 0;
    eventually("the worker sleeps", || {
        std::thread::sleep(Duration::from_millis(20));
        let polls = rig.gauge("polls_total");
        std::mem::replace(&mut before, polls) == polls
    });
    let parts = Client::parts();
    let (ours, theirs) = pair(parts.setup(), rig.engine.setup(anyone()).unwrap()).unwrap();
    rig.engine.adopt(Box::new(Restless(Box::new(theirs))));
    eventually("the worker never sleeps", || rig.gauge("polls_total") > before + 1000);
    for _ in 0..10 {
        assert_eq!(sleeper.read(binding, 0, 7), (Status::Ok, b"content".to_vec()));
    }
    drop(ours);
}
