//! Descriptors that come with messages: over local channels, from the server to the client.

use crate::fabrics::{Local, Memory, Tcp};
use crate::kit::*;
use holdfast_transport::{Kind, Operation, SubmitError};
use std::os::fd::{AsFd, OwnedFd};

fn pipe() -> (OwnedFd, OwnedFd) {
    rustix::pipe::pipe().unwrap()
}

/// Sends a message with a descriptor.
fn send_with(end: &mut End, token: u64, bytes: &[u8], descriptor: OwnedFd) -> Result<(), SubmitError> {
    let mut buffer = end.buffer();
    buffer[..bytes.len()].copy_from_slice(bytes);
    let sent = end.channel.send_descriptor(token, buffer, bytes.len(), descriptor);
    sent.map_err(|rejected| {
        assert!(matches!(rejected.operation, Operation::Send { .. }), "given back whole");
        rejected.error
    })
}

/// True if nobody has the writing end any more.
fn is_closed(reader: &OwnedFd) -> bool {
    use rustix::event::{PollFd, PollFlags, Timespec};
    let mut fds = [PollFd::new(reader, PollFlags::IN)];
    let long = Timespec { tv_sec: PATIENCE.as_secs() as i64, tv_nsec: 0 };
    rustix::event::poll(&mut fds, Some(&long)).unwrap();
    fds[0].revents().contains(PollFlags::HUP)
}

#[test]
fn each_comes_with_its_own_message_among_others() {
    const COUNT: u8 = 40;
    let sizes = Sizes { depth: 64, receives: 64, ..Sizes::default() };
    let (mut client, mut server) = ends::<Local>(sizes, 8);
    let mut readers = Vec::new();
    // All that fits into the socket goes out with few calls, and comes with few: without losing whose it is.
    for number in 0..COUNT {
        if number % 3 == 0 {
            let (reader, writer) = pipe();
            send_with(&mut server, number.into(), &[number; 30], writer).unwrap();
            readers.push(reader);
        } else {
            server.send(number.into(), &[number; 300]);
        }
    }
    let mut readers = readers.into_iter();
    for number in 0..COUNT {
        drive(&mut [&mut server, &mut client], |ends| ends[1].count(Kind::Recv) > 0);
        let received = client.next_of(Kind::Recv);
        assert_eq!((ok(&received, Kind::Recv) > 30, received.buffer[0]), (number % 3 != 0, number));
        if number % 3 == 0 {
            let (reader, writer) = (readers.next().unwrap(), received.descriptor.unwrap());
            rustix::io::write(&writer, &[number]).unwrap();
            let mut byte = [0; 1];
            assert_eq!(rustix::io::read(reader.as_fd(), &mut byte).unwrap(), 1);
            assert_eq!(byte[0], number, "another message's");
            drop(writer);
            assert!(is_closed(&reader), "one duplicate, and no more");
        } else {
            assert!(received.descriptor.is_none());
        }
        client.submit(received.token, Operation::Recv { buffer: received.buffer });
    }
}

#[test]
fn one_that_nobody_receives_is_closed() {
    let (client, mut server) = ends::<Local>(Sizes::default(), 0);
    let (reader, writer) = pipe();
    send_with(&mut server, 1, b"never read", writer).unwrap();
    server.pump();
    drop(client);
    drop(server);
    assert!(is_closed(&reader));
}

#[test]
fn a_client_sends_none() {
    let (mut client, mut server) = ends::<Local>(Sizes::default(), 2);
    let (reader, writer) = pipe();
    send_with(&mut client, 1, b"take this", writer).unwrap();
    drive(&mut [&mut client, &mut server], |ends| ends.iter().all(|end| end.has_ended()));
    let why = server.channel.ended().unwrap();
    assert!(matches!(why, holdfast_transport::ChannelError::Misbehaved(_)), "{why:?}");
    assert!(is_closed(&reader));
}

#[test]
fn other_transports_have_none() {
    for (client, server) in [ends::<Tcp>(Sizes::default(), 2), ends::<Memory>(Sizes::default(), 2)] {
        for mut end in [client, server] {
            let (reader, writer) = pipe();
            assert_eq!(send_with(&mut end, 1, b"take this", writer), Err(SubmitError::Invalid));
            assert!(is_closed(&reader));
        }
    }
}
