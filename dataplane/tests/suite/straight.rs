//! File bytes that go straight between the page cache and the memory of a client on this host.

use crate::common::{Open, Rig, Told, eventually, pattern};
use holdfast_dataplane::engine::{FileIo, KernelFile};
use holdfast_shared::auth::MacPolicy;
use holdfast_shared::types::{Access, RegionDescriptor, Status};
use holdfast_shared::wire::data::Opcode;
use holdfast_shared::wire::link::Fence;
use holdfast_verbs::memory::{IN_MEMORY, Nowait, PeerBytes, pread_nowait};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

const LENGTH: usize = 3 << 20;
const STRAIGHT: &str = "pieces_straight_total";

/// True if the file's own file system says what it can do without waiting: others go through a buffer.
fn says_what_is_cached(open: &Open) -> bool {
    let kind = rustix::fs::fstatfs(&*open.file).unwrap().f_type;
    IN_MEMORY.contains(&kind) || pread_nowait(open.file.as_fd(), &mut [0], 0).unwrap() != Nowait::Unsupported
}

#[test]
fn bytes_pass_no_buffer_unless_something_must_be_done_with_them() {
    for (policy, goes) in [
        (MacPolicy::None, true),
        (MacPolicy::Header, true),
        (MacPolicy::Payload, false),
        (MacPolicy::Sealed, false),
    ] {
        let rig = Rig::new();
        let content = pattern(LENGTH, 5);
        let open = rig.control.open(&content, Access::ALL, policy);
        let mut client = rig.local_client();
        let binding = client.bind(&open).unwrap();
        let (status, data) = client.read(binding, 10, 70_000);
        assert_eq!(status, Status::Ok);
        assert!(data == content[10..70_010], "{policy:?}");
        let data = pattern(50_000, 6);
        assert_eq!(client.write(binding, 100, &data), (Status::Ok, 50_000));
        assert!(open.content()[100..50_100] == data);
        assert_eq!(rig.gauge(STRAIGHT) > 0, goes && says_what_is_cached(&open), "{policy:?}");
        assert_eq!(rig.gauge("buffers_free"), rig.gauge("buffers_total"));
    }
}

#[test]
fn long_reads_go_piece_by_piece_and_end_where_the_file_does() {
    let rig = Rig::with(|settings| settings.engine.buffer_bytes = 64 << 10);
    let content = pattern(LENGTH, 7);
    let open = rig.control.open(&content, Access::ALL, MacPolicy::Header);
    let mut client = rig.local_client();
    let binding = client.bind(&open).unwrap();
    let (status, data) = client.read(binding, 0, 4 << 20);
    assert_eq!((status, data.len()), (Status::Ok, LENGTH));
    assert!(data == content);
    if says_what_is_cached(&open) {
        assert_eq!(rig.gauge(STRAIGHT), LENGTH as u64 / (64 << 10) + 1, "with the one that met the end");
    }
    // Past the end, and nothing behind the count is touched.
    client.region().zero(0..1000).unwrap();
    assert_eq!(client.read(binding, LENGTH as u64 - 10, 500), (Status::Ok, content[LENGTH - 10..].to_vec()));
    let mut behind = [1; 990];
    client.region().copy_out(10, &mut behind).unwrap();
    assert!(behind == [0; 990]);
    assert_eq!(client.read(binding, LENGTH as u64, 500), (Status::Ok, Vec::new()));
}

#[test]
fn memory_that_was_not_given_is_not_reached() {
    let rig = Rig::new();
    let open = rig.open(&pattern(LENGTH, 8));
    let mut client = rig.local_client();
    let binding = client.bind(&open).unwrap();
    let known = client.descriptor();
    let unknown = RegionDescriptor::new(known.address(), known.rkey() ^ 1, 4096);
    client.send_io(Opcode::Read, binding, 0, 4096, unknown);
    eventually("the client ends the channel", || {
        client.pump();
        client.channel.ended().is_some()
    });
    assert_eq!(rig.gauge(STRAIGHT), 0);
}

