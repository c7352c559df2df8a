//! Data over a real (or soft-RoCE) device: send, write, read, immediates, chains, limits.

use std::collections::VecDeque;

use crate::common::{BUFFER, pair, rdma};
use holdfast_verbs::{CompletionKind, Local, Operation, Status, VerbsError};

#[test]
fn messages_arrive_inline_and_not() {
    let Some((_alone, address)) = rdma() else { return };
    let (mut client, mut server) = pair(address, 8);
    assert!(client.connection.max_inline() >= 16, "inline: {}", client.connection.max_inline());
    for (token, message) in [vec![1; 16], vec![2; BUFFER], vec![]].into_iter().enumerate() {
        let request = client.request(100 + token as u64, Operation::Send, &message);
        client.post(request);
        let sent = client.next();
        assert_eq!(
            (sent.token, sent.kind, sent.status),
            (100 + token as u64, CompletionKind::Send, Status::Success)
        );
        assert_eq!(sent.bytes, message.len());
        let received = server.next();
        assert_eq!((received.token, received.kind), (token as u64, CompletionKind::Receive));
        assert_eq!((received.status, received.immediate), (Status::Success, None));
        assert_eq!(&received.local.into_buffer().unwrap()[..received.bytes], &message[..]);
    }
    let request = server.request(7, Operation::SendImmediate(0xC0FF_EE01), b"back");
    server.post(request);
    assert_eq!(client.next().immediate, Some(0xC0FF_EE01));
}

#[test]
fn writes_and_reads_land_where_they_should() {
    let Some((_alone, address)) = rdma() else { return };
    let (mut client, mut server) = pair(address, 4);
    // Server-driven, as the data path has it: place into the client's region, fetch from it.
    let request = server.request(1, Operation::Write(client.remote(10)), b"placed");
    server.post(request);
    assert_eq!(server.next().status, Status::Success);
    assert_eq!(client.region_bytes(9, 8), b"\0placed\0");

    client.region.copy_in(5000, &[0x5A; 3000]).unwrap();
    let request = server.request(2, Operation::Read(client.remote(5000)), &[0; 3000]);
    server.post(request);
    let fetched = server.next();
    assert_eq!((fetched.status, fetched.kind, fetched.bytes), (Status::Success, CompletionKind::Read, 3000));
    assert_eq!(&fetched.local.into_buffer().unwrap()[..3000], &[0x5A; 3000]);

    // Between regions, 1 MiB at once, and the peer is told with it.
    server.region.copy_in(0, &[0xA5; 1 << 20]).unwrap();
    let request = server.region_request(3, Operation::WriteImmediate(client.remote(0), 77), 0..1 << 20);
    server.post(request);
    assert_eq!(server.next().status, Status::Success);
    let told = client.next();
    assert_eq!((told.kind, told.immediate, told.bytes), (CompletionKind::Receive, Some(77), 1 << 20));
    assert!(client.region_bytes(0, 1 << 20).iter().all(|byte| *byte == 0xA5));
}

#[test]
fn both_ends_see_the_same_identity_mirrored() {
    let Some((_alone, address)) = rdma() else { return };
    let (client, server) = pair(address, 1);
    let (ours, theirs) = (client.connection.identity(), server.connection.identity());
    assert_eq!((ours.local_qpn, ours.remote_qpn), (theirs.remote_qpn, theirs.local_qpn));
    assert_eq!((ours.local_gid, ours.remote_gid), (theirs.remote_gid, theirs.local_gid));
    assert_ne!(ours.local_qpn, ours.remote_qpn);
    assert_eq!(ours.local_gid.ip(), address.ip());
}

#[test]
fn unsignaled_requests_complete_with_a_later_one_and_full_is_an_answer() {
    let Some((_alone, address)) = rdma() else { return };
    let (mut client, mut server) = pair(address, 8);
    // Three sends with one doorbell; only the last asks for a completion.
    let mut queue: VecDeque<_> = (0..3u64)
        .map(|token| {
            let mut request = client.request(token, Operation::Send, &[u8::try_from(token).unwrap(); 200]);
            request.signaled = token == 2;
            request
        })
        .collect();
    assert_eq!(client.connection.post(&mut queue).unwrap(), 3);
    for token in 0..3 {
        let completion = client.next();
        assert_eq!((completion.token, completion.status, completion.bytes), (token, Status::Success, 200));
        assert_eq!(server.next().local.into_buffer().unwrap()[199], u8::try_from(token).unwrap());
    }
    // More than the queue holds, none asking for a completion: all get through all the same.
    let target = server.remote(0);
    let mut queue: VecDeque<_> = (0..200)
        .map(|token| {
            let mut request = client.region_request(token, Operation::Write(target), 0..100);
            request.signaled = token == 199;
            request
        })
        .collect();
    assert_eq!(client.connection.post(&mut queue).unwrap(), 32, "the depth asked for");
    assert_eq!((client.connection.send_room(), queue.len()), (0, 168));
    assert_eq!(client.connection.post(&mut queue).unwrap(), 0, "full");
    let mut next = 0;
    while next < 200 {
        let completion = client.next();
        assert_eq!((completion.token, completion.status), (next, Status::Success));
        next += 1;
        client.connection.post(&mut queue).unwrap();
    }
    assert_eq!(client.connection.send_room(), 32);
}

#[test]
fn what_does_not_fit_is_refused_before_the_device_sees_it() {
    let Some((_alone, address)) = rdma() else { return };
    let (mut client, server) = pair(address, 32);
    // Receive queue full: the memory comes back.
    let local = Local::buffer(&client.pool_registration, client.buffer(b""), 0..BUFFER).unwrap();
    let (error, local) = client.connection.post_receive(99, local).unwrap_err();
    assert!(matches!(error, VerbsError::Full(32)), "{error}");
    assert!(local.into_buffer().is_some());
    // Ranges, and registrations that don't belong.
    assert!(Local::buffer(&client.pool_registration, client.buffer(b""), 0..BUFFER + 1).is_err());
    assert!(Local::buffer(&server.pool_registration, client.buffer(b""), 0..1).is_err());
    assert!(Local::region(&client.pool_registration, 0..1).is_err());
    assert!(Local::region(&client.region_registration, 1..(1 << 20) + 1).is_err());
    // Another domain's memory stays in the queue, with the error; what was before it has gone out.
    let mut queue = VecDeque::from([
        client.region_request(1, Operation::Write(server.remote(0)), 0..1),
        server.region_request(2, Operation::Write(server.remote(0)), 0..1),
    ]);
    let error = client.connection.post(&mut queue).unwrap_err();
    assert!(matches!(error, VerbsError::WrongRegistration), "{error}");
    assert_eq!((queue.len(), queue[0].token), (1, 2));
    assert_eq!(client.next().token, 1);
}
