//! Place and Fetch. The client owns the memory, the server moves the bytes.

use crate::kit::*;
use holdfast_shared::types::RegionDescriptor;
use holdfast_transport::{Kind, Operation, RemoteAccess};
use std::collections::HashMap;

const MIB: usize = 1 << 20;

fn large() -> Sizes {
    Sizes { depth: 32, receives: 32, buffer_len: MIB, buffers: 48 }
}

pub(crate) fn what_was_placed_is_there_when_the_next_message_is<F: Fabric>() {
    let (mut client, mut server) = ends::<F>(large(), 8);
    let registration = client.register(8 * MIB, RemoteAccess::Place);
    let lengths = [1, 7, 4096, 5000, 65_536, 300_001, MIB];
    let mut round = 0u64;
    for batch in 0..6 {
        // Several Places, each followed by its message, all under way together.
        let mut expected = Vec::new();
        for slot in 0..8u32 {
            let length = lengths[(batch + slot as usize) % lengths.len()];
            let remote = registration.descriptor().part(slot * MIB as u32, length as u32).unwrap();
            server.place(round, &pattern(round, length), remote);
            server.send(round, &round.to_le_bytes());
            expected.push((round, slot as usize * MIB, length));
            round += 1;
        }
        for (number, start, length) in expected {
            drive(&mut [&mut client, &mut server], |ends| !ends[0].done.is_empty());
            let received = client.next();
            assert_eq!(ok(&received, Kind::Recv), 8);
            assert_eq!(received.buffer[..8], number.to_le_bytes());
            assert!(
                bytes_of(registration.region(), start, length) == pattern(number, length),
                "round {number}"
            );
            client.submit(received.token, Operation::Recv { buffer: received.buffer });
        }
        drive(&mut [&mut client, &mut server], |ends| ends[1].done.len() == 16);
        for completion in server.done.drain(..) {
            let expected = if completion.kind == Kind::Send { 8 } else { completion.outcome.unwrap() };
            assert_eq!(completion.outcome.unwrap(), expected);
        }
    }
}

pub(crate) fn fetches_bring_what_is_there<F: Fabric>() {
    let (mut client, mut server) = ends::<F>(large(), 2);
    let registration = client.register(2 * MIB, RemoteAccess::Fetch);
    let content = pattern(99, 2 * MIB);
    registration.region().copy_in(0, &content).unwrap();
    let mut random = Random(5);
    for _ in 0..8 {
        let mut asked = HashMap::new();
        for token in 0..16u64 {
            let length = [1, 10, 4096, 70_000, MIB][random.below(5)];
            let start = random.below(2 * MIB - length + 1);
            let remote = registration.descriptor().part(start as u32, length as u32).unwrap();
            server.fetch(token, remote);
            asked.insert(token, (start, length));
        }
        drive(&mut [&mut client, &mut server], |ends| ends[1].done.len() == 16);
        for completion in server.done.drain(..) {
            let (start, length) = asked.remove(&completion.token).unwrap();
            assert_eq!(ok(&completion, Kind::Fetch), length);
            assert!(completion.buffer[..length] == content[start..start + length]);
        }
    }
}

pub(crate) fn nothing_is_moved_where_nothing_is_asked<F: Fabric>() {
    let (mut client, mut server) = ends::<F>(Sizes::default(), 2);
    server.place(1, &[], RegionDescriptor::NONE);
    server.fetch(2, RegionDescriptor::new(u64::MAX, u32::MAX, 0));
    server.send(3, &[]);
    drive(&mut [&mut client, &mut server], |ends| ends[1].done.len() == 3 && !ends[0].done.is_empty());
    for completion in server.done.drain(..) {
        assert_eq!(completion.outcome.unwrap(), 0, "{:?}", completion.kind);
    }
    assert_eq!(ok(&client.next(), Kind::Recv), 0);
    assert!(!client.has_ended() && !server.has_ended());
}

pub(crate) fn more_fetches_than_the_wire_takes_at_once<F: Fabric>() {
    let sizes = Sizes { depth: 200, receives: 4, buffer_len: 8192, buffers: 210 };
    let (mut client, mut server) = ends::<F>(sizes, 1);
    let registration = client.register(200 * 8192, RemoteAccess::Fetch);
    let content = pattern(3, 200 * 8192);
    registration.region().copy_in(0, &content).unwrap();
    for token in 0..200u32 {
        server.fetch(token.into(), registration.descriptor().part(token * 8192, 8192).unwrap());
    }
    // What follows may overtake, but comes.
    drive(&mut [&mut client, &mut server], |ends| ends[1].count(Kind::Fetch) == 200);
    for completion in server.done.drain(..) {
        let start = completion.token as usize * 8192;
        assert_eq!(ok(&completion, Kind::Fetch), 8192);
        assert!(completion.buffer[..] == content[start..start + 8192]);
    }
}

pub(crate) fn more_large_fetches_than_the_wire_takes_at_once<F: Fabric>() {
    const COUNT: usize = 128;
    const LENGTH: usize = 256 << 10;
    let sizes = Sizes { depth: COUNT, receives: 4, buffer_len: LENGTH, buffers: COUNT + 8 };
    let (mut client, mut server) = ends::<F>(sizes, 1);
    let registration = client.register(2 * LENGTH, RemoteAccess::Fetch);
    let (content, whole) = (pattern(4, 2 * LENGTH), registration.descriptor());
    registration.region().copy_in(0, &content).unwrap();
    // Both at once, so that answers are half way at any moment.
    let owner = std::thread::spawn(move || {
        drive(&mut [&mut client], |ends| ends[0].has_ended());
        registration
    });
    for token in 0..COUNT as u32 {
        server.fetch(token.into(), whole.part(token * 1024, LENGTH as u32).unwrap());
    }
    drive(&mut [&mut server], |ends| ends[0].count(Kind::Fetch) == COUNT);
    for completion in server.done.drain(..) {
        let start = completion.token as usize * 1024;
        assert_eq!(ok(&completion, Kind::Fetch), LENGTH);
        assert!(completion.buffer[..] == content[start..start + LENGTH]);
    }
    drop(server);
    owner.join().unwrap();
}

pub(crate) fn only_what_was_named_is_touched<F: Fabric>() {
    let (mut client, mut server) = ends::<F>(Sizes::default(), 2);
    let registration = client.register(40_000, RemoteAccess::FetchAndPlace);
    let mut expected = vec![0xC5; 40_000];
    registration.region().copy_in(0, &expected).unwrap();
    let mut random = Random(11);
    for token in 0..60 {
        let length = 1 + random.below(9000);
        let start = random.below(40_000 - length + 1);
        let bytes = pattern(token, length);
        expected[start..start + length].copy_from_slice(&bytes);
        server.place(token, &bytes, registration.descriptor().part(start as u32, length as u32).unwrap());
        drive(&mut [&mut client, &mut server], |ends| !ends[1].done.is_empty());
        ok(&server.next(), Kind::Place);
    }
    server.send(0, b"all placed");
    drive(&mut [&mut client, &mut server], |ends| ends[0].count(Kind::Recv) == 1);
    assert!(bytes_of(registration.region(), 0, 40_000) == expected);
}
