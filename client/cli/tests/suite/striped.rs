//! One open over several channels against the real server: the load is spread, the bytes are right, and an application does
//! not notice a channel that goes, as long as one lives; nor that all go, if the data plane comes back.

use crate::common::{DEADLINE, Deployment, cut, cut_some, pattern, transport_of, transports};
use holdfast_client::{
    Config, Disposition, Error, Open, OpenOptions, Place, RAILS_MAX, Region, Session, ShareMode, Stripes,
};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::time::{Duration, Instant};
use tokio::task::JoinSet;

const UNIT: usize = 64 << 10;

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

async fn new_file(server: &Deployment, name: &str) -> (Session, Open) {
    let session = Session::connect(&Config::load(&server.config()).unwrap()).await.unwrap();
    let options =
        OpenOptions::read_write().disposition(Disposition::OpenOrCreate, 0o644).share(ShareMode::ALL);
    let place = Place { volume: "data".into(), path: name.into() };
    let open = session.open(&place, &options).await.unwrap();
    (session, open)
}

async fn striped(open: &Open, kind: &str, count: usize) -> Stripes {
    let stripes = Stripes::new(open).unwrap().with_unit(UNIT);
    for _ in 0..count {
        stripes.connect(transport_of(kind)).await.unwrap();
    }
    stripes
}

fn region(bytes: &[u8]) -> Region {
    let region = Region::allocate(bytes.len()).unwrap();
    region.copy_in(0, bytes).unwrap();
    region
}

fn bytes(region: &Region, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    region.copy_out(0, &mut bytes).unwrap();
    bytes
}

