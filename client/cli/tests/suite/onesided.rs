//! One-sided reads through the client library, from a server whose planes are processes of their own. Verbs alone: without
//! an RDMA device there is nothing to run.

use crate::common::{DEADLINE, Deployment, Wish, pattern, rdma_address};
use holdfast_client::{
    Binding, Changes, Config, Disposition, Error, LockItem, LockKind, LockOptions, LockRange, Mapping, Open,
    OpenOptions, Place, Region, Session, Status, Transport,
};
use holdfast_verbs::{Device, FileRegistration};
use std::time::Instant;

pub(crate) const SIZE: usize = 8 << 20;

pub(crate) fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

/// A server that grants mappings, and a file of it with that content.
pub(crate) fn server() -> Option<(Deployment, Vec<u8>)> {
    server_with(Wish { dataplane: "\n[map]\nenabled = true\n", ..Wish::default() })
}

/// The same with other wishes.
pub(crate) fn server_with(wish: Wish) -> Option<(Deployment, Vec<u8>)> {
    rdma_address()?;
    if Device::list().unwrap().iter().any(|device| !FileRegistration::is_possible(device).unwrap()) {
        eprintln!("skipped: this kernel pins no read-only mappings of files");
        return None;
    }
    let server = Deployment::with(&wish);
    let content = pattern(7, SIZE);
    std::fs::write(server.volume().join("f"), &content).unwrap();
    Some((server, content))
}

pub(crate) async fn bound(server: &Deployment, options: OpenOptions) -> (Open, Binding) {
    let session = Session::connect(&Config::load(&server.config()).unwrap()).await.unwrap();
    let place = Place { volume: "data".into(), path: "f".into() };
    let open = session.open(&place, &options.disposition(Disposition::Open, 0)).await.unwrap();
    let channel = open.connect(Transport::Verbs).await.unwrap();
    let binding = open.bind(&channel).await.unwrap();
    (open, binding)
}

pub(crate) fn bytes(region: &Region, range: std::ops::Range<usize>) -> Vec<u8> {
    let mut bytes = vec![0; range.len()];
    region.copy_out(range.start, &mut bytes).unwrap();
    bytes
}

async fn lost(mapping: &Mapping, region: &Region) -> bool {
    let since = Instant::now();
    loop {
        match mapping.read_at(region, 0..4096, mapping.offset()).await {
            Err(Error::MappingLost) => return !mapping.is_live(),
            Err(error) => panic!("{error}"),
            Ok(_) if since.elapsed() > DEADLINE => return false,
            Ok(_) => {}
        }
    }
}

#[test]
fn a_mapping_is_read_like_the_file_and_ends_with_its_binding() {
    let Some((server, content)) = server() else { return };
    runtime().block_on(async {
        // Open for reading alone: the kernel pins its pages all the same.
        let (open, binding) = bound(&server, OpenOptions::read()).await;
        let region = Region::allocate(SIZE).unwrap();
        let mapping = binding.map(4096..u64::MAX / 2).await.unwrap();
        assert_eq!((mapping.offset(), mapping.len()), (4096, (SIZE - 4096) as u64));
        assert_eq!(mapping.read_at(&region, 0..SIZE, 4096).await.unwrap(), SIZE - 4096);
        assert_eq!(bytes(&region, 0..SIZE - 4096), content[4096..]);
        assert_eq!(mapping.read_at(&region, 10..30, 5000).await.unwrap(), 20);
        assert_eq!(bytes(&region, 10..30), content[5000..5020]);
        assert_eq!(mapping.read_at(&region, 0..100, SIZE as u64 - 10).await.unwrap(), 10);
        assert_eq!(mapping.read_at(&region, 0..100, SIZE as u64).await.unwrap(), 0);
        assert!(matches!(mapping.read_at(&region, 0..100, 4095).await, Err(Error::Usage(_))));
        // Many at once, more than go together.
        let mut tasks = tokio::task::JoinSet::new();
        for n in 0..200usize {
            let (mapping, region, content) = (mapping.clone(), region.clone(), content.clone());
            tasks.spawn(async move {
                let (to, from) = (n * 4096..(n + 1) * 4096, 4096 + n * 8192);
                assert_eq!(mapping.read_at(&region, to.clone(), from as u64).await.unwrap(), 4096);
                assert_eq!(bytes(&region, to), content[from..from + 4096]);
            });
        }
        tasks.join_all().await;
        let requests = server.gauges()["dataplane.requests_read_total"];
        assert_eq!(requests, 0, "the data plane was asked to read");
        assert_eq!(server.gauges()["dataplane.mappings"], 1);
        mapping.unmap().await.unwrap();
        assert!(matches!(mapping.read_at(&region, 0..1, 4096).await, Err(Error::MappingLost)));
        assert_eq!(server.gauges()["dataplane.mappings"], 0);
        let second = binding.map(0..4096).await.unwrap();
        drop(binding.map(0..4096).await.unwrap());
        open.close().await.unwrap();
        assert!(lost(&second, &region).await);
        assert_eq!(server.gauges()["dataplane.mappings"], 0);
    });
}

