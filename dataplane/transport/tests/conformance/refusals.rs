//! What is not accepted: by this side, because it makes no sense; by the peer, because it was not allowed.

use crate::kit::*;
use holdfast_shared::types::RegionDescriptor;
use holdfast_transport::{
    ChannelError, Kind, Operation, OperationError, Registration, RemoteAccess, SubmitError,
};
use holdfast_verbs::memory::Pool;

pub(crate) fn a_full_queue_gives_the_operation_back<F: Fabric>() {
    let sizes = Sizes { depth: 4, receives: 2, buffer_len: 256, buffers: 16 };
    let (mut client, mut server) = ends::<F>(sizes, 2);
    for token in 0..4 {
        client.send(token, b"x");
    }
    let mut buffer = client.buffer();
    buffer[0] = 77;
    let addr = buffer.addr();
    let rejected = client.channel.submit(9, Operation::Send { buffer, length: 1 }).unwrap_err();
    assert_eq!(rejected.error, SubmitError::Full);
    let Operation::Send { buffer, length: 1 } = rejected.operation else {
        panic!("another operation came back")
    };
    assert_eq!((buffer.addr(), buffer[0]), (addr, 77));
    let recv = Operation::Recv { buffer };
    assert_eq!(client.refused(recv), SubmitError::Full);
    // Two fit the receives that are posted; when they are done there is room again.
    drive(&mut [&mut client, &mut server], |ends| ends[0].count(Kind::Send) >= 2 && ends[1].done.len() == 2);
    client.done.clear();
    client.send(10, b"y");
}

pub(crate) fn invalid_operations_are_given_back<F: Fabric>() {
    let (mut client, server) = ends::<F>(Sizes::default(), 2);
    let length = client.pool.buffer_len();
    let too_long = RegionDescriptor::new(4096, 1, length as u32 + 1);
    let buffer = client.buffer();
    assert_eq!(client.refused(Operation::Send { buffer, length: length + 1 }), SubmitError::Invalid);
    let buffer = client.buffer();
    assert_eq!(client.refused(Operation::Place { buffer, remote: too_long }), SubmitError::Invalid);
    let buffer = client.buffer();
    assert_eq!(client.refused(Operation::Fetch { buffer, remote: too_long }), SubmitError::Invalid);
    let foreign = Pool::new(4096, 1).unwrap();
    let buffer = foreign.take().unwrap();
    assert_eq!(client.refused(Operation::Recv { buffer }), SubmitError::Invalid);
    assert_eq!(foreign.available(), 1);
    client.channel.close();
    let buffer = client.buffer();
    assert_eq!(client.refused(Operation::Recv { buffer }), SubmitError::Closed);
    drop(server);
}

/// The client registers 8192 bytes in the middle of nothing and tells the server of them; the server then uses
/// `wrong` of that. Nothing of the client's may change, both channels' ends must end, and another pair must not.
fn refused<F: Fabric>(
    kind: Kind,
    access: RemoteAccess,
    wrong: impl FnOnce(Registration) -> (RegionDescriptor, Option<Registration>),
) {
    let (mut client, mut server) = ends::<F>(Sizes::default(), 4);
    let (mut other_client, mut other_server) = ends::<F>(Sizes::default(), 4);
    let other = other_client.register(8192, RemoteAccess::FetchAndPlace);
    let canary = client.register(8192, RemoteAccess::FetchAndPlace);
    let registration = client.register(8192, access);
    let regions = [canary.region().clone(), registration.region().clone()];
    for region in &regions {
        region.copy_in(0, &[0xC5; 8192]).unwrap();
    }
    let (remote, _kept) = wrong(registration);
    // One that is allowed goes before it and must not suffer.
    server.place(1, &[1; 16], canary.descriptor().part(0, 16).unwrap());
    match kind {
        Kind::Place => server.place(2, &vec![0xEE; remote.length() as usize], remote),
        _ => server.fetch(2, remote),
    }
    drive(&mut [&mut client, &mut server], |ends| ends.iter().all(|end| end.has_ended()));
    drive(&mut [&mut server], |ends| ends[0].done.len() == 6);
    for completion in server.done.drain(..) {
        match (completion.token, completion.outcome) {
            (1, outcome) => assert_eq!(outcome, Ok(16)),
            (2, Err(error)) => assert_eq!(error, OperationError::RemoteAccess),
            (2, Ok(_)) => assert!(F::PLACE_IS_BUFFERED && kind == Kind::Place, "it was refused"),
            (_, outcome) => assert_eq!(outcome, Err(OperationError::Flushed)),
        }
        if completion.kind == Kind::Fetch {
            assert!(!completion.buffer[..8].contains(&0xC5), "it got at bytes that it may not");
        }
    }
    let (ours, theirs) = (server.channel.ended().unwrap(), client.channel.ended().unwrap());
    assert!(matches!(ours, ChannelError::Transport(_)), "{ours:?}");
    let told = matches!(theirs, ChannelError::Misbehaved(_));
    assert!(told || (!F::OWNER_KNOWS && theirs == ChannelError::Disconnected), "{theirs:?}");

    assert!(bytes_of(&regions[0], 16, 8192 - 16) == [0xC5; 8192 - 16], "beside what was placed");
    assert!(bytes_of(&regions[1], 0, 8192) == [0xC5; 8192], "what was not allowed");
    other_server.place(1, &[7; 8192], other.descriptor());
    other_server.send(2, b"there");
    drive(&mut [&mut other_client, &mut other_server], |ends| ends[0].count(Kind::Recv) == 1);
    assert!(bytes_of(other.region(), 0, 8192) == [7; 8192]);
}

