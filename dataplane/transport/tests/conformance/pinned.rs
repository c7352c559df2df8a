//! Places straight from pinned pages of files. Only verbs has them: the others say so.

use crate::fabrics::{Memory, Tcp, Verbs};
use crate::kit::{Fabric, PATIENCE, Sizes, ends};
use holdfast_shared::types::RegionDescriptor;
use holdfast_transport::verbs::PinnedFile;
use holdfast_transport::{Kind, OperationError, Placed, RemoteAccess, SubmitError};
use rustix::fs::MemfdFlags;
use std::os::fd::AsFd;
use std::time::Instant;

const LENGTH: usize = 100_000;

fn file(byte: u8) -> std::os::fd::OwnedFd {
    let file = rustix::fs::memfd_create("pinned", MemfdFlags::CLOEXEC).unwrap();
    rustix::io::pwrite(&file, &vec![byte; LENGTH], 0).unwrap();
    file
}

/// Two ends over verbs, and a file pinned by the second; `None` where there is no device, or a kernel that can't.
fn pinned(byte: u8) -> Option<(crate::kit::End, crate::kit::End, PinnedFile)> {
    if !Verbs::is_available() {
        return None;
    }
    let (client, server) = ends::<Verbs>(Sizes::default(), 4);
    match server.channel.pinner().unwrap().pin(file(byte).as_fd(), 0, LENGTH) {
        Ok(pages) => Some((client, server, pages)),
        // EFAULT: this kernel pins no read-only mappings (6.1).
        Err(error) => {
            println!("skipped: {error}");
            None
        }
    }
}

fn next_placed(end: &mut crate::kit::End) -> Placed {
    let (mut placed, start) = (Vec::new(), Instant::now());
    while placed.is_empty() {
        end.pump();
        end.channel.take_placed(&mut placed);
        assert!(start.elapsed() < PATIENCE, "it is never told");
    }
    assert_eq!(placed.len(), 1);
    placed[0]
}

#[test]
fn what_was_placed_from_a_file_is_there_when_the_next_message_is() {
    let Some((mut client, mut server, pages)) = pinned(7) else { return };
    let memory = client.register(LENGTH, RemoteAccess::Place);
    for at in [0usize, 1, 4095, 60_000] {
        let length = LENGTH - at;
        memory.region().zero(0..LENGTH).unwrap();
        let remote = memory.descriptor().part(0, length as u32).unwrap();
        server.channel.place_pinned(5, &pages, at..LENGTH, remote).unwrap();
        assert!(!pages.is_idle());
        server.send(6, b"there");
        server.pump();
        client.next_of(Kind::Recv);
        client.recv(1);
        let mut bytes = vec![0; LENGTH];
        memory.region().copy_out(0, &mut bytes).unwrap();
        assert!(
            bytes[..length].iter().all(|byte| *byte == 7) && bytes[length..].iter().all(|byte| *byte == 0)
        );
        let Placed { token, outcome } = next_placed(&mut server);
        assert_eq!((token, outcome), (5, Ok(length)));
        server.next_of(Kind::Send);
        assert!(pages.is_idle(), "the channel has let go");
    }
    // Few bytes too: no processor copies them into the request, which would be a fault once the file is gone.
    let short = file(9);
    let pages = server.channel.pinner().unwrap().pin(short.as_fd(), 0, LENGTH).unwrap();
    rustix::fs::ftruncate(&short, 0).unwrap();
    server.channel.place_pinned(1, &pages, 0..8, memory.descriptor().part(0, 8).unwrap()).unwrap();
    assert_eq!(next_placed(&mut server).outcome, Ok(8));
}

#[test]
fn what_does_not_fit_is_refused_and_what_the_peer_forbids_ends_the_channel() {
    let Some((client, mut server, pages)) = pinned(7) else { return };
    let memory = client.register(LENGTH, RemoteAccess::Place);
    let part = |length| memory.descriptor().part(0, length).unwrap();
    for (range, remote) in [(0..10, part(11)), (LENGTH - 5..LENGTH + 5, part(10)), (3..3, part(0))] {
        assert_eq!(server.channel.place_pinned(1, &pages, range, remote), Err(SubmitError::Invalid));
    }
    // Pinned for channels of another device context.
    let (_other_client, other) = ends::<Verbs>(Sizes::default(), 0);
    let foreign = other.channel.pinner().unwrap().pin(file(1).as_fd(), 0, 10).unwrap();
    assert_eq!(server.channel.place_pinned(1, &foreign, 0..10, part(10)), Err(SubmitError::Invalid));
    let depth = Sizes::default().depth as u64;
    let unknown = RegionDescriptor::new(memory.descriptor().address(), memory.descriptor().rkey() ^ 1, 10);
    for token in 0..depth {
        server.channel.place_pinned(token, &pages, 0..10, unknown).unwrap();
    }
    assert_eq!(server.channel.place_pinned(99, &pages, 0..10, part(10)), Err(SubmitError::Full));
    let (mut placed, start) = (Vec::new(), Instant::now());
    while (placed.len() as u64) < depth {
        server.pump();
        server.channel.take_placed(&mut placed);
        assert!(start.elapsed() < PATIENCE, "only {} are told", placed.len());
    }
    assert_eq!(placed[0].outcome, Err(OperationError::RemoteAccess));
    assert!(placed[1..].iter().all(|one| one.outcome == Err(OperationError::Flushed)));
    assert!(placed.iter().map(|one| one.token).eq(0..depth), "each once, in order");
    assert!(server.channel.ended().is_some() && pages.is_idle());
    assert_eq!(server.channel.place_pinned(1, &pages, 0..10, part(10)), Err(SubmitError::Closed));
    assert!(client.channel.pinner().is_none(), "a client has no files");
}

#[test]
fn other_transports_pin_nothing() {
    assert!(ends::<Memory>(Sizes::default(), 0).1.channel.pinner().is_none());
    assert!(ends::<Tcp>(Sizes::default(), 0).1.channel.pinner().is_none());
}