async fn until(what: &str, shown: impl Fn() -> bool) {
    let start = Instant::now();
    while !shown() {
        assert!(start.elapsed() < DEADLINE, "never: {what}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

/// Writers of blocks of their own, each longer than a stripe unit; each write is read back and looked at.
struct Load {
    tasks: JoinSet<Result<(), String>>,
    stop: Arc<AtomicBool>,
    rounds: Arc<AtomicU64>,
}

impl Load {
    const WRITERS: u64 = 4;
    const BLOCK: usize = 5 * UNIT + 77;

    fn start(stripes: &Stripes) -> Self {
        let (stop, rounds) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let mut tasks = JoinSet::new();
        for writer in 0..Self::WRITERS {
            let (stripes, stop, rounds) = (stripes.clone(), Arc::clone(&stop), Arc::clone(&rounds));
            tasks.spawn(async move {
                let (from, to) =
                    (Region::allocate(Self::BLOCK).unwrap(), Region::allocate(Self::BLOCK).unwrap());
                let at = writer * Self::BLOCK as u64;
                for round in 0.. {
                    let written = pattern(writer << 32 | round, Self::BLOCK);
                    from.copy_in(0, &written).unwrap();
                    stripes.write_all(&from, 0..Self::BLOCK, at).await.map_err(|e| format!("write: {e}"))?;
                    let count =
                        stripes.read_at(&to, 0..Self::BLOCK, at).await.map_err(|e| format!("read: {e}"))?;
                    if bytes(&to, count) != written {
                        return Err(format!("writer {writer}, round {round}: other bytes, {count} of them"));
                    }
                    rounds.fetch_add(1, SeqCst);
                    if stop.load(SeqCst) {
                        break;
                    }
                }
                Ok(())
            });
        }
        Self { tasks, stop, rounds }
    }

    /// Waits for so many more rounds: all that was begun before is over by then.
    async fn goes_on(&mut self) {
        let least = self.rounds.load(SeqCst) + 4 * Self::WRITERS;
        let start = Instant::now();
        while self.rounds.load(SeqCst) < least {
            if let Some(ended) = self.tasks.try_join_next() {
                panic!("a writer ended: {:?}", ended.unwrap());
            }
            assert!(start.elapsed() < DEADLINE, "the load does not go on");
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    async fn stop(mut self) {
        self.stop.store(true, SeqCst);
        while let Some(ended) = tokio::time::timeout(DEADLINE, self.tasks.join_next()).await.unwrap() {
            ended.unwrap().unwrap();
        }
    }
}

#[test]
fn the_load_is_spread_over_the_channels_and_the_bytes_are_right() {
    for kind in transports() {
        let server = Deployment::start();
        runtime().block_on(async {
            let (_session, open) = new_file(&server, "spread").await;
            let stripes = striped(&open, kind, 4).await;
            let gauges = server.gauges();
            assert_eq!((gauges["dataplane.channels"], gauges["dataplane.bindings"]), (4, 4));
            let written = pattern(1, 16 << 20 | 77);
            let from = region(&written);
            stripes.write_all(&from, 0..written.len(), 5).await.unwrap();
            stripes.flush().await.unwrap();
            assert_eq!(server.gauges()["dataplane.requests_flush_total"], 1, "one flush covers all handles");
            assert!(std::fs::read(server.volume().join("spread")).unwrap()[5..] == written);
            // Long, short, beyond the end, and of nothing.
            for (offset, length) in
                [(5, 16 << 20), (5 + UNIT + 3, 10), (16 << 20, 4 << 20), (17 << 20, UNIT * 3), (0, 0)]
            {
                let to = Region::allocate(length.max(1)).unwrap();
                let count = stripes.read_at(&to, 0..length, offset as u64).await.unwrap();
                let expected = written.get(offset - offset.min(5)..).unwrap_or_default();
                if offset >= 5 {
                    assert_eq!(count, expected.len().min(length), "{length} from {offset}");
                    assert!(bytes(&to, count) == expected[..count], "{length} from {offset}");
                }
            }
            let rails = stripes.rails();
            let all: u64 = rails.iter().map(|rail| rail.bytes_moved).sum();
            assert!(all >= 32 << 20, "{rails:?}");
            for rail in &rails {
                assert!(rail.live && rail.bytes_under_way == 0 && rail.bytes_moved > all / 16, "{rails:?}");
            }
            stripes.unbind().await.unwrap();
            assert!(stripes.read_at(&from, 0..1, 0).await.is_err(), "given back");
            server.until("all is given back", |gauges| gauges["dataplane.bindings"] == 0);
        });
    }
}

/// Without control no binding comes back and no write can be settled: what goes on goes by the channels that live.
#[test]
fn reads_of_a_broken_channel_go_to_the_others_at_once() {
    let server = Deployment::start();
    runtime().block_on(async {
        let (_session, open) = new_file(&server, "reads").await;
        let stripes = striped(&open, "tcp", 3).await;
        let written = pattern(2, 24 * UNIT);
        let from = region(&written);
        stripes.write_all(&from, 0..written.len(), 0).await.unwrap();
        let epoch = open.epoch();
        let to = Region::allocate(written.len()).unwrap();
        crate::common::freeze(server.control_pid);
        for left in [2, 1] {
            // Under way on all of them when one breaks.
            crate::common::freeze(server.dataplane_pid);
            let read = tokio::spawn({
                let (stripes, to, length) = (stripes.clone(), to.clone(), written.len());
                async move { stripes.read_at(&to, 0..length, 0).await }
            });
            let busy = || stripes.rails().iter().filter(|rail| rail.bytes_under_way > 0).count();
            until("reads are under way on each channel", || busy() == left + 1).await;
            assert_eq!(cut_some(std::process::id(), server.port() + 1, 1), 1);
            crate::common::thaw(server.dataplane_pid);
            assert_eq!(read.await.unwrap().unwrap(), written.len());
            assert!(bytes(&to, written.len()) == written);
            until("it has dropped out", || stripes.rails().iter().filter(|rail| rail.live).count() == left)
                .await;
            stripes.flush().await.unwrap();
        }
        crate::common::thaw(server.control_pid);
        until("they are back", || stripes.rails().iter().all(|rail| rail.live)).await;
        let before: Vec<u64> = stripes.rails().iter().map(|rail| rail.bytes_moved).collect();
        stripes.read_at(&to, 0..written.len(), 0).await.unwrap();
        let after = stripes.rails();
        assert!(after.iter().zip(&before).all(|(rail, before)| rail.bytes_moved > *before), "{after:?}");
        assert_eq!(open.epoch(), epoch, "reads need no fence");
    });
}

#[test]
fn a_load_does_not_notice_channels_that_are_cut_one_by_one() {
    let server = Deployment::start();
    runtime().block_on(async {
        let (_session, open) = new_file(&server, "cut").await;
        let stripes = striped(&open, "tcp", 3).await;
        let mut load = Load::start(&stripes);
        for _ in 0..12 {
            load.goes_on().await;
            assert_eq!(cut_some(std::process::id(), server.port() + 1, 1), 1);
        }
        // All at once, and the connection to control with them.
        cut(std::process::id(), server.port() + 1);
        cut(std::process::id(), server.port());
        load.goes_on().await;
        until("all are back", || stripes.rails().iter().all(|rail| rail.live)).await;
        load.stop().await;
        stripes.flush().await.unwrap();
    });
}

#[test]
fn a_load_does_not_notice_a_data_plane_that_is_killed() {
    for kind in transports() {
        let mut server = Deployment::start();
        runtime().block_on(async {
            let (_session, open) = new_file(&server, "killed").await;
            let stripes = striped(&open, kind, 3).await;
            let mut load = Load::start(&stripes);
            for planes in [[false, true], [false, true], [true, true]] {
                load.goes_on().await;
                server.kill(planes);
                tokio::task::block_in_place(|| server.await_planes());
                load.goes_on().await;
            }
            load.stop().await;
            until("all are back", || stripes.rails().iter().all(|rail| rail.live)).await;
            stripes.flush().await.unwrap();
        });
    }
}

#[test]
fn channels_join_and_leave_under_load() {
    for kind in transports() {
        let server = Deployment::start();
        runtime().block_on(async {
            let (_session, open) = new_file(&server, "join").await;
            let stripes = striped(&open, kind, 1).await;
            let first = open.connect(transport_of(kind)).await.unwrap();
            stripes.add(&first).await.unwrap();
            let mut load = Load::start(&stripes);
            load.goes_on().await;
            let last = stripes.connect(transport_of(kind)).await.unwrap();
            load.goes_on().await;
            until("the new one has work", || stripes.rails()[2].bytes_moved > 0).await;
            // Closed for good: left out.
            for (channel, left) in [(first, 2), (last, 1)] {
                channel.close();
                load.goes_on().await;
                until("it is left out", || stripes.rails().len() == left).await;
            }
            load.stop().await;
            let one = Region::allocate(1).unwrap();
            assert_eq!(stripes.read_at(&one, 0..1, 0).await.unwrap(), 1);
        });
    }
}

#[test]
fn without_a_channel_requests_fail_and_say_so() {
    let server = Deployment::start();
    runtime().block_on(async {
        let (_session, open) = new_file(&server, "none").await;
        let one = Region::allocate(1).unwrap();
        let none = Stripes::new(&open).unwrap();
        assert!(matches!(none.read_at(&one, 0..1, 0).await, Err(Error::Ended { what: "channel", .. })));
        assert!(matches!(open.stripes(transport_of("tcp"), 0).await, Err(Error::Usage(_))));
        let stripes = open.stripes(transport_of("tcp"), 2).await.unwrap();
        let third = stripes.connect(transport_of("tcp")).await.unwrap();
        for _ in 3..RAILS_MAX {
            stripes.add(&third).await.unwrap();
        }
        assert!(matches!(stripes.add(&third).await, Err(Error::Usage(_))), "at a limit");
        // The open is closed: nobody waits for channels that come back.
        open.close().await.unwrap();
        let error = stripes.write_at(&one, 0..1, 0).await.unwrap_err();
        assert!(!matches!(error, Error::TimedOut { .. }), "{error}");
    });
}
