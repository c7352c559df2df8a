//! Reads that become one-sided by themselves, with real processes: what a reader at full speed sees while others lock, cut
//! short, close and kill. Verbs alone: without an RDMA device there is nothing to run.

use super::onesided::{SIZE, bound, bytes, runtime, server, server_with};
use crate::common::{DEADLINE, Deployment, Wish, signal};
use holdfast_client::stream::Target;
use holdfast_client::{
    Binding, Changes, Config, Disposition, Error, LockItem, LockKind, LockOptions, LockRange, OneSided,
    OpenOptions, Place, Region, Session, Status, Transport,
};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::SeqCst};
use std::time::{Duration, Instant};

const READS: &str = "dataplane.requests_read_total";
const MAPPINGS: &str = "dataplane.mappings";
const BLOCK: usize = 4096;

/// Reads random blocks and compares them, until the server is not asked any more.
async fn until_one_sided(server: &Deployment, target: &Target, content: &[u8]) {
    let region = Region::allocate(BLOCK).unwrap();
    let since = Instant::now();
    let mut dice = 7u64;
    loop {
        let before = server.gauges()[READS];
        for _ in 0..200 {
            dice = dice.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let at = (dice >> 33) as usize % (content.len() - BLOCK);
            let count = target.read_at(&region, 0..BLOCK, at as u64).await.unwrap();
            assert!(count == BLOCK && bytes(&region, 0..BLOCK) == content[at..at + BLOCK], "at {at}");
        }
        let gauges = server.gauges();
        if gauges[READS] == before && gauges[MAPPINGS] > 0 {
            return;
        }
        assert!(since.elapsed() < DEADLINE, "the server is asked on and on: {gauges:?}");
    }
}

/// What a reader saw of one block.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Saw {
    Bytes(u8),
    /// So many only.
    Short(usize),
    Refused(Status),
    Gone,
}

/// Reads one block over and over, each time between two looks at the stage that the test has reached, and has what it saw
/// judged.
struct Reader {
    stage: Arc<AtomicUsize>,
    stop: Arc<AtomicBool>,
    rounds: Arc<AtomicU64>,
    task: tokio::task::JoinHandle<()>,
}

impl Reader {
    /// `allowed`: may this be seen by a read that began and ended in these stages?
    fn start(binding: &Binding, at: u64, allowed: fn(Saw, usize, usize) -> bool) -> Self {
        let (stage, stop) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
        let rounds = Arc::new(AtomicU64::new(0));
        let (binding, region) = (binding.clone(), Region::allocate(BLOCK).unwrap());
        let (in_stage, until, count) = (Arc::clone(&stage), Arc::clone(&stop), Arc::clone(&rounds));
        let task = tokio::spawn(async move {
            while !until.load(SeqCst) {
                let begun = in_stage.load(SeqCst);
                let outcome = binding.read_at(&region, 0..BLOCK, at).await;
                let ended = in_stage.load(SeqCst);
                let saw = match outcome {
                    Ok(BLOCK) => {
                        let seen = bytes(&region, 0..BLOCK);
                        assert!(seen.iter().all(|byte| *byte == seen[0]), "torn, in {begun} to {ended}");
                        Saw::Bytes(seen[0])
                    }
                    Ok(short) => Saw::Short(short),
                    Err(Error::Refused(refusal)) if refusal.status == Status::LockConflict => {
                        Saw::Refused(Status::LockConflict)
                    }
                    Err(_) => Saw::Gone,
                };
                assert!(allowed(saw, begun, ended), "{saw:?} from stage {begun} to {ended}");
                count.fetch_add(1, SeqCst);
                tokio::task::yield_now().await;
            }
        });
        Self { stage, stop, rounds, task }
    }

    fn reach(&self, stage: usize) {
        self.stage.store(stage, SeqCst);
    }

