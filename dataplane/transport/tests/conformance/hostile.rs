//! Peers that speak the tcp framing wrongly, over a raw socket. Each must end its own channel and nothing else.

use crate::kit::*;
use holdfast_shared::types::RegionDescriptor;
use holdfast_transport::tcp::framing::{FETCHES_MAX, HEADER_BYTES, LENGTH_MAX};
use holdfast_transport::tcp::{TcpListener, connect};
use holdfast_transport::{Armed, ChannelError, Kind, Listener, OperationError, RemoteAccess};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

fn header(kind: u8, length: u32, remote: RegionDescriptor, tag: u32) -> Vec<u8> {
    let mut bytes = vec![kind, 0, 0, 0];
    bytes.extend(length.to_le_bytes());
    bytes.extend(remote.address().to_le_bytes());
    bytes.extend(remote.rkey().to_le_bytes());
    bytes.extend(tag.to_le_bytes());
    assert_eq!(bytes.len(), HEADER_BYTES);
    bytes
}

/// A channel, and the raw socket that is its peer.
fn victim(posted: usize) -> (End, TcpStream) {
    let mut listener = TcpListener::bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let stream = TcpStream::connect(listener.address()).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let pool = Pool::new(64 << 10, 32).unwrap();
    let channel = listener.accept(&mut |_| Some(setup(&pool, Sizes::default(), posted))).unwrap();
    (End::new(channel, pool), stream)
}

use holdfast_verbs::memory::Pool;

#[track_caller]
fn ends_as_misbehaved(end: &mut End, what: &str) {
    drive(&mut [end], |ends| ends[0].has_ended());
    let why = end.channel.ended().unwrap();
    assert!(matches!(why, ChannelError::Misbehaved(_)), "{what}: {why:?}");
    drive(&mut [end], |ends| ends[0].pool.available() + ends[0].done.len() == ends[0].pool.capacity());
    end.done.clear();
}

#[test]
fn malformed_frames_end_the_channel() {
    let none = RegionDescriptor::NONE;
    let some = RegionDescriptor::new(4096, 77, 64);
    let cases = [
        ("kind 0", header(0, 0, none, 0)),
        ("kind 6", header(6, 0, none, 0)),
        ("kind 255", vec![255; HEADER_BYTES]),
        ("a huge message", header(1, u32::MAX, none, 0)),
        ("a message just too long", header(1, LENGTH_MAX as u32 + 1, none, 0)),
        ("a message longer than the buffer", header(1, (64 << 10) + 1, none, 0)),
        ("a message that names memory", header(1, 4, some, 0)),
        ("a message with a tag", header(1, 4, none, 9)),
        ("an unknown rkey to place into", header(2, 64, some, 1)),
        ("an unknown rkey to fetch from", header(3, 64, some, 1)),
        ("an empty place", header(2, 0, some, 1)),
        ("an empty fetch", header(3, 0, some, 1)),
        ("a huge place", header(2, u32::MAX, some, 1)),
        ("a huge fetch", header(3, u32::MAX, some, 1)),
        ("an answer nobody asked for", header(4, 64, none, 0)),
        ("an answer with a wild tag", header(4, 64, none, u32::MAX)),
        ("a refusal without a reason", header(5, 0, none, 0)),
    ];
    for (what, bytes) in cases {
        let (mut end, mut stream) = victim(2);
        stream.write_all(&bytes).unwrap();
        ends_as_misbehaved(&mut end, what);
    }
}

#[test]
fn refusals_tell_the_peer_why() {
    for (request, reason, tag) in [
        (header(2, 64, RegionDescriptor::new(4096, 77, 64), 31), 1, 31u32),
        (header(3, 64, RegionDescriptor::new(4096, 77, 64), 32), 1, 32),
        (header(1, (64 << 10) + 1, RegionDescriptor::NONE, 0), 2, 0),
    ] {
        let (mut end, mut stream) = victim(2);
        stream.write_all(&request).unwrap();
        // More that will never be read must not take the refusal away.
        stream.write_all(&vec![7; 64 << 10]).unwrap();
        ends_as_misbehaved(&mut end, "refused");
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).unwrap();
        let mut expected = header(5, 0, RegionDescriptor::NONE, tag);
        expected[1] = reason;
        assert_eq!(answer, expected);
    }
}