#[test]
fn lck_01_a_lock_of_another_open_takes_the_mapping_back_before_it_is_granted() {
    let Some((server, content)) = server() else { return };
    runtime().block_on(async {
        let (_open, binding) = bound(&server, OpenOptions::read_write()).await;
        let (other, others) = bound(&server, OpenOptions::read_write()).await;
        let region = Region::allocate(1 << 20).unwrap();
        let mapping = binding.map(0..SIZE as u64).await.unwrap();
        assert_eq!(mapping.read_at(&region, 0..4096, 0).await.unwrap(), 4096);
        assert_eq!(bytes(&region, 0..4096), content[..4096]);
        let range = LockRange::new(4000, 1000).unwrap();
        let item = [LockItem { range, kind: LockKind::Exclusive }];
        other.lock(&item, LockOptions::default()).await.unwrap();
        // Granted: from now on what its owner writes is nobody's to see.
        let canary = Region::allocate(1000).unwrap();
        canary.copy_in(0, &[b'X'; 1000]).unwrap();
        others.write_all(&canary, 0..1000, 4000).await.unwrap();
        assert!(matches!(mapping.read_at(&region, 0..1 << 20, 0).await, Err(Error::MappingLost)));
        let refused = binding.map(0..SIZE as u64).await.unwrap_err();
        assert_eq!(refused.status(), Some(Status::LockConflict), "{refused}");
        assert_eq!(binding.read_at(&region, 0..100, 0).await.unwrap(), 100, "elsewhere it reads");
        other.unlock(0, &[range]).await.unwrap();
        let again = binding.map(0..SIZE as u64).await.unwrap();
        assert_eq!(again.read_at(&region, 0..1000, 4000).await.unwrap(), 1000);
        assert_eq!(bytes(&region, 0..1000), [b'X'; 1000]);
    });
}

#[test]
fn a_data_plane_that_is_killed_loses_the_mapping_and_grants_another() {
    let Some((server, content)) = server() else { return };
    runtime().block_on(async {
        let (_open, binding) = bound(&server, OpenOptions::read_write()).await;
        let region = Region::allocate(4096).unwrap();
        let mapping = binding.map(0..SIZE as u64).await.unwrap();
        crate::common::signal(server.dataplane_pid, rustix::process::Signal::KILL);
        assert!(lost(&mapping, &region).await);
        // It may be the dead one that is asked at first.
        let since = Instant::now();
        let again = loop {
            match binding.map(0..SIZE as u64).await {
                Ok(mapping) => break mapping,
                Err(error) => assert!(since.elapsed() < DEADLINE, "{error}"),
            }
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        };
        assert_eq!(again.read_at(&region, 0..4096, 8192).await.unwrap(), 4096);
        assert_eq!(bytes(&region, 0..4096), content[8192..8192 + 4096]);
    });
}