    /// Waits for some more rounds.
    async fn goes_on(&self) {
        let (from, since) = (self.rounds.load(SeqCst), Instant::now());
        while self.rounds.load(SeqCst) < from + 20 {
            assert!(!self.task.is_finished() && since.elapsed() < DEADLINE, "the reader stands still");
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    /// Waits until it is read one-sided.
    async fn is_one_sided(&self, server: &Deployment) {
        let since = Instant::now();
        loop {
            let before = server.gauges()[READS];
            self.goes_on().await;
            let gauges = server.gauges();
            if gauges[READS] == before && gauges[MAPPINGS] > 0 {
                return;
            }
            assert!(since.elapsed() < DEADLINE, "the server is asked on and on: {gauges:?}");
        }
    }

    async fn end(self) {
        self.goes_on().await;
        self.stop.store(true, SeqCst);
        self.task.await.unwrap();
    }
}

/// A file of one byte, over and over.
fn plain(server: &Deployment, byte: u8) {
    std::fs::write(server.volume().join("f"), vec![byte; SIZE]).unwrap();
}

async fn writes(binding: &Binding, byte: u8, at: u64) {
    let region = Region::allocate(BLOCK).unwrap();
    region.copy_in(0, &[byte; BLOCK]).unwrap();
    binding.write_all(&region, 0..BLOCK, at).await.unwrap();
}

#[test]
fn a_hot_file_is_read_past_the_server_and_its_end_and_its_writes_are_true() {
    let Some((server, mut content)) = server() else { return };
    runtime().block_on(async {
        let (open, binding) = bound(&server, OpenOptions::read_write()).await;
        until_one_sided(&server, &(&binding).into(), &content).await;
        let region = Region::allocate(SIZE).unwrap();
        // Long, side by side, and with a request of its own each.
        assert_eq!(binding.read_at(&region, 0..SIZE - 1, 1).await.unwrap(), SIZE - 1);
        assert!(bytes(&region, 0..SIZE - 1) == content[1..]);
        let mut all = Vec::new();
        for n in 0..100usize {
            let (to, from) = (n * BLOCK..(n + 1) * BLOCK, (n * 70_001) as u64);
            all.push(binding.submit_read(&region, to, from).await.unwrap());
        }
        for (n, read) in all.into_iter().enumerate() {
            assert_eq!(read.await.unwrap(), BLOCK);
            assert!(bytes(&region, n * BLOCK..(n + 1) * BLOCK) == content[n * 70_001..n * 70_001 + BLOCK]);
        }
        // The end of the file is the server's to tell, also when it moves.
        let end = SIZE as u64;
        assert_eq!(binding.read_at(&region, 0..BLOCK, end - 10).await.unwrap(), 10);
        assert_eq!(binding.read_at(&region, 0..BLOCK, end).await.unwrap(), 0);
        writes(&binding, b'e', end).await;
        assert_eq!(binding.read_at(&region, 0..BLOCK, end - 10).await.unwrap(), BLOCK);
        assert_eq!(bytes(&region, 10..BLOCK), [b'e'; BLOCK - 10]);
        // What this handle wrote it reads, and so does who reads another.
        let (_other, others) = bound(&server, OpenOptions::read_write()).await;
        for n in 0..50u8 {
            let by = if n % 2 == 0 { &binding } else { &others };
            writes(by, n, 8192).await;
            assert_eq!(binding.read_at(&region, 0..BLOCK, 8192).await.unwrap(), BLOCK);
            assert_eq!(bytes(&region, 0..BLOCK), [n; BLOCK], "write {n}");
        }
        content[8192..8192 + BLOCK].fill(49);
        until_one_sided(&server, &(&binding).into(), &content).await;
        // Written all the time it is not worth it.
        for n in 0..200 {
            writes(&binding, n, 8192).await;
        }
        let since = Instant::now();
        while server.gauges()[MAPPINGS] > 0 {
            assert!(since.elapsed() < DEADLINE, "a mapping is kept, though it is written and not read");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        content[8192..8192 + BLOCK].fill(199);
        until_one_sided(&server, &(&binding).into(), &content).await;
        binding.unbind().await.unwrap();
        assert_eq!(server.gauges()[MAPPINGS], 0, "given back with the binding");
        let refused = binding.read_at(&region, 0..BLOCK, 0).await.unwrap_err();
        assert_eq!(refused.status(), Some(Status::NotBound), "{refused}");
        // Over several channels, and dropped.
        let stripes = open.stripes(Transport::Verbs, 2).await.unwrap();
        until_one_sided(&server, &(&stripes).into(), &content).await;
        stripes.unbind().await.unwrap();
        assert_eq!(server.gauges()[MAPPINGS], 0);
    });
}

/// Stages: 1 the lock is asked for, 2 granted, 3 given up, 4 that is answered.
#[test]
fn lck_01_while_a_hot_block_is_locked_by_another_its_reader_is_refused_and_never_sees_it() {
    let Some((server, _)) = server() else { return };
    plain(&server, b'a');
    runtime().block_on(async {
        let (_open, binding) = bound(&server, OpenOptions::read_write()).await;
        let (other, others) = bound(&server, OpenOptions::read_write()).await;
        let reader = Reader::start(&binding, 4 << 20, |saw, begun, ended| match saw {
            Saw::Bytes(b'a') => begun <= 1,
            Saw::Refused(_) => ended >= 1 && begun <= 3,
            Saw::Bytes(b'b') => ended >= 3,
            _ => false,
        });
        reader.is_one_sided(&server).await;
        let range = LockRange::new(4 << 20, BLOCK as u64).unwrap();
        reader.reach(1);
        let item = [LockItem { range, kind: LockKind::Exclusive }];
        other.lock(&item, LockOptions::default()).await.unwrap();
        reader.reach(2);
        assert_eq!(server.gauges()[MAPPINGS], 0, "granted, while it can be read");
        writes(&others, b'b', 4 << 20).await;
        reader.goes_on().await;
        reader.reach(3);
        other.unlock(0, &[range]).await.unwrap();
        reader.reach(4);
        reader.is_one_sided(&server).await;
        reader.end().await;
    });
}

/// Stages: 1 it is asked to be cut short, 2 it is, 3 it is being written there again, 4 that is answered.
#[test]
fn what_is_cut_short_ends_there_for_a_reader_at_full_speed() {
    let Some((server, _)) = server() else { return };
    plain(&server, b'a');
    runtime().block_on(async {
        let (_open, binding) = bound(&server, OpenOptions::read_write()).await;
        let (other, others) = bound(&server, OpenOptions::read_write()).await;
        let gone = Reader::start(&binding, 4 << 20, |saw, begun, ended| match saw {
            Saw::Bytes(b'a') => begun <= 1,
            Saw::Short(0) => ended >= 1 && begun <= 3,
            Saw::Bytes(b'b') => ended >= 3,
            _ => false,
        });
        let kept = Reader::start(&binding, 0, |saw, _, _| saw == Saw::Bytes(b'a'));
        gone.is_one_sided(&server).await;
        kept.is_one_sided(&server).await;
        gone.reach(1);
        let size = Changes { size: Some(1 << 20), ..Changes::default() };
        other.set_attributes(&size).await.unwrap();
        gone.reach(2);
        gone.goes_on().await;
        gone.reach(3);
        writes(&others, b'b', 4 << 20).await;
        gone.reach(4);
        kept.is_one_sided(&server).await;
        gone.is_one_sided(&server).await;
        gone.end().await;
        kept.end().await;
    });
}

#[test]
fn a_killed_data_plane_is_not_noticed_by_the_reader_of_a_hot_file() {
    let Some((mut server, _)) = server() else { return };
    plain(&server, b'a');
    runtime().block_on(async {
        let (_open, binding) = bound(&server, OpenOptions::read()).await;
        let reader = Reader::start(&binding, 4 << 20, |saw, _, _| saw == Saw::Bytes(b'a'));
        for _ in 0..2 {
            reader.is_one_sided(&server).await;
            server.kill_dataplane();
            server.await_planes();
            reader.goes_on().await;
        }
        reader.is_one_sided(&server).await;
        reader.end().await;
    });
}

/// Stages: 1 it is being closed, 2 it is.
#[test]
fn a_hot_file_is_read_no_more_once_its_open_is_closed() {
    let Some((server, _)) = server() else { return };
    plain(&server, b'a');
    runtime().block_on(async {
        let (open, binding) = bound(&server, OpenOptions::read()).await;
        let reader = Reader::start(&binding, 4 << 20, |saw, begun, ended| match saw {
            Saw::Bytes(b'a') => begun <= 1,
            Saw::Gone => ended >= 1,
            _ => false,
        });
        reader.is_one_sided(&server).await;
        reader.reach(1);
        open.close().await.unwrap();
        reader.reach(2);
        assert_eq!(server.gauges()[MAPPINGS], 0);
        reader.end().await;
        // Closed by force, which its client did not ask for.
        let (open, binding) = bound(&server, OpenOptions::read()).await;
        let reader = Reader::start(&binding, 4 << 20, |saw, begun, ended| match saw {
            Saw::Bytes(b'a') => begun <= 1,
            Saw::Gone => ended >= 1,
            _ => false,
        });
        reader.is_one_sided(&server).await;
        reader.reach(1);
        server.ok(&["opens", "--close", &open.id().to_string()]);
        reader.reach(2);
        reader.end().await;
    });
}

/// A file that another principal's open replaces: never the old bytes after the answer.
#[test]
fn a_file_that_is_discarded_is_empty_for_its_reader() {
    let Some((server, _)) = server() else { return };
    plain(&server, b'a');
    runtime().block_on(async {
        let (_open, binding) = bound(&server, OpenOptions::read()).await;
        let reader = Reader::start(&binding, 0, |saw, begun, ended| match saw {
            Saw::Bytes(b'a') => begun <= 1,
            Saw::Short(0) => ended >= 1,
            _ => false,
        });
        reader.is_one_sided(&server).await;
        let session = Session::connect(&Config::load(&server.config()).unwrap()).await.unwrap();
        let place = Place { volume: "data".into(), path: "f".into() };
        reader.reach(1);
        let discard = OpenOptions::read_write().disposition(Disposition::Overwrite, 0);
        let _emptied = session.open(&place, &discard).await.unwrap();
        reader.reach(2);
        reader.end().await;
    });
}

#[test]
fn the_application_has_the_last_mapping_if_it_wants_it() {
    let few = "\n[map]\nenabled = true\nchannel_mappings_max = 2\n";
    let Some((server, content)) = server_with(Wish { dataplane: few, ..Wish::default() }) else { return };
    runtime().block_on(async {
        let (_open, binding) = bound(&server, OpenOptions::read()).await;
        until_one_sided(&server, &(&binding).into(), &content).await;
        let first = binding.map(0..BLOCK as u64).await.unwrap();
        let mapping = binding.map(0..BLOCK as u64).await.unwrap();
        let region = Region::allocate(BLOCK).unwrap();
        assert_eq!(mapping.read_at(&region, 0..BLOCK, 0).await.unwrap(), BLOCK);
        assert_eq!(server.gauges()[MAPPINGS], 2);
        // There is none left to be had, and reads go on as ever.
        for n in 0..400usize {
            assert_eq!(binding.read_at(&region, 0..BLOCK, n as u64 * 512).await.unwrap(), BLOCK);
            assert!(bytes(&region, 0..BLOCK) == content[n * 512..n * 512 + BLOCK]);
        }
        assert_eq!(mapping.read_at(&region, 0..BLOCK, 0).await.unwrap(), BLOCK, "it was not taken back");
        mapping.unmap().await.unwrap();
        first.unmap().await.unwrap();
        until_one_sided(&server, &(&binding).into(), &content).await;
    });
}

#[test]
fn nothing_is_mapped_where_it_is_switched_off_or_could_not_be_protected() {
    let sealed =
        Wish { dataplane: "\n[map]\nenabled = true\n", mac_policy: Some("payload"), ..Wish::default() };
    let cases = [server(), server_with(sealed), server_with(Wish::default())];
    for (n, case) in cases.into_iter().enumerate() {
        let Some((server, content)) = case else { return };
        runtime().block_on(async {
            let mut config = Config::load(&server.config()).unwrap();
            if n == 0 {
                config.one_sided = OneSided::Off;
            }
            let session = Session::connect(&config).await.unwrap();
            let place = Place { volume: "data".into(), path: "f".into() };
            let open = session.open(&place, &OpenOptions::read()).await.unwrap();
            let binding = open.bind(&open.connect(Transport::Verbs).await.unwrap()).await.unwrap();
            let region = Region::allocate(BLOCK).unwrap();
            for n in 0..1000usize {
                assert_eq!(binding.read_at(&region, 0..BLOCK, 0).await.unwrap(), BLOCK, "{n}");
            }
            assert!(bytes(&region, 0..BLOCK) == content[..BLOCK]);
            let gauges = server.gauges();
            assert_eq!(gauges[READS], 1000, "case {n}: each was the server's");
            assert_eq!(gauges.get(MAPPINGS).copied().unwrap_or(0), 0, "case {n}");
        });
    }
}

/// A data plane that stands still serves what is mapped: the lock is not granted before it has answered or is dead.
#[test]
fn a_lock_waits_for_a_data_plane_that_stands_still_while_its_mapping_is_read_on() {
    let Some((server, _)) = server() else { return };
    plain(&server, b'a');
    runtime().block_on(async {
        let (_open, binding) = bound(&server, OpenOptions::read_write()).await;
        let (other, _others) = bound(&server, OpenOptions::read_write()).await;
        let reader = Reader::start(&binding, 0, |saw, begun, ended| match saw {
            Saw::Bytes(b'a') => begun <= 1,
            Saw::Refused(_) => ended >= 1,
            _ => false,
        });
        reader.is_one_sided(&server).await;
        signal(server.dataplane_pid, rustix::process::Signal::STOP);
        reader.reach(1);
        reader.goes_on().await;
        let range = LockRange::new(0, BLOCK as u64).unwrap();
        let item = [LockItem { range, kind: LockKind::Exclusive }];
        let mut lock = Box::pin(other.lock(&item, LockOptions::default()));
        let early = tokio::time::timeout(Duration::from_millis(300), &mut lock).await;
        assert!(early.is_err(), "granted, while what it locks is read");
        reader.goes_on().await;
        signal(server.dataplane_pid, rustix::process::Signal::CONT);
        lock.await.unwrap();
        reader.reach(2);
        reader.end().await;
    });
}
