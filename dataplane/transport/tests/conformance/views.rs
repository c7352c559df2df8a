//! Places straight from mapped files. Only tcp has them: the others say so.

use crate::fabrics::{Local, Memory, Tcp, Verbs};
use crate::kit::{End, Fabric, PATIENCE, Sizes, ends};
use holdfast_shared::types::RegionDescriptor;
use holdfast_transport::{FilePart, Kind, RemoteAccess, ViewPlaced};
use holdfast_verbs::memory::FileMapping;
use rustix::fs::MemfdFlags;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

const LENGTH: usize = 60_000;

fn view(byte: u8) -> (OwnedFd, Arc<FileMapping>) {
    let file = rustix::fs::memfd_create("view", MemfdFlags::CLOEXEC).unwrap();
    rustix::io::pwrite(&file, &vec![byte; LENGTH], 0).unwrap();
    let mapping = FileMapping::new(file.as_fd(), 0, LENGTH).unwrap();
    (file, Arc::new(mapping))
}

/// What came of it, and from where on the rest was asked for. `rest`: the byte that it is filled with.
fn place(
    server: &mut End,
    view: &Arc<FileMapping>,
    range: Range<usize>,
    remote: RegionDescriptor,
    rest: u8,
) -> (ViewPlaced, Option<usize>) {
    let (buffer, mut from) = (server.buffer(), None);
    let mut fill = |bytes: &mut [u8], done: usize| {
        bytes.fill(rest);
        from = Some(done);
    };
    let part = FilePart { token: 5, view, range, remote, buffer, fill: &mut fill };
    let placed = server.channel.place_view(part);
    (placed, from)
}

#[test]
fn what_was_placed_from_a_file_is_there_when_the_next_message_is() {
    let (mut client, mut server) = ends::<Tcp>(Sizes::default(), 4);
    let memory = client.register(LENGTH, RemoteAccess::Place);
    let (file, view) = view(7);
    for at in [0usize, 1, 4095, 50_000] {
        let length = LENGTH - at;
        memory.region().zero(0..LENGTH).unwrap();
        let remote = memory.descriptor().part(0, length as u32).unwrap();
        // In the order of what was submitted before.
        server.send(6, b"before");
        let (placed, from) = place(&mut server, &view, at..LENGTH, remote, 0);
        assert!(matches!(placed, ViewPlaced::Done(..)) && from.is_none(), "{placed:?}");
        drop(placed);
        // It was read when the call returned.
        rustix::io::pwrite(&file, &vec![9; LENGTH], 0).unwrap();
        server.send(6, b"behind");
        server.pump();
        for _ in 0..2 {
            client.next_of(Kind::Recv);
            client.recv(1);
        }
        let mut bytes = vec![0; LENGTH];
        memory.region().copy_out(0, &mut bytes).unwrap();
        assert!(
            bytes[..length].iter().all(|byte| *byte == 7) && bytes[length..].iter().all(|byte| *byte == 0)
        );
        rustix::io::pwrite(&file, &vec![7; LENGTH], 0).unwrap();
        server.next_of(Kind::Send);
        server.next_of(Kind::Send);
        assert_eq!(Arc::strong_count(&view), 1, "the channel keeps nothing");
    }
}

/// The wire stops within one: the rest comes from the buffer, with a completion. Then it takes nothing, until there is room again.
#[test]
fn what_the_wire_does_not_take_comes_from_the_buffer() {
    let (mut client, mut server) = ends::<Tcp>(Sizes { buffers: 4096, ..Sizes::default() }, 4);
    let memory = client.register(LENGTH, RemoteAccess::Place);
    let (_file, view) = view(7);
    let (mut taken, mut begun) = (0, None);
    while begun.is_none() {
        match place(&mut server, &view, 0..LENGTH, memory.descriptor(), 8) {
            (ViewPlaced::Done(..), None) => taken += 1,
            (ViewPlaced::Begun(_), Some(from)) => begun = Some(from),
            // Nothing of it fitted: some must be received for the next to be begun.
            (ViewPlaced::Full(_), None) => {
                client.pump();
            }
            other => panic!("{other:?} after {taken}"),
        }
    }
    let (placed, from) = place(&mut server, &view, 0..LENGTH, memory.descriptor(), 0);
    assert!(matches!(placed, ViewPlaced::Full(_)) && from.is_none(), "{placed:?}");
    drop(placed);
    // Both wait as users do: what has stopped goes on by itself.
    let (start, mut done) = (Instant::now(), None);
    while done.is_none() {
        client.pump();
        server.pump();
        done = server.done.pop_front();
        assert!(start.elapsed() < PATIENCE, "the rest never goes");
    }
    let done = done.unwrap();
    assert_eq!((done.token, done.kind, done.outcome), (5, Kind::Place, Ok(LENGTH)));
    server.send(6, b"behind");
    server.pump();
    client.next_of(Kind::Recv);
    let mut bytes = vec![0; LENGTH];
    memory.region().copy_out(0, &mut bytes).unwrap();
    let from = begun.unwrap();
    assert!(bytes[..from].iter().all(|byte| *byte == 7) && bytes[from..].iter().all(|byte| *byte == 8));
}

