//! Descriptors when the kernel lets no more of them be on their way (`ETOOMANYREFS`). A program of its own: that limit is the
//! user's, and what this thread gives up of its rights no other test may miss.
#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_possible_wrap
)]
// The suite's helpers, of which this uses a part.
#![allow(dead_code)]

#[path = "conformance/fabrics.rs"]
mod fabrics;
#[path = "conformance/kit.rs"]
mod kit;

use fabrics::Local;
use holdfast_transport::{Kind, Operation};
use kit::*;
use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
};
use rustix::process::{Resource, getrlimit};
use rustix::thread::{CapabilitySet, capabilities, set_capabilities};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};

/// Descriptors of one message.
const EACH: usize = 250;

/// Sends descriptors to nobody until the kernel takes no more. Those that were sent are on their way while this lives.
fn flood() -> Option<Vec<(OwnedFd, OwnedFd)>> {
    let max = getrlimit(Resource::Nofile).current?;
    let some = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap();
    let (mut pairs, mut sent) = (Vec::new(), 0);
    // For the same user others may have some on their way, but never fewer than none.
    while sent <= max + 2 * EACH as u64 {
        let pair = rustix::net::socketpair(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
            None,
        );
        pairs.push(pair.unwrap());
        let (from, _) = &pairs[pairs.len() - 1];
        loop {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(EACH))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            let descriptors = [some.as_fd(); EACH];
            assert!(control.push(SendAncillaryMessage::ScmRights(&descriptors)));
            let bytes = [std::io::IoSlice::new(b"x")];
            match rustix::net::sendmsg(from, &bytes, &mut control, SendFlags::NOSIGNAL) {
                Ok(_) => sent += EACH as u64,
                Err(rustix::io::Errno::AGAIN) => break,
                Err(rustix::io::Errno::TOOMANYREFS) => return Some(pairs),
                Err(error) => panic!("{error}"),
            }
        }
    }
    None
}

fn open_descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

fn send_with(end: &mut End, token: u64, bytes: &[u8], descriptor: OwnedFd) {
    let mut buffer = end.buffer();
    buffer[..bytes.len()].copy_from_slice(bytes);
    let sent = end.channel.send_descriptor(token, buffer, bytes.len(), descriptor);
    sent.map_err(|rejected| rejected.error).unwrap();
}

fn listen_again(end: &mut End) {
    let buffer = end.buffer();
    end.submit(FIRST_RECEIVE, Operation::Recv { buffer });
}

#[test]
fn a_message_goes_without_its_descriptor_when_too_many_are_on_their_way_and_the_channel_lives() {
    // Who may administer the machine has no such limit.
    let mut rights = capabilities(None).unwrap();
    rights.effective.remove(CapabilitySet::SYS_ADMIN | CapabilitySet::SYS_RESOURCE);
    set_capabilities(None, rights).unwrap();
    let (mut client, mut server) = ends::<Local>(Sizes::default(), 8);
    // Both have what they share, and keep no descriptor of it.
    server.send(0, b"ready");
    drive(&mut [&mut server, &mut client], |ends| ends[1].count(Kind::Recv) > 0);
    drop(client.next_of(Kind::Recv));
    listen_again(&mut client);
    drop(server.next_of(Kind::Send));
    let before = open_descriptors();
    let Some(flood) = flood() else {
        eprintln!(
            "skipped: the limit of open descriptors is none, or this kernel knows no limit of those under way"
        );
        return;
    };
    let held = open_descriptors();
    for number in 0..3u8 {
        server.send(number.into(), b"before");
        let (reader, writer) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::NONBLOCK).unwrap();
        send_with(&mut server, 100 + u64::from(number), b"without", writer);
        server.send(200 + u64::from(number), b"after");
        for wanted in [6, 7, 5] {
            drive(&mut [&mut server, &mut client], |ends| ends[1].count(Kind::Recv) > 0);
            let received = client.next_of(Kind::Recv);
            assert_eq!(ok(&received, Kind::Recv), wanted, "in order, each whole");
            assert!(received.descriptor.is_none());
            listen_again(&mut client);
        }
        drive(&mut [&mut server, &mut client], |ends| ends[0].count(Kind::Send) >= 3);
        (0..3).for_each(|_| drop(server.next_of(Kind::Send)));
        // The end, and not that it would have to wait: nobody has the other end.
        assert_eq!(rustix::io::read(&reader, &mut [0; 1]), Ok(0), "the descriptor was kept");
    }
    assert_eq!(open_descriptors(), held);
    drop(flood);
    // What was on its way is let go of a moment later.
    let since = std::time::Instant::now();
    loop {
        let (_reader, writer) = rustix::pipe::pipe().unwrap();
        send_with(&mut server, 1, b"with", writer);
        drive(&mut [&mut server, &mut client], |ends| ends[1].count(Kind::Recv) > 0);
        let received = client.next_of(Kind::Recv);
        listen_again(&mut client);
        if received.descriptor.is_some() {
            break;
        }
        assert!(since.elapsed() < PATIENCE, "descriptors go again when there is room");
    }
    assert_eq!(open_descriptors(), before);
}