#[test]
fn an_answer_of_another_length_ends_the_channel() {
    let (mut end, mut stream) = victim(0);
    end.fetch(5, RegionDescriptor::new(4096, 77, 1000));
    end.pump();
    let mut request = [0; HEADER_BYTES];
    stream.read_exact(&mut request).unwrap();
    assert_eq!(request[0], 3);
    let tag = u32::from_le_bytes(request[20..].try_into().unwrap());
    stream.write_all(&header(4, 1001, RegionDescriptor::NONE, tag)).unwrap();
    drive(&mut [&mut end], |ends| ends[0].has_ended() && ends[0].done.len() == 1);
    let completion = end.next();
    assert_eq!((completion.token, completion.outcome), (5, Err(OperationError::Flushed)));
    drop(completion);
    ends_as_misbehaved(&mut end, "another length");
}

#[test]
fn more_fetches_than_allowed_end_the_channel() {
    let (mut end, mut stream) = victim(1);
    let registration = end.register(32 << 20, RemoteAccess::Fetch);
    // Each answer is far larger than what the sockets hold, and nobody reads them.
    let request = header(3, 32 << 20, registration.descriptor(), 1);
    let flood: Vec<u8> = request.iter().copied().cycle().take(HEADER_BYTES * (FETCHES_MAX + 8)).collect();
    stream.write_all(&flood).unwrap();
    ends_as_misbehaved(&mut end, "too many fetches");
}

#[test]
fn the_next_fetch_is_asked_for_when_an_answer_is_whole() {
    const COUNT: usize = FETCHES_MAX + 1;
    let mut listener = TcpListener::bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let mut stream = TcpStream::connect(listener.address()).unwrap();
    let sizes = Sizes { depth: COUNT, receives: 1, buffer_len: 1000, buffers: COUNT + 1 };
    let pool = Pool::new(sizes.buffer_len, sizes.buffers).unwrap();
    let channel = listener.accept(&mut |_| Some(setup(&pool, sizes, 0))).unwrap();
    let mut end = End::new(channel, pool);
    for token in 0..COUNT as u64 {
        end.fetch(token, RegionDescriptor::new(4096, 77, 1000));
    }
    end.pump();
    let mut requests = vec![0; FETCHES_MAX * HEADER_BYTES];
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.read_exact(&mut requests).unwrap();
    let tag = u32::from_le_bytes(requests[20..24].try_into().unwrap());
    // Half an answer: its sender still counts it.
    stream.write_all(&header(4, 1000, RegionDescriptor::NONE, tag)).unwrap();
    stream.write_all(&[3; 500]).unwrap();
    drive_for(&mut [&mut end], Duration::from_millis(100), |_| false);
    stream.set_nonblocking(true).unwrap();
    let mut request = [0; HEADER_BYTES];
    let early = stream.read(&mut request).map_err(|error| error.kind());
    assert_eq!(early, Err(std::io::ErrorKind::WouldBlock), "one more than may be unanswered");
    stream.set_nonblocking(false).unwrap();
    stream.write_all(&[3; 500]).unwrap();
    assert_eq!(ok(&end.next(), Kind::Fetch), 1000);
    end.pump();
    stream.read_exact(&mut request).unwrap();
    assert_eq!(request[0], 3);
}

