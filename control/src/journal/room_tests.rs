//! What is kept on the disk for the ends of opens.

use super::tests::{PATIENCE, next};
use super::*;
use holdfast_shared::journal::sim::MemoryDisk;
use std::time::{Duration, Instant};
use tokio::sync::mpsc::unbounded_channel;

/// The disk becomes full while there are many opens: each can still end.
#[test]
fn crs_12_on_a_full_disk_every_open_has_space_for_its_end() {
    const OPENS: u64 = 30_000;
    let disk = MemoryDisk::new(1);
    let recovery =
        holdfast_shared::journal::recover(disk.clone(), ClusterId([3; 16]), &mut |_| Ok(())).unwrap();
    let (sender, mut events) = unbounded_channel();
    let journal = start(recovery, 1, &Settings::default(), sender).unwrap();
    journal.reserve_for(usize::try_from(OPENS).unwrap());
    // With the next write the space is taken.
    journal.append(1, vec![0; 100], Kind::Ordinary).unwrap();
    assert_eq!(next(&mut events), JournalEvent::Persisted(1));
    disk.set_capacity(disk.used());
    for sequence in 2..=2 * OPENS {
        // What a record of a detached or closed open takes is less than half of what is kept for it.
        let until = Instant::now() + PATIENCE;
        while let Err(error) = journal.append(sequence, vec![0; 80], Kind::Releasing) {
            assert_eq!(error, AppendError::Busy);
            assert!(Instant::now() < until, "no space for record {sequence}");
            std::thread::sleep(Duration::from_micros(100));
        }
    }
    while next(&mut events) != JournalEvent::Persisted(2 * OPENS) {}
    assert!(disk.used() >= OPENS * RELEASE_BYTES_PER_OPEN);
    // Where all are gone, less is kept: there is room again for what is new.
    assert_eq!(journal.append(2 * OPENS + 1, vec![0; 100], Kind::Ordinary), Err(AppendError::Full));
    journal.reserve_for(0);
    assert_eq!(next(&mut events), JournalEvent::Room(true));
}
