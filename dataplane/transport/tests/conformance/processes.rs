//! Two processes, as in life: the other one is this test binary again, and one is killed.

use crate::kit::*;
use holdfast_shared::types::RegionDescriptor;
use holdfast_transport::{Channel, ChannelError, Kind, RemoteAccess, Setup};
use holdfast_verbs::memory::Pool;
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use zerocopy::{FromBytes, IntoBytes};

const ADDRESS: &str = "HOLDFAST_TEST_PEER";
const LENGTH: usize = 300_000;

/// Kills the other process whatever becomes of the test.
struct Other(Child);

impl Drop for Other {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

pub(crate) fn a_killed_process_is_noticed_and_leaves_nothing_behind<F: Listening>() {
    let mut listener = F::listen();
    let pool = Pool::new(LENGTH, 12).unwrap();
    let mut other = Other(
        Command::new(std::env::current_exe().unwrap())
            .args(["--exact", &format!("{}::the_other_process", F::NAME), "--ignored", "--nocapture"])
            .env(ADDRESS, listener.address().to_string())
            .stdout(Stdio::null())
            .spawn()
            .unwrap(),
    );
    let sizes = Sizes { buffer_len: LENGTH, ..Sizes::default() };
    let mut end = End::new(listener.accept(&mut |_| Some(setup(&pool, sizes, 4))).unwrap(), pool.clone());
    let told = end.next_of(Kind::Recv);
    let descriptor = RegionDescriptor::read_from_bytes(&told.buffer[..RegionDescriptor::SIZE]).unwrap();
    drop(told);
    let bytes = pattern(1, LENGTH);
    end.place(1, &bytes, descriptor);
    end.send(2, b"look");
    let answer = end.next_of(Kind::Recv);
    assert_eq!(&answer.buffer[..4], b"seen");
    drop(answer);
    end.fetch(3, descriptor);
    let fetched = end.next_of(Kind::Fetch);
    assert!(fetched.buffer[..] == bytes[..]);
    drop(fetched);
    // In the middle of more work than it will ever do.
    for token in 10..16 {
        end.place(token, &bytes, descriptor);
    }
    other.0.kill().unwrap();
    drive(&mut [&mut end], |ends| {
        ends[0].has_ended() && ends[0].pool.available() + ends[0].done.len() == ends[0].pool.capacity()
    });
    // The kernel may take a dead process's memory from the device before its queue pair.
    let why = end.channel.ended().unwrap();
    let was_memory = F::NAME == "verbs" && matches!(why, ChannelError::Transport(_));
    assert!(why == ChannelError::Disconnected || was_memory, "{why:?}");
    drop(end);
    assert_eq!(pool.available(), pool.capacity());
}

/// What the other process does; by itself, nothing.
pub(crate) fn other_process<F: Listening>() {
    let Ok(address) = std::env::var(ADDRESS) else { return };
    let address: SocketAddr = address.parse().unwrap();
    let pool = Pool::new(4096, 8).unwrap();
    let first: Setup = setup(&pool, Sizes::default(), 2);
    let channel: Box<dyn Channel> = F::connect(address, first).unwrap();
    let mut end = End::new(channel, pool);
    let registration = end.register(LENGTH, RemoteAccess::FetchAndPlace);
    end.send(1, registration.descriptor().as_bytes());
    let look = end.next_of(Kind::Recv);
    assert_eq!(&look.buffer[..4], b"look");
    assert!(bytes_of(registration.region(), 0, LENGTH) == pattern(1, LENGTH));
    end.send(2, b"seen");
    drive(&mut [&mut end], |ends| ends[0].has_ended());
}