pub(crate) fn an_unknown_key_is_refused<F: Fabric>() {
    for kind in [Kind::Place, Kind::Fetch] {
        refused::<F>(kind, RemoteAccess::FetchAndPlace, |registration| {
            let d = registration.descriptor();
            (RegionDescriptor::new(d.address(), d.rkey() ^ 0x5A5A_5A5A, 64), Some(registration))
        });
    }
}

pub(crate) fn memory_outside_a_region_is_refused<F: Fabric>() {
    let wrongs: [fn(RegionDescriptor) -> RegionDescriptor; 4] = [
        |d| RegionDescriptor::new(d.address() + 1, d.rkey(), 8192),
        |d| RegionDescriptor::new(d.address() - 1, d.rkey(), 16),
        |d| RegionDescriptor::new(d.address() + 8192, d.rkey(), 1),
        |d| RegionDescriptor::new(u64::MAX - 7, d.rkey(), 16),
    ];
    for wrong in wrongs {
        for kind in [Kind::Place, Kind::Fetch] {
            refused::<F>(kind, RemoteAccess::FetchAndPlace, |registration| {
                (wrong(registration.descriptor()), Some(registration))
            });
        }
    }
}

pub(crate) fn access_that_was_not_given_is_refused<F: Fabric>() {
    for (kind, access) in [(Kind::Place, RemoteAccess::Fetch), (Kind::Fetch, RemoteAccess::Place)] {
        refused::<F>(kind, access, |registration| (registration.descriptor(), Some(registration)));
    }
}

pub(crate) fn withdrawn_memory_is_refused<F: Fabric>() {
    for kind in [Kind::Place, Kind::Fetch] {
        refused::<F>(kind, RemoteAccess::FetchAndPlace, |registration| (registration.descriptor(), None));
    }
}

pub(crate) fn memory_withdrawn_under_many_fetches_ends_them_all<F: Fabric>() {
    for round in 0..20 {
        let (mut client, mut server) = ends::<F>(Sizes::default(), 1);
        let registration = client.register(64 << 10, RemoteAccess::Fetch);
        for token in 0..16 {
            server.fetch(token, registration.descriptor());
        }
        let owner = std::thread::spawn(move || {
            drive(&mut [&mut client], |ends| ends[0].has_ended());
            client
        });
        let withdrawal = std::thread::spawn(move || {
            std::thread::sleep(std::time::Duration::from_micros(50 * round));
            drop(registration);
        });
        // Each comes back once: done before the withdrawal, refused, or with the channel that the refusal ends.
        drive(&mut [&mut server], |ends| ends[0].count(Kind::Fetch) == 16);
        withdrawal.join().unwrap();
        let succeeded = server.done.drain(..).filter(|completion| completion.outcome.is_ok()).count();
        assert_eq!(succeeded < 16, server.has_ended(), "round {round}");
        drop(server);
        assert!(owner.join().unwrap().has_ended());
    }
}

pub(crate) fn other_channels_keep_their_memory_to_themselves<F: Fabric>() {
    let (owner, _peer) = ends::<F>(Sizes::default(), 1);
    let private = owner.register(4096, RemoteAccess::FetchAndPlace);
    private.region().copy_in(0, &[0xC5; 4096]).unwrap();
    for kind in [Kind::Place, Kind::Fetch] {
        refused::<F>(kind, RemoteAccess::FetchAndPlace, |registration| {
            (private.descriptor(), Some(registration))
        });
    }
    assert!(bytes_of(private.region(), 0, 4096) == [0xC5; 4096]);
    assert!(!owner.has_ended());
}
