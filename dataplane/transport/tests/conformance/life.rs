//! How channels end, and that every buffer comes back.

use crate::kit::*;
use holdfast_transport::{ChannelError, Kind, Operation, OperationError, RemoteAccess};
use std::collections::HashSet;

/// Every token once, and nothing twice.
#[track_caller]
fn assert_once(end: &mut End, expected: usize) {
    let tokens: HashSet<(bool, u64)> = end.done.iter().map(|c| (c.kind == Kind::Recv, c.token)).collect();
    assert_eq!((end.done.len(), tokens.len()), (expected, expected));
    end.done.clear();
    assert_eq!(end.pool.available(), end.pool.capacity());
}

pub(crate) fn closing_returns_every_buffer_once<F: Fabric>() {
    let (mut client, mut server) = ends::<F>(Sizes::default(), 8);
    for token in 0..4 {
        client.send(token, &pattern(token, 1000));
    }
    client.channel.close();
    client.channel.close();
    assert_eq!(client.channel.ended(), Some(ChannelError::Closed));
    drive(&mut [&mut client], |ends| ends[0].done.len() == 12);
    for completion in &client.done {
        assert_eq!(completion.outcome, Err(OperationError::Flushed), "{:?}", completion.kind);
    }
    assert_once(&mut client, 12);
    drive(&mut [&mut server], |ends| ends[0].has_ended() && ends[0].done.len() == 8);
    assert_eq!(server.channel.ended(), Some(ChannelError::Disconnected));
    assert_once(&mut server, 8);
    assert_eq!(client.channel.ended(), Some(ChannelError::Closed), "the reason stays");
}

pub(crate) fn closing_in_the_middle_of_transfers_returns_every_buffer_once<F: Fabric>() {
    let sizes = Sizes { depth: 24, receives: 4, buffer_len: 256 << 10, buffers: 40 };
    for (seed, who) in [(1, 0), (2, 1), (3, 0), (4, 1)] {
        let (mut client, mut server) = ends::<F>(sizes, 4);
        let registration = client.register(1 << 20, RemoteAccess::FetchAndPlace);
        let mut random = Random(seed);
        for token in 0..24u64 {
            let length = 1 + random.below(256 << 10);
            let remote = registration.descriptor().part(0, length as u32).unwrap();
            if random.below(2) == 0 {
                server.place(token, &pattern(token, length), remote);
            } else {
                server.fetch(token, remote);
            }
        }
        for _ in 0..random.below(4) {
            server.channel.poll(&mut Vec::new());
            client.channel.poll(&mut Vec::new());
        }
        [&mut client, &mut server][who].channel.close();
        drive(&mut [&mut client, &mut server], |ends| {
            ends.iter()
                .all(|end| end.has_ended() && end.pool.available() + end.done.len() == end.pool.capacity())
        });
        client.done.clear();
        server.done.clear();
        assert_eq!(client.pool.available(), client.pool.capacity());
        assert_eq!(server.pool.available(), server.pool.capacity());
    }
}

pub(crate) fn a_peer_that_goes_wakes_the_sleeper<F: Fabric>() {
    let (client, mut server) = ends::<F>(Sizes::default(), 3);
    server.pump();
    let sleeper = std::thread::spawn(move || {
        drive(&mut [&mut server], |ends| ends[0].has_ended() && ends[0].done.len() == 3);
        assert_eq!(server.channel.ended(), Some(ChannelError::Disconnected));
        assert_once(&mut server, 3);
    });
    std::thread::sleep(std::time::Duration::from_millis(50));
    assert!(!sleeper.is_finished());
    drop(client);
    sleeper.join().unwrap();
}

pub(crate) fn a_peer_that_goes_wakes_even_who_has_nothing_posted<F: Fabric>() {
    let (client, mut server) = ends::<F>(Sizes::default(), 0);
    server.pump();
    let sleeper = std::thread::spawn(move || {
        drive(&mut [&mut server], |ends| ends[0].has_ended());
        assert_eq!(server.channel.ended(), Some(ChannelError::Disconnected));
    });
    std::thread::sleep(std::time::Duration::from_millis(50));
    assert!(!sleeper.is_finished());
    drop(client);
    sleeper.join().unwrap();
}

pub(crate) fn dropped_channels_return_their_buffers<F: Fabric>() {
    let (mut client, mut server) = ends::<F>(Sizes::default(), 8);
    client.send(1, b"on its way");
    server.send(1, b"on its way");
    client.pump();
    client.done.clear();
    let (client_pool, server_pool) = (client.pool.clone(), server.pool.clone());
    drop(client);
    assert_eq!(client_pool.available(), client_pool.capacity());
    drop(server);
    assert_eq!(server_pool.available(), server_pool.capacity());
}

pub(crate) fn eight_channels_at_once<F: Fabric>() {
    let mut pairs: Vec<(End, End)> = (0..8).map(|_| ends::<F>(Sizes::default(), 4)).collect();
    let registrations: Vec<_> =
        pairs.iter().map(|(client, _)| client.register(64 << 10, RemoteAccess::FetchAndPlace)).collect();
    for round in 0..10u64 {
        for (number, (_, server)) in pairs.iter_mut().enumerate() {
            let bytes = pattern(round * 8 + number as u64, 10_000);
            server.place(round, &bytes, registrations[number].descriptor().part(0, 10_000).unwrap());
            server.send(round, &[number as u8]);
        }
        let mut all: Vec<&mut End> = pairs.iter_mut().flat_map(|(client, server)| [client, server]).collect();
        drive(&mut all, |ends| {
            ends.iter().enumerate().all(|(index, end)| end.done.len() == if index % 2 == 0 { 1 } else { 2 })
        });
        for (number, (client, server)) in pairs.iter_mut().enumerate() {
            server.done.clear();
            let received = client.next();
            assert_eq!((ok(&received, Kind::Recv), received.buffer[0]), (1, number as u8));
            let expected = pattern(round * 8 + number as u64, 10_000);
            assert!(bytes_of(registrations[number].region(), 0, 10_000) == expected);
            client.submit(received.token, Operation::Recv { buffer: received.buffer });
        }
    }
    // One goes; the others stay.
    drop(pairs.swap_remove(3));
    for (client, server) in &mut pairs {
        server.send(99, b"still here");
        drive(&mut [client, server], |ends| ends[0].count(Kind::Recv) == 1);
    }
}
