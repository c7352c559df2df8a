//! Pages of a file that a peer reads: what it may, what it sees, and that nothing is served after they are withdrawn.

use std::fs::File;
use std::io::Write;
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd};

use parking_lot::MutexGuard;

use crate::common::{End, pair, rdma};
use holdfast_verbs::memory::FileMapping;
use holdfast_verbs::{Device, FileRegistration, Operation, Remote, Status, VerbsError, gauges};

const LENGTH: usize = 64 << 10;

/// A file in memory, and the same one open for reading alone.
fn files(byte: u8) -> (File, File) {
    let file = File::from(rustix::fs::memfd_create("mapping-test", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
    rustix::io::pwrite(&file, &vec![byte; LENGTH], 0).unwrap();
    let reader = File::open(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap();
    (file, reader)
}

/// As [`rdma`]; `None` also on a kernel that pins no read-only mappings, which is not one from 6.12 on.
fn rdma_and_files() -> Option<(MutexGuard<'static, ()>, SocketAddr)> {
    let (alone, address) = rdma()?;
    if FileRegistration::is_possible(&Device::list().unwrap()[0]).unwrap() {
        return Some((alone, address));
    }
    let name = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let mut numbers = name.split(['.', '-']).map(|n| n.parse().unwrap_or(0));
    assert!((numbers.next(), numbers.next()) < (Some(6), Some(12)), "{name}");
    let _ = writeln!(std::io::stderr(), "skipped: this kernel pins no read-only mappings of files");
    None
}

/// Reads `length` bytes at `offset` of what is registered into the client's region.
fn read(client: &mut End, registered: (u64, u32), offset: u64, length: usize) -> Result<Vec<u8>, Status> {
    client.region.zero(0..length).unwrap();
    let remote = Remote { addr: registered.0.wrapping_add(offset), rkey: registered.1 };
    let request = client.region_request(1, Operation::Read(remote), 0..length);
    client.post(request);
    match client.next().status {
        Status::Success => Ok(client.region_bytes(0, length)),
        failed => Err(failed),
    }
}

#[test]
fn a_peer_reads_a_file_open_for_reading_as_it_changes_and_nothing_once_withdrawn() {
    let Some((_alone, address)) = rdma_and_files() else { return };
    let before = gauges();
    let (mut client, server) = pair(address, 0);
    let (file, reader) = files(b'a');
    let mapping = FileMapping::new(reader.as_fd(), 100, 50_000).unwrap();
    let registration = FileRegistration::new(server.connection.domain(), mapping).unwrap();
    let named = (registration.addr(), registration.rkey());
    assert_eq!(read(&mut client, named, 0, 50_000).unwrap(), vec![b'a'; 50_000]);
    // The page cache is shared: what is written is seen.
    rustix::io::pwrite(&file, &[b'b'; 10], 100).unwrap();
    let seen = read(&mut client, named, 0, 20).unwrap();
    assert_eq!((&seen[..10], &seen[10..]), (&[b'b'; 10][..], &[b'a'; 10][..]));
    // A file that shrinks under it harms nobody: what is pinned is served.
    file.set_len(0).unwrap();
    assert_eq!(read(&mut client, named, 40_000, 100).unwrap(), vec![b'a'; 100]);
    registration.withdraw().unwrap();
    assert_eq!(read(&mut client, named, 0, 20), Err(Status::RemoteAccessError));
    drop((client, server));
    assert_eq!(gauges().pinned_bytes, before.pinned_bytes);
    assert_eq!(gauges().mapped_bytes, before.mapped_bytes);
}

#[test]
fn bytes_beside_the_range_are_not_served_and_none_may_be_written() {
    let Some((_alone, address)) = rdma_and_files() else { return };
    let (file, reader) = files(b'a');
    for (offset, write) in [(u64::MAX, false), (1000, false), (0, true)] {
        let (mut client, server) = pair(address, 0);
        let mapping = FileMapping::new(reader.as_fd(), 4096, 1000).unwrap();
        let registration = FileRegistration::new(server.connection.domain(), mapping).unwrap();
        let named = (registration.addr(), registration.rkey());
        if write {
            let request = client.request(1, Operation::Write(Remote { addr: named.0, rkey: named.1 }), b"x");
            client.post(request);
            assert_eq!(client.next().status, Status::RemoteAccessError);
        } else {
            assert_eq!(read(&mut client, named, offset, 1), Err(Status::RemoteAccessError), "at {offset}");
        }
    }
    let mut byte = [0];
    rustix::io::pread(&file, &mut byte, 4096).unwrap();
    assert_eq!(byte, *b"a");
}

#[test]
fn a_key_is_of_no_use_on_a_queue_pair_of_another_domain() {
    let Some((_alone, address)) = rdma_and_files() else { return };
    let (_owner, server) = pair(address, 0);
    let (mut stranger, _its_server) = pair(address, 0);
    let (_file, reader) = files(b'a');
    let mapping = FileMapping::new(reader.as_fd(), 0, 1000).unwrap();
    let registration = FileRegistration::new(server.connection.domain(), mapping).unwrap();
    let named = (registration.addr(), registration.rkey());
    assert_eq!(read(&mut stranger, named, 0, 1), Err(Status::RemoteAccessError));
}

#[test]
fn what_the_file_does_not_have_is_an_error_and_no_signal() {
    let Some((_alone, address)) = rdma_and_files() else { return };
    let (_client, server) = pair(address, 0);
    let (file, reader) = files(b'a');
    let mapping = FileMapping::new(reader.as_fd(), 0, LENGTH).unwrap();
    // The file shrinks after it was mapped, and before it is pinned.
    file.set_len(100).unwrap();
    let refused = FileRegistration::new(server.connection.domain(), mapping).unwrap_err();
    let VerbsError::Call { source, .. } = refused else { panic!("{refused}") };
    assert_eq!(source.raw_os_error(), Some(libc::EFAULT));
}
