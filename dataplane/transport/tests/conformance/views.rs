//! Places straight from mapped files. Only tcp has them: the others say so.

use crate::fabrics::{Local, Memory, Tcp, Verbs};
use crate::kit::{End, Fabric, PATIENCE, Sizes, ends};
use holdfast_shared::types::RegionDescriptor;
use holdfast_transport::{ChannelError, Kind, OperationError, Placed, RemoteAccess, SubmitError};
use holdfast_verbs::memory::FileMapping;
use rustix::fs::MemfdFlags;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

const LENGTH: usize = 100_000;

fn view(byte: u8) -> (OwnedFd, Arc<FileMapping>) {
    let file = rustix::fs::memfd_create("view", MemfdFlags::CLOEXEC).unwrap();
    rustix::io::pwrite(&file, &vec![byte; LENGTH], 0).unwrap();
    let mapping = FileMapping::new(file.as_fd(), 0, LENGTH).unwrap();
    (file, Arc::new(mapping))
}

/// Waits until so many are told.
fn placed(end: &mut End, count: usize) -> Vec<Placed> {
    let (mut placed, start) = (Vec::new(), Instant::now());
    while placed.len() < count {
        end.pump();
        end.channel.take_placed(&mut placed);
        assert!(start.elapsed() < PATIENCE, "only {} are told", placed.len());
    }
    assert_eq!(placed.len(), count);
    placed
}

#[test]
fn what_was_placed_from_a_file_is_there_when_the_next_message_is() {
    let (mut client, mut server) = ends::<Tcp>(Sizes::default(), 4);
    let memory = client.register(LENGTH, RemoteAccess::Place);
    let (_file, view) = view(7);
    for at in [0usize, 1, 4095, 60_000] {
        let length = LENGTH - at;
        memory.region().zero(0..LENGTH).unwrap();
        let remote = memory.descriptor().part(0, length as u32).unwrap();
        server.channel.place_view(5, &view, at..LENGTH, remote).unwrap();
        server.send(6, b"there");
        server.pump();
        client.next_of(Kind::Recv);
        client.recv(1);
        let mut bytes = vec![0; LENGTH];
        memory.region().copy_out(0, &mut bytes).unwrap();
        assert!(
            bytes[..length].iter().all(|byte| *byte == 7) && bytes[length..].iter().all(|byte| *byte == 0)
        );
        let Placed { token, outcome } = placed(&mut server, 1)[0];
        assert_eq!((token, outcome), (5, Ok(length)));
        server.next_of(Kind::Send);
        assert_eq!(Arc::strong_count(&view), 1, "the channel has let go");
    }
}

#[test]
fn each_is_told_once_in_order_also_when_the_channel_ends() {
    let (client, mut server) = ends::<Tcp>(Sizes::default(), 4);
    let memory = client.register(LENGTH, RemoteAccess::Place);
    let part = |length| memory.descriptor().part(0, length).unwrap();
    let (_file, view) = view(7);
    for (range, remote) in [(0..10, part(11)), (LENGTH - 5..LENGTH + 5, part(10)), (3..3, part(0))] {
        assert_eq!(server.channel.place_view(1, &view, range, remote), Err(SubmitError::Invalid));
    }
    let depth = Sizes::default().depth;
    for token in 0..depth as u64 {
        server.channel.place_view(token, &view, 0..LENGTH, memory.descriptor()).unwrap();
    }
    assert_eq!(server.channel.place_view(99, &view, 0..10, part(10)), Err(SubmitError::Full));
    server.channel.close();
    let all = placed(&mut server, depth);
    assert!(all.iter().all(|one| one.outcome == Err(OperationError::Flushed)));
    assert!(all.iter().map(|one| one.token).eq(0..depth as u64));
    assert_eq!(Arc::strong_count(&view), 1);
    assert_eq!(server.channel.place_view(1, &view, 0..10, part(10)), Err(SubmitError::Closed));
}

#[test]
fn memory_that_the_peer_has_not_given_ends_the_channel() {
    let (mut client, mut server) = ends::<Tcp>(Sizes::default(), 4);
    let memory = client.register(LENGTH, RemoteAccess::Fetch);
    let (_file, view) = view(7);
    server.channel.place_view(1, &view, 0..LENGTH, memory.descriptor()).unwrap();
    let start = Instant::now();
    while client.channel.ended().is_none() || server.channel.ended().is_none() {
        server.pump();
        client.pump();
        assert!(start.elapsed() < PATIENCE);
    }
    placed(&mut server, 1);
    let mut bytes = vec![1; LENGTH];
    memory.region().copy_out(0, &mut bytes).unwrap();
    assert!(bytes.iter().all(|byte| *byte == 0));
}

#[test]
fn a_file_that_was_cut_short_ends_the_channel_with_what_is_so() {
    let (client, mut server) = ends::<Tcp>(Sizes::default(), 4);
    let memory = client.register(LENGTH, RemoteAccess::Place);
    let (file, view) = view(7);
    rustix::fs::ftruncate(&file, 5000).unwrap();
    server.channel.place_view(1, &view, 0..LENGTH, memory.descriptor()).unwrap();
    assert_eq!(placed(&mut server, 1)[0].outcome, Err(OperationError::Flushed));
    let Some(ChannelError::Transport(why)) = server.channel.ended() else { panic!("it lives") };
    assert!(why.contains("cut short"), "{why}");
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
        let placed = server.channel.place_view(1, &view(1).1, 0..10, remote);
        assert_eq!(placed, Err(SubmitError::Invalid), "{}", F::NAME);
    }
    refuses::<Memory>();
    refuses::<Local>();
    refuses::<Verbs>();
}
