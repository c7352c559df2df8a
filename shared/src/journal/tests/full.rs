//! Full disks, and disks that fail for good.

use super::*;
use crate::journal::sim::Fault;

#[test]
fn crs_12_a_full_disk_takes_what_releases_and_recovers_by_itself() {
    let (disk, mut model, mut journal) = filled(1);
    disk.set_capacity(disk.used());
    let mut ordinary = 0;
    while journal.room().unwrap() == Room::Free {
        model.append(&mut journal, 1, ordinary, 500).unwrap();
        journal.commit().unwrap();
        ordinary += 1;
    }
    assert!(ordinary > 10, "the step that was taken ahead");
    let full = disk.used();
    // Releases go on, and take no space that is not there.
    let mut released = 0;
    while released < 200 * 1024 {
        model.append(&mut journal, 2, released, 500).unwrap();
        assert_eq!(journal.room().unwrap(), Room::Full);
        journal.commit().unwrap();
        released += 541;
    }
    assert_eq!(disk.used(), full);
    assert_eq!(journal.begin_checkpoint(), Err(WriteError::Full), "no space for a second file");
    assert_eq!(disk.list().unwrap().len(), 1);
    // The reserve has an end too, and then nothing is lost that was taken.
    let end = loop {
        match model.append(&mut journal, 2, 7, 500) {
            Ok(()) => {}
            Err(error) => break error,
        }
    };
    assert_eq!(end, WriteError::Full);
    journal.commit().unwrap();
    assert_eq!(model.clone().recover(&disk).unwrap().summary().last_sequence, model.last());
    disk.set_capacity(u64::MAX);
    assert_eq!(journal.room().unwrap(), Room::Free);
    model.append(&mut journal, 1, 9, 500).unwrap();
    journal.commit().unwrap();
}

#[test]
fn crs_12_a_start_on_a_full_disk_goes_on_once_there_is_space() {
    let (disk, mut model, journal) = filled(3);
    drop(journal);
    // Space for a header, and not for a reserve.
    let used = disk.bytes(&file_name(1)).unwrap();
    let end = used.iter().rposition(|byte| *byte != 0).unwrap() + 1;
    disk.put(&file_name(1), &used[..end.next_multiple_of(8)]);
    disk.set_capacity(disk.used() + 4096);
    let mut journal = open(&mut model, &disk);
    assert_eq!(journal.room().unwrap(), Room::Full);
    // What fits beside the header is taken: the record of the start, and ends of opens.
    model.append(&mut journal, 1, 1, 0).unwrap();
    assert_eq!(model.append(&mut journal, 1, 2, 5000), Err(WriteError::Full));
    disk.set_capacity(u64::MAX);
    assert_eq!(journal.room().unwrap(), Room::Free);
    model.append(&mut journal, 1, 2, 5000).unwrap();
    journal.commit().unwrap();
    drop(journal);
    disk.set_capacity(disk.used());
    assert_eq!(model.recover(&disk).unwrap().summary().last_sequence, 5);
}

/// File systems that give new blocks at every write may be full in spite of the reserve.
#[test]
fn crs_12_no_space_at_write_or_sync_loses_nothing_and_may_be_tried_again() {
    for at in [1, 2] {
        let (disk, mut model, mut journal) = filled(2);
        model.append(&mut journal, 1, 5, 9000).unwrap();
        disk.fault_at(disk.operations() + at, Fault::NoSpace);
        assert_eq!(journal.commit(), Err(WriteError::Full));
        assert_eq!(journal.committed(), 2);
        model.append(&mut journal, 1, 6, 10).unwrap();
        assert_eq!(journal.commit().unwrap().through, 4);
        disk.power_on();
        assert_eq!(model.recover(&disk).unwrap().summary().last_sequence, 4);
    }
}

#[test]
fn after_a_failure_everything_is_refused() {
    for at in [1, 2] {
        let (disk, mut model, mut journal) = filled(2);
        model.append(&mut journal, 1, 5, 9000).unwrap();
        disk.fault_at(disk.operations() + at, Fault::Failed);
        let Err(WriteError::Failed(words)) = journal.commit() else { panic!("it should have failed") };
        assert!(words.contains("input/output error"), "{words}");
        assert_eq!(journal.commit(), Err(WriteError::Failed(words.clone())));
        assert_eq!(journal.append(4, b""), Err(WriteError::Failed(words.clone())));
        assert_eq!(journal.begin_checkpoint(), Err(WriteError::Failed(words.clone())));
        assert_eq!(journal.room(), Err(WriteError::Failed(words)));
        disk.power_on();
        assert!(model.recover(&disk).unwrap().summary().last_sequence >= 2);
    }
}