#[test]
fn a_file_that_was_cut_short_is_not_placed_and_the_channel_lives() {
    let (mut client, mut server) = ends::<Tcp>(Sizes::default(), 4);
    let memory = client.register(LENGTH, RemoteAccess::Place);
    let (file, view) = view(7);
    rustix::fs::ftruncate(&file, 5000).unwrap();
    server.send(6, b"before");
    // From its beginning: how much is taken is the kernel's affair, and the rest is asked for.
    match place(&mut server, &view, 0..LENGTH, memory.descriptor(), 8) {
        (ViewPlaced::Begun(_), Some(from)) => {
            assert!(from <= 8192);
            server.next_of(Kind::Place);
        }
        (ViewPlaced::Unable(_), None) => {}
        other => panic!("{other:?}"),
    }
    let gone = memory.descriptor().part(0, 10_000).unwrap();
    let (placed, from) = place(&mut server, &view, 20_000..30_000, gone, 8);
    assert!(matches!(placed, ViewPlaced::Unable(_)) && from.is_none(), "{placed:?}");
    server.send(6, b"behind");
    server.pump();
    for _ in 0..2 {
        client.next_of(Kind::Recv);
    }
    assert!(server.channel.ended().is_none() && client.channel.ended().is_none());
}

#[test]
fn what_does_not_fit_is_not_placed() {
    let (client, mut server) = ends::<Tcp>(Sizes::default(), 4);
    let memory = client.register(LENGTH, RemoteAccess::Place);
    let part = |length| memory.descriptor().part(0, length).unwrap();
    let (_file, view) = view(7);
    for (range, remote) in [(0..10, part(11)), (LENGTH - 5..LENGTH + 5, part(10)), (3..3, part(0))] {
        let (placed, _) = place(&mut server, &view, range, remote, 0);
        assert!(matches!(placed, ViewPlaced::Unable(_)), "{placed:?}");
    }
    server.channel.close();
    let (placed, _) = place(&mut server, &view, 0..10, part(10), 0);
    assert!(matches!(placed, ViewPlaced::Unable(_)), "{placed:?}");
    assert_eq!(Arc::strong_count(&view), 1);
}

#[test]
fn memory_that_the_peer_has_not_given_ends_the_channel() {
    let (mut client, mut server) = ends::<Tcp>(Sizes::default(), 4);
    let memory = client.register(LENGTH, RemoteAccess::Fetch);
    let (_file, view) = view(7);
    place(&mut server, &view, 0..LENGTH, memory.descriptor(), 0);
    let start = Instant::now();
    while client.channel.ended().is_none() || server.channel.ended().is_none() {
        server.pump();
        client.pump();
        assert!(start.elapsed() < PATIENCE);
    }
    let mut bytes = vec![1; LENGTH];
    memory.region().copy_out(0, &mut bytes).unwrap();
    assert!(bytes.iter().all(|byte| *byte == 0));
}

#[test]
fn other_transports_take_no_mapped_files() {
    fn refuses<F: Fabric>() {
        if !F::is_available() {
            return;
        }
        let mut server = ends::<F>(Sizes::default(), 0).1;
        assert!(!server.channel.places_views(), "{}", F::NAME);
        let remote = RegionDescriptor::new(4096, 1, 10);
        let (placed, _) = place(&mut server, &view(1).1, 0..10, remote, 0);
        assert!(matches!(placed, ViewPlaced::Unable(_)), "{}", F::NAME);
    }
    refuses::<Memory>();
    refuses::<Local>();
    refuses::<Verbs>();
}
