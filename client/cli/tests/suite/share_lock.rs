//! Share modes, locks and closing against the real server, where the data plane does what control has granted and no more.

use crate::common::load::Dice;
use crate::common::raw::{Claim, Raw};
use crate::common::{Deployment, transport_of, transports};
use holdfast_client::{
    Changes, Config, Disposition, Error, LockItem, LockKind, LockOptions, LockRange, Open, OpenOptions,
    Place, Region, Session, ShareMode, Status,
};
use holdfast_shared::types::{Access, RegionDescriptor};
use holdfast_shared::wire::data::{Flush, Io, Opcode};
use std::time::{Duration, Instant};

fn place(path: &str) -> Place {
    Place { volume: "data".into(), path: path.into() }
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

async fn connect(server: &Deployment) -> Session {
    Session::connect(&Config::load(&server.config()).unwrap()).await.unwrap()
}

async fn read_write(session: &Session, name: &str) -> Open {
    let options = OpenOptions::read_write().disposition(Disposition::OpenOrCreate, 0o644);
    session.open(&place(name), &options).await.unwrap()
}

fn lock(kind: LockKind, offset: u64, length: u64) -> [LockItem; 1] {
    [LockItem { range: LockRange::new(offset, length).unwrap(), kind }]
}

fn status<T>(result: Result<T, Error>) -> Option<Status> {
    result.err().map(|error| error.status().unwrap_or_else(|| panic!("{error:?}")))
}

/// Share modes are judged at control, whatever is bound: a bind adds no claim, and an unbind takes none away.
#[test]
fn opn_02_share_modes_are_the_same_with_bindings_and_without() {
    let server = Deployment::start();
    std::fs::write(server.volume().join("file"), "x").unwrap();
    runtime().block_on(async {
        let (first, second) = (connect(&server).await, connect(&server).await);
        let mut dice = Dice::new(0x02);
        for row in 0..200 {
            let mut bits = || u8::try_from(dice.below(8)).unwrap();
            let (access, share) = (Access::from_bits(bits()).unwrap(), ShareMode::from_bits(bits()).unwrap());
            let (wanted, given) = (Access::from_bits(bits()).unwrap(), ShareMode::from_bits(bits()).unwrap());
            let options = |access, share| OpenOptions::read().access(access).share(share);
            let one = first.open(&place("file"), &options(access, share)).await.unwrap();
            let conflict = holdfast_shared::types::conflicts((access, share), (wanted, given));
            let judge = async |when: &str| match second.open(&place("file"), &options(wanted, given)).await {
                Ok(open) => {
                    assert!(
                        !conflict,
                        "row {row}, {when}: {access:?} {share:?} against {wanted:?} {given:?}"
                    );
                    open.close().await.unwrap();
                }
                refused => {
                    assert!(conflict, "row {row}, {when}: {access:?} {share:?} against {wanted:?} {given:?}");
                    assert_eq!(status(refused), Some(Status::ShareConflict), "row {row}, {when}");
                }
            };
            judge("unbound").await;
            // The right to remove the name is control's affair: a channel is bound for bytes.
            let bytes = access.intersection(Access::READ | Access::WRITE);
            if bytes.is_empty() {
                one.close().await.unwrap();
                continue;
            }
            let channel = one.connect(transport_of("auto")).await.unwrap();
            let binding = one.bind_with_access(&channel, bytes).await.unwrap();
            judge("bound").await;
            binding.unbind().await.unwrap();
            judge("no longer bound").await;
            one.close().await.unwrap();
        }
    });
}

/// An open for reading changes nothing, on either plane.
#[test]
fn opn_04_an_open_for_reading_changes_nothing() {
    let server = Deployment::start();
    let file = server.volume().join("file");
    std::fs::write(&file, vec![7; 10_000]).unwrap();
    let before = std::fs::metadata(&file).unwrap().modified().unwrap();
    for kind in transports() {
        runtime().block_on(async {
            let session = connect(&server).await;
            let open = session.open(&place("file"), &OpenOptions::read()).await.unwrap();
            let (grant, secret) = (open.grant(), open.bind_secret());
            // No channel gets more than the open has.
            for access in [Access::WRITE, Access::READ | Access::WRITE, Access::ALL] {
                let mut raw = Raw::connect(kind, &grant);
                let claim = raw.claim(&grant, &secret);
                let refused = raw.bind(&Claim { access, ..claim }).0.err();
                assert!(
                    matches!(refused, Some(Status::AccessDenied | Status::Invalid)),
                    "{kind}: {refused:?}"
                );
            }
            let mut raw = Raw::connect(kind, &grant);
            let claim = raw.claim(&grant, &secret);
            let bound = raw.bind(&claim).0.unwrap();
            let region = raw.region();
            let io = |length: u32, region| Io {
                offset: 0.into(),
                length: length.into(),
                reserved: 0.into(),
                region,
            };
            raw.frame(Opcode::Write, bound.binding, &io(1, RegionDescriptor::NONE), b"x", &bound.key);
            assert_eq!(raw.reply().status.get(), Status::AccessDenied.number(), "{kind}: inline");
            raw.frame(Opcode::Write, bound.binding, &io(8192, region), b"", &bound.key);
            assert_eq!(raw.reply().status.get(), Status::AccessDenied.number(), "{kind}: fetched");
            // A flush makes durable what others wrote, and changes nothing either.
            raw.frame(Opcode::Flush, bound.binding, &Flush { reserved: 0.into() }, b"", &bound.key);
            let flushed = Status::from_number(raw.reply().status.get());
            assert!(matches!(flushed, Some(Status::Ok | Status::AccessDenied)), "{kind}: {flushed:?}");
            let shorter = Changes { size: Some(5), ..Changes::default() };
            assert_eq!(status(open.set_attributes(&shorter).await), Some(Status::AccessDenied), "{kind}");
            open.close().await.unwrap();
        });
    }
    assert_eq!(std::fs::read(&file).unwrap(), vec![7; 10_000]);
    assert_eq!(std::fs::metadata(&file).unwrap().modified().unwrap(), before);
}

/// A close is answered when everything under way on all channels has ended: nothing lands afterwards.
#[test]
fn opn_08_a_close_waits_for_what_is_under_way() {
    let server = Deployment::start();
    for kind in transports() {
        runtime().block_on(async {
            let session = connect(&server).await;
            for round in 0..10_u8 {
                let open = read_write(&session, "file").await;
                let mut bindings = Vec::new();
                for _ in 0..2 {
                    let channel = open.connect(transport_of(kind)).await.unwrap();
                    bindings.push(open.bind(&channel).await.unwrap());
                }
                const LENGTH: usize = 256 << 10;
                let region = Region::allocate(LENGTH).unwrap();
                region.copy_in(0, &vec![round + 1; LENGTH]).unwrap();
                let mut flying = Vec::new();
                for n in 0..64_u64 {
                    let binding = &bindings[usize::try_from(n % 2).unwrap()];
                    let length = LENGTH.min(binding.piece_max());
                    flying.push(binding.submit_write(&region, 0..length, n * LENGTH as u64).await.unwrap());
                }
                open.close().await.unwrap();
                let seen = || std::fs::read(server.volume().join("file")).unwrap();
                let at_close = seen();
                assert!(bindings[0].read_vec(0, 10).await.is_err(), "{kind}: a handle outlived its open");
                tokio::time::sleep(Duration::from_millis(100)).await;
                assert!(seen() == at_close, "{kind}: something landed after the close was answered");
                // What was acknowledged is there, and what is not was refused.
                for (n, one) in flying.into_iter().enumerate() {
                    if let Ok(count) = one.await {
                        let at = n * LENGTH;
                        assert!(
                            at_close[at..at + count].iter().all(|&b| b == round + 1),
                            "{kind}: write {n} is lost"
                        );
                    }
                }
            }
        });
    }
    server.until("everything closed", |g| g["control.opens"] == 0 && g["dataplane.bindings"] == 0);
}

/// One lock table for both planes: a lock is the open's, and what it forbids others is refused on their channels.
#[test]
fn lck_02_a_lock_counts_on_both_planes() {
    let server = Deployment::start();
    std::fs::write(server.volume().join("file"), vec![7; 100_000]).unwrap();
    for kind in transports() {
        runtime().block_on(async {
            let (mine, theirs) = (connect(&server).await, connect(&server).await);
            let (one, two) = (read_write(&mine, "file").await, read_write(&theirs, "file").await);
            let a = one.bind(&one.connect(transport_of(kind)).await.unwrap()).await.unwrap();
            let b = two.bind(&two.connect(transport_of(kind)).await.unwrap()).await.unwrap();
            let region = Region::allocate(4096).unwrap();
            one.lock(&lock(LockKind::Exclusive, 1000, 500), LockOptions::default()).await.unwrap();
            let other = two.lock(&lock(LockKind::Exclusive, 1499, 1), LockOptions::default()).await;
            assert_eq!(status(other), Some(Status::LockNotGranted), "{kind}");
            // The owner's handles are all equal before it, those of others are not.
            assert_eq!(a.read_at(&region, 0..100, 1000).await.unwrap(), 100);
            assert_eq!(a.write_at(&region, 0..100, 1000).await.unwrap(), 100);
            for at in [901, 1000, 1499] {
                assert_eq!(
                    status(b.read_at(&region, 0..100, at).await),
                    Some(Status::LockConflict),
                    "{kind}: {at}"
                );
                assert_eq!(
                    status(b.write_at(&region, 0..100, at).await),
                    Some(Status::LockConflict),
                    "{kind}: {at}"
                );
            }
            for at in [0, 900, 1500] {
                assert_eq!(b.read_at(&region, 0..100, at).await.unwrap(), 100, "{kind}: {at}");
            }
            // A binding made later knows the rules too.
            let late = two.bind(&two.connect(transport_of(kind)).await.unwrap()).await.unwrap();
            assert_eq!(status(late.read_at(&region, 0..1, 1200).await), Some(Status::LockConflict), "{kind}");
            one.unlock(0, &[LockRange::new(1000, 500).unwrap()]).await.unwrap();
            assert_eq!(b.write_at(&region, 0..100, 1000).await.unwrap(), 100, "{kind}: unlocked");
            two.lock(&lock(LockKind::Shared, 1499, 1), LockOptions::default()).await.unwrap();
            assert_eq!(a.read_at(&region, 0..1, 1499).await.unwrap(), 1, "{kind}: locked shared");
            assert_eq!(status(a.write_at(&region, 0..1, 1499).await), Some(Status::LockConflict), "{kind}");
            one.close().await.unwrap();
            two.close().await.unwrap();
        });
    }
}

/// A write inside a lock is held up by its client, who does not give the bytes away. The unlock is not answered before
/// that write has ended; and when the client gives them at last, they change nothing.
#[test]
fn lck_09_an_unlock_waits_for_writes_under_the_lock() {
    let server = Deployment::start();
    std::fs::write(server.volume().join("file"), vec![7; 100_000]).unwrap();
    // Over verbs the device gives the bytes away by itself, whatever its client does: there is nothing to hold up.
    runtime().block_on(async {
        let (mine, theirs) = (connect(&server).await, connect(&server).await);
        let (one, two) = (read_write(&mine, "file").await, read_write(&theirs, "file").await);
        let range = LockRange::new(0, 65_536).unwrap();
        one.lock(&lock(LockKind::Exclusive, 0, 65_536), LockOptions::default()).await.unwrap();
        let (grant, secret) = (one.grant(), one.bind_secret());
        let mut raw = Raw::connect("tcp", &grant);
        let claim = raw.claim(&grant, &secret);
        let bound = raw.bind(&Claim { access: Access::READ | Access::WRITE, ..claim }).0.unwrap();
        let io = Io { offset: 0.into(), length: 65_536.into(), reserved: 0.into(), region: raw.region() };
        raw.frame(Opcode::Write, bound.binding, &io, b"", &bound.key);
        let under_way = |g: &std::collections::BTreeMap<String, u64>| g["dataplane.requests_in_flight"] == 1;
        server.until("the write is under way", under_way);
        let start = Instant::now();
        one.unlock(0, &[range]).await.unwrap();
        println!("the unlock was answered after {} ms", start.elapsed().as_millis());
        server.until("the write has ended", |g| g["dataplane.requests_in_flight"] == 0);
        two.lock(&lock(LockKind::Exclusive, 0, 65_536), LockOptions::default()).await.unwrap();
        let before = std::fs::read(server.volume().join("file")).unwrap();
        // Now the client answers.
        raw.end();
        tokio::time::sleep(Duration::from_millis(300)).await;
        assert!(
            std::fs::read(server.volume().join("file")).unwrap() == before,
            "a late write landed under a new lock"
        );
        assert_eq!(before, vec![7; 100_000]);
        one.close().await.unwrap();
        two.close().await.unwrap();
    });
}