#[test]
fn a_server_that_has_it_switched_off_says_so() {
    if rdma_address().is_none() {
        return;
    }
    let server = Deployment::start();
    std::fs::write(server.volume().join("f"), b"content").unwrap();
    runtime().block_on(async {
        let (_open, binding) = bound(&server, OpenOptions::read()).await;
        let refused = binding.map(0..4096).await.unwrap_err();
        assert_eq!(refused.status(), Some(Status::Unsupported), "{refused}");
    });
}

/// Cut short by this handle, by another, and by an open that discards what is there: the answer means that nobody is served
/// what is gone.
#[test]
fn what_is_cut_short_through_the_server_is_served_to_nobody_once_that_is_answered() {
    let Some((server, content)) = server() else { return };
    runtime().block_on(async {
        let (open, binding) = bound(&server, OpenOptions::read_write()).await;
        let (other, _others) = bound(&server, OpenOptions::read_write()).await;
        let region = Region::allocate(SIZE).unwrap();
        for (n, by) in [&open, &other].into_iter().enumerate() {
            let length = 100_000 - n;
            let mapping = binding.map(0..SIZE as u64).await.unwrap();
            assert_eq!(mapping.read_at(&region, 0..4096, 0).await.unwrap(), 4096);
            let size = Changes { size: Some(length as u64), ..Changes::default() };
            assert_eq!(by.set_attributes(&size).await.unwrap().size, length as u64);
            assert!(matches!(mapping.read_at(&region, 0..4096, 0).await, Err(Error::MappingLost)), "{n}");
            let again = binding.map(0..SIZE as u64).await.unwrap();
            assert_eq!(again.len(), length as u64);
            assert_eq!(again.read_at(&region, 0..SIZE, 0).await.unwrap(), length);
            assert_eq!(bytes(&region, 0..length), content[..length]);
            // A change of something else takes nothing away.
            let mode = Changes { mode: Some(0o640), ..Changes::default() };
            by.set_attributes(&mode).await.unwrap();
            assert_eq!(again.read_at(&region, 0..100, 0).await.unwrap(), 100);
            std::fs::write(server.volume().join("f"), &content).unwrap();
        }
        let mapping = binding.map(0..SIZE as u64).await.unwrap();
        let session = Session::connect(&Config::load(&server.config()).unwrap()).await.unwrap();
        let place = Place { volume: "data".into(), path: "f".into() };
        let discard = OpenOptions::read_write().disposition(Disposition::Overwrite, 0);
        let _emptied = session.open(&place, &discard).await.unwrap();
        assert!(matches!(mapping.read_at(&region, 0..4096, 0).await, Err(Error::MappingLost)), "discarded");
        assert_eq!(server.gauges()["dataplane.mappings"], 0);
    });
}

/// A data plane that stands still may serve what is mapped: who wants to cut the file short waits, as long as it takes.
#[test]
fn a_change_of_size_waits_for_a_data_plane_that_stands_still_and_goes_on_when_it_is_dead() {
    let Some((server, _content)) = server() else { return };
    runtime().block_on(async {
        let (open, binding) = bound(&server, OpenOptions::read_write()).await;
        let _mapping = binding.map(0..SIZE as u64).await.unwrap();
        crate::common::signal(server.dataplane_pid, rustix::process::Signal::STOP);
        let size = Changes { size: Some(10), ..Changes::default() };
        let mut cut = Box::pin(open.set_attributes(&size));
        let early = tokio::time::timeout(std::time::Duration::from_millis(300), &mut cut).await;
        assert!(early.is_err(), "answered, while the data plane may serve what is gone");
        assert_eq!(std::fs::metadata(server.volume().join("f")).unwrap().len(), SIZE as u64);
        crate::common::signal(server.dataplane_pid, rustix::process::Signal::KILL);
        assert_eq!(cut.await.unwrap().size, 10);
    });
}
