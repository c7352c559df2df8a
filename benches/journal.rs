//! What it costs to remember: records that became durable per second, one after the other and 64 at once, with and
//! without waiting for the disk; and how fast a million of them are read back.
//!
//! The files are in the directory `HOLDFAST_BENCH_DIR`, else in the one for temporary files: the figures are its disk's.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use holdfast_control::journal::{FileDisk, Journal, JournalEvent, Kind, Settings, recover, start};
use holdfast_shared::journal::{Options, WriteError};
use holdfast_shared::types::ClusterId;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

const CLUSTER: ClusterId = ClusterId([1; 16]);
/// As long as the record of an open with a short path.
const RECORD_BYTES: usize = 300;
const RECOVERED: u64 = 1_000_000;

fn directory() -> tempfile::TempDir {
    let beneath = std::env::var_os("HOLDFAST_BENCH_DIR").map_or_else(std::env::temp_dir, PathBuf::from);
    tempfile::tempdir_in(beneath).expect("a directory for the journal")
}

/// Appenders that each wait until their record is durable and then append the next, as sessions do.
struct Appenders {
    journal: Journal,
    events: UnboundedReceiver<JournalEvent>,
    next: u64,
}

impl Appenders {
    fn new(directory: &Path, settings: &Settings) -> Self {
        let recovery = recover(directory, CLUSTER, settings, &mut |_| Ok(())).expect("an empty journal");
        let (sender, events) = unbounded_channel();
        Self { journal: start(recovery, 1, settings, sender).expect("a thread"), events, next: 1 }
    }

    fn append(&mut self) {
        let record = vec![0x5a; RECORD_BYTES];
        self.journal.append(self.next, record, Kind::Ordinary).expect("room");
        self.next += 1;
    }

    /// How long it takes until `records` more are durable, `at_once` of them waiting at any time.
    fn run(&mut self, records: u64, at_once: u64) -> Duration {
        let first = self.next;
        let end = first + records;
        let begun = Instant::now();
        while self.next < end.min(first + at_once) {
            self.append();
        }
        loop {
            match self.events.blocking_recv().expect("the thread lives") {
                JournalEvent::Persisted(through) => {
                    while self.next < end.min(through + 1 + at_once) {
                        self.append();
                    }
                    if through + 1 == end {
                        return begun.elapsed();
                    }
                }
                // Nothing to say in it: what is measured is the way of one record, and the files stay small.
                JournalEvent::CheckpointBegun => self.journal.end_checkpoint(),
                JournalEvent::CheckpointDone | JournalEvent::Room(true) => {}
                bad => panic!("{bad:?}"),
            }
        }
    }
}

fn append(c: &mut Criterion) {
    let mut group = c.benchmark_group("journal/append");
    group.throughput(Throughput::Elements(1));
    for sync in [true, false] {
        for at_once in [1_u64, 64] {
            let directory = directory();
            let settings = Settings { sync, ..Settings::default() };
            let mut appenders = Appenders::new(&directory.path().join("journal"), &settings);
            let how = if sync { "sync" } else { "no sync" };
            group.bench_function(format!("{at_once} at once, {how}"), |b| {
                b.iter_custom(|records| appenders.run(records, at_once));
            });
        }
    }
    group.finish();
}

/// Writes the records without a thread, so that this takes no longer than it must.
fn fill(directory: &Path) {
    let disk = FileDisk::open(directory, false).expect("a directory");
    let recovery =
        holdfast_shared::journal::recover(disk, CLUSTER, &mut |_| Ok(())).expect("an empty journal");
    let mut journal = recovery.start(1, Options::default()).expect("space");
    for sequence in 1..=RECOVERED {
        let record = [sequence.to_le_bytes()[0]; RECORD_BYTES];
        if journal.append(sequence, &record) == Err(WriteError::CommitFirst) {
            journal.commit().expect("a write");
            journal.append(sequence, &record).expect("a write");
        }
    }
    journal.commit().expect("a write");
}

fn recovery(c: &mut Criterion) {
    let directory = directory();
    let path = directory.path().join("journal");
    fill(&path);
    let settings = Settings::default();
    let read = || {
        let mut bytes = 0;
        let recovery = recover(&path, CLUSTER, &settings, &mut |record| {
            bytes += record.payload.len();
            Ok(())
        });
        let recovery = recovery.expect("a whole journal");
        assert_eq!(bytes, 1_000_000 * RECORD_BYTES);
        (recovery.summary().records, recovery.summary().bytes)
    };
    let (records, bytes) = read();
    println!("journal/recovery: {records} records in {bytes} bytes");
    let mut group = c.benchmark_group("journal/recovery");
    group.sample_size(10).throughput(Throughput::Bytes(bytes));
    group.bench_function("1000000 records of 300 bytes, in the page cache", |b| b.iter(read));
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default().warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(3));
    targets = append, recovery
}
criterion_main!(benches);