#[test]
fn nothing_readable_is_left_after_idle() {
    let (mut end, mut stream) = victim(1);
    let registration = end.register(64 << 20, RemoteAccess::Fetch);
    stream.write_all(&header(3, 64 << 20, registration.descriptor(), 1)).unwrap();
    // Until the socket takes no more of the answer, and has been found empty.
    for _ in 0..4 {
        drive_for(&mut [&mut end], Duration::from_millis(50), |_| false);
        end.pump();
    }
    // Room to send and bytes to read come together, in one edge: the next poll sends, and nothing completes by that.
    let mut some = vec![0; 16 << 20];
    stream.write_all(&header(1, 2, RegionDescriptor::NONE, 0)).unwrap();
    stream.write_all(b"hi").unwrap();
    stream.read_exact(&mut some[..1 << 20]).unwrap();
    std::thread::sleep(Duration::from_millis(50));
    loop {
        end.pump();
        if end.channel.arm() == Armed::Idle {
            break;
        }
    }
    assert_eq!(end.count(Kind::Recv), 1, "idle over a message that has come");
}

#[test]
fn what_a_peer_said_before_it_went_is_received() {
    let (mut end, mut stream) = victim(2);
    end.send(1, b"a request");
    end.pump();
    end.done.clear();
    // It says why, and closes without reading the request: that resets the connection.
    stream.write_all(&header(1, 6, RegionDescriptor::NONE, 0)).unwrap();
    stream.write_all(b"notice").unwrap();
    std::thread::sleep(Duration::from_millis(20));
    drop(stream);
    std::thread::sleep(Duration::from_millis(50));
    end.send(2, b"another");
    drive(&mut [&mut end], |ends| ends[0].has_ended());
    assert_eq!(end.channel.ended(), Some(ChannelError::Disconnected));
    let heard = end.done.iter().find(|c| c.kind == Kind::Recv && c.outcome == Ok(6));
    assert_eq!(&heard.expect("the notice").buffer[..6], b"notice");
}

#[test]
fn a_peer_that_does_not_read_gets_no_more_memory_than_it_may_have() {
    let (mut end, mut stream) = victim(1);
    let registration = end.register(1 << 20, RemoteAccess::Fetch);
    let content = pattern(4, 1 << 20);
    registration.region().copy_in(0, &content).unwrap();
    for tag in 0..FETCHES_MAX as u32 {
        stream.write_all(&header(3, 1 << 20, registration.descriptor(), tag)).unwrap();
    }
    stream.write_all(&header(1, 2, RegionDescriptor::NONE, 0)).unwrap();
    stream.write_all(b"hi").unwrap();
    // The message is taken although no answer gets through.
    assert_eq!(ok(&end.next(), Kind::Recv), 2);
    assert!(!end.has_ended());
    // Now it reads: everything it asked for comes, whole and in order.
    let reader = std::thread::spawn(move || {
        for tag in 0..FETCHES_MAX as u32 {
            let mut answer = vec![0; HEADER_BYTES];
            stream.read_exact(&mut answer).unwrap();
            assert_eq!(answer, header(4, 1 << 20, RegionDescriptor::NONE, tag));
            let mut bytes = vec![0; 1 << 20];
            stream.read_exact(&mut bytes).unwrap();
            assert!(bytes == content);
        }
    });
    drive(&mut [&mut end], |ends| ends[0].has_ended());
    reader.join().unwrap();
    assert_eq!(end.channel.ended(), Some(ChannelError::Disconnected));
}

#[test]
fn withdrawing_memory_stops_a_place_that_is_half_way() {
    let (mut end, mut stream) = victim(1);
    let registration = end.register(8192, RemoteAccess::Place);
    let region = registration.region().clone();
    stream.write_all(&header(2, 8192, registration.descriptor(), 3)).unwrap();
    stream.write_all(&[1; 4096]).unwrap();
    drive(&mut [&mut end], |_| bytes_of(&region, 4095, 1) == [1]);
    drop(registration);
    stream.write_all(&[2; 4096]).unwrap();
    ends_as_misbehaved(&mut end, "withdrawn half way");
    assert!(bytes_of(&region, 4096, 4096) == [0; 4096], "bytes landed after the withdrawal");
}