#[test]
fn a_fenced_binding_moves_nothing() {
    let rig = Rig::new();
    let open = rig.open(&pattern(LENGTH, 9));
    let mut client = rig.local_client();
    let binding = client.bind(&open).unwrap();
    assert_eq!(client.read(binding, 0, 4096).0, Status::Ok);
    let before = rig.gauge(STRAIGHT);
    let fence = Fence { binding: rig.control.last(), epoch: 5, reason: Status::Fenced };
    rig.engine.fence(fence);
    eventually("the fence is confirmed", || rig.control.told().contains(&Told::Fenced(fence)));
    client.region().copy_in(0, &[0xC5; 4096]).unwrap();
    assert_eq!(client.read(binding, 0, 4096).0, Status::Fenced);
    assert_eq!(client.write(binding, 0, &[1; 8192]).0, Status::Fenced);
    let mut there = [0; 4096];
    client.region().copy_out(4096, &mut there).unwrap();
    assert_eq!(rig.gauge(STRAIGHT), before);
    assert!(open.content() == pattern(LENGTH, 9));
}

/// A file of which only the first bytes can be moved without waiting; then it would wait, or fails.
struct Halting {
    file: KernelFile,
    fails: bool,
}

const AT_ONCE: usize = 1000;

impl Halting {
    fn halt(&self, done: usize, first: impl FnOnce() -> io::Result<()>) -> io::Result<Nowait> {
        match done {
            0 => first().map(|()| Nowait::Done(AT_ONCE)),
            _ if self.fails => Err(io::Error::from_raw_os_error(5)),
            _ => Ok(Nowait::WouldBlock),
        }
    }
}

impl FileIo for Halting {
    fn read_now(&self, _: &mut [u8], _: u64) -> io::Result<Nowait> {
        Ok(Nowait::WouldBlock)
    }
    fn write_now(&self, _: &[u8], _: u64) -> io::Result<Nowait> {
        Ok(Nowait::WouldBlock)
    }
    fn read_into_now(&self, to: PeerBytes<'_>, done: usize, at: u64) -> io::Result<Nowait> {
        self.halt(done, || {
            let mut bytes = [0; AT_ONCE];
            self.file.read(&mut bytes, at)?;
            to.store(&bytes)
        })
    }
    fn write_from_now(&self, from: PeerBytes<'_>, done: usize, at: u64) -> io::Result<Nowait> {
        self.halt(done, || {
            let mut bytes = [0; AT_ONCE];
            from.load(&mut bytes)?;
            self.file.write(&bytes, at).map(|_| ())
        })
    }
    fn read(&self, data: &mut [u8], at: u64) -> io::Result<usize> {
        self.file.read(data, at)
    }
    fn write(&self, data: &[u8], at: u64) -> io::Result<usize> {
        self.file.write(data, at)
    }
    fn sync(&self, data_only: bool) -> io::Result<()> {
        self.file.sync(data_only)
    }
    fn descriptor(&self) -> BorrowedFd<'_> {
        self.file.descriptor()
    }
}

#[test]
fn what_would_wait_half_way_goes_on_through_a_buffer() {
    for fails in [false, true] {
        let opener = Arc::new(move |fd, direct| -> Arc<dyn FileIo> {
            Arc::new(Halting { file: KernelFile::with_direct(fd, direct), fails })
        });
        let rig = Rig::with_files(|settings| settings.engine.buffer_bytes = 16 << 10, opener);
        let content = pattern(100_000, 3);
        let open = rig.control.open(&content, Access::ALL, MacPolicy::Header);
        let mut client = rig.local_client();
        let binding = client.bind(&open).unwrap();
        let (status, data) = client.read(binding, 7, 60_000);
        assert_eq!(status, Status::Ok);
        assert!(data == content[7..60_007]);
        let (status, data) = client.read(binding, 90_000, 50_000);
        assert_eq!((status, data.len()), (Status::Ok, 10_000), "to the end");
        let data = pattern(60_000, 4);
        assert_eq!(client.write(binding, 5, &data), (Status::Ok, 60_000));
        assert!(open.content()[5..60_005] == data);
        assert_eq!(rig.gauge(STRAIGHT), 0, "none went all the way");
        assert_eq!(rig.gauge("buffers_free"), rig.gauge("buffers_total"));
    }
}
