//! The driver's records meet a queue that is full.

use super::records::Records;
use crate::gauges::Gauges;
use crate::journal::tests::next;
use crate::journal::{self, JournalEvent, Kind, Settings};
use holdfast_shared::journal::record::Record;
use holdfast_shared::journal::sim::MemoryDisk;
use holdfast_shared::journal::{Disk, DiskError};
use holdfast_shared::types::{ClusterId, OpenId};
use std::time::Duration;
use tokio::sync::mpsc::unbounded_channel;

/// A disk that takes its time to say that it is full.
struct Slow(MemoryDisk);

impl Disk for Slow {
    type File = u64;
    fn list(&self) -> Result<Vec<String>, DiskError> {
        self.0.list()
    }
    fn create(&self, name: &str) -> Result<u64, DiskError> {
        self.0.create(name)
    }
    fn open(&self, name: &str) -> Result<u64, DiskError> {
        self.0.open(name)
    }
    fn length(&self, file: &u64) -> Result<u64, DiskError> {
        self.0.length(file)
    }
    fn read_at(&self, file: &u64, offset: u64, into: &mut [u8]) -> Result<usize, DiskError> {
        self.0.read_at(file, offset, into)
    }
    fn write_at(&self, file: &u64, offset: u64, bytes: &[u8]) -> Result<(), DiskError> {
        self.0.write_at(file, offset, bytes)
    }
    fn allocate(&self, file: &u64, offset: u64, length: u64) -> Result<(), DiskError> {
        std::thread::sleep(Duration::from_millis(5));
        self.0.allocate(file, offset, length)
    }
    fn truncate(&self, file: &u64, length: u64) -> Result<(), DiskError> {
        self.0.truncate(file, length)
    }
    fn sync_data(&self, file: &u64) -> Result<(), DiskError> {
        self.0.sync_data(file)
    }
    fn sync_directory(&self) -> Result<(), DiskError> {
        self.0.sync_directory()
    }
    fn remove(&self, name: &str) -> Result<(), DiskError> {
        self.0.remove(name)
    }
}

/// Whoever found the queue full tries again at the next event, and at no other time.
#[test]
fn a_full_queue_is_never_waited_for_in_vain() {
    let disk = MemoryDisk::new(1);
    // One record fits into the queue, and not another.
    let cluster = ClusterId([3; 16]);
    let recovery = holdfast_shared::journal::recover(Slow(disk.clone()), cluster, &mut |_| Ok(())).unwrap();
    let (sender, mut events) = unbounded_channel();
    let journal = journal::start_with_queue(recovery, 1, &Settings::default(), sender, 40).unwrap();
    // Full: it is asked for space after each write.
    disk.set_capacity(disk.used());
    let (mut records, gauges) = (Records::new(journal, 0), Gauges::default());
    records.reserve_for(100_000);
    for sequence in 1..=50 {
        let closed = Record::Closed(OpenId([u8::try_from(sequence).unwrap(); 16]));
        records.persist(sequence, &closed, Kind::Releasing, &gauges);
    }
    assert!(records.waiting() > 40, "{}", records.waiting());
    let mut reached = 0;
    while !records.idle() {
        if let JournalEvent::Persisted(through) = next(&mut events) {
            reached = records.persisted(through, &gauges).unwrap_or(reached);
        }
    }
    assert_eq!(reached, 50);
}