#[test]
fn frames_byte_by_byte_are_understood() {
    let (mut end, mut stream) = victim(2);
    stream.set_nodelay(true).unwrap();
    let registration = end.register(64, RemoteAccess::Place);
    let mut bytes = header(2, 5, registration.descriptor(), 1);
    bytes.extend(b"place");
    bytes.extend(header(1, 7, RegionDescriptor::NONE, 0));
    bytes.extend(b"message");
    for byte in bytes {
        stream.write_all(&[byte]).unwrap();
        end.pump();
    }
    let received = end.next();
    assert_eq!(ok(&received, Kind::Recv), 7);
    assert_eq!(&received.buffer[..7], b"message");
    assert_eq!(bytes_of(registration.region(), 0, 6), b"place\0");
}

#[test]
fn a_stream_that_ends_within_a_frame_is_a_disconnect() {
    for part in [1, HEADER_BYTES - 1, HEADER_BYTES, HEADER_BYTES + 3] {
        let (mut end, mut stream) = victim(2);
        let mut bytes = header(1, 100, RegionDescriptor::NONE, 0);
        bytes.extend([5; 100]);
        stream.write_all(&bytes[..part]).unwrap();
        drop(stream);
        drive(&mut [&mut end], |ends| ends[0].has_ended() && ends[0].done.len() == 2);
        assert_eq!(end.channel.ended(), Some(ChannelError::Disconnected), "after {part} bytes");
        assert!(end.done.iter().all(|c| c.outcome == Err(OperationError::Flushed)));
    }
}

#[test]
fn garbage_never_does_more_than_end_the_channel() {
    for seed in 1..200 {
        let (mut end, mut stream) = victim(2);
        let registration = end.register(4096, RemoteAccess::FetchAndPlace);
        registration.region().copy_in(0, &[0xC5; 4096]).unwrap();
        let mut random = Random(seed);
        let mut bytes = Vec::new();
        for _ in 0..8 {
            // Valid headers with one field spoilt get further than noise.
            let remote = RegionDescriptor::new(registration.descriptor().address(), random.next() as u32, 64);
            let mut frame =
                header(1 + random.below(5) as u8, random.below(5000) as u32, remote, random.next() as u32);
            frame[random.below(HEADER_BYTES)] = random.next() as u8;
            bytes.extend(frame);
            bytes.extend(pattern(seed, random.below(300)));
        }
        let _ = stream.write_all(&bytes);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        drive(&mut [&mut end], |ends| ends[0].has_ended());
        assert!(bytes_of(registration.region(), 0, 4096) == [0xC5; 4096], "seed {seed}");
    }
}

#[test]
fn an_answer_that_comes_while_the_peer_does_not_take_our_frames_is_received() {
    // A deadlock of two full sockets would show here: both sides have more to send than the sockets hold.
    let sizes = Sizes { depth: 64, receives: 4, buffer_len: 1 << 20, buffers: 80 };
    let mut listener = TcpListener::bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let address = listener.address();
    let pools = [Pool::new(1 << 20, 80).unwrap(), Pool::new(1 << 20, 80).unwrap()];
    let client = connect(address, Duration::from_secs(5), setup(&pools[0], sizes, 2)).unwrap();
    let server = listener.accept(&mut |_| Some(setup(&pools[1], sizes, 2))).unwrap();
    let [client_pool, server_pool] = pools;
    let (mut client, mut server) = (End::new(Box::new(client), client_pool), End::new(server, server_pool));
    let theirs = client.register(1 << 20, RemoteAccess::FetchAndPlace);
    let ours = server.register(1 << 20, RemoteAccess::FetchAndPlace);
    for token in 0..32 {
        client.place(token, &[1; 1 << 20], ours.descriptor());
        client.fetch(100 + token, ours.descriptor());
        server.place(token, &[2; 1 << 20], theirs.descriptor());
        server.fetch(100 + token, theirs.descriptor());
    }
    drive(&mut [&mut client, &mut server], |ends| ends.iter().all(|end| end.done.len() == 64));
    for completion in client.done.iter().chain(&server.done) {
        assert_eq!(completion.outcome, Ok(1 << 20));
    }
}
