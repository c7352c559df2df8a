//! The journal on a disk that fails in every way the simulator knows.
//!
//! Records set one of eight keys, so that a checkpoint (which sets each once more) leaves the state alone, and the state
//! after any number of records is known.

mod crash;
mod damage;
mod full;

use super::layout::file_name;
use super::sim::MemoryDisk;
use super::*;
use crate::types::ClusterId;

const CLUSTER: ClusterId = ClusterId([7; 16]);
type Keys = [u64; 8];

fn options() -> Options {
    Options { step_bytes: 16 * 1024, reserve_bytes: 0, checkpoint_bytes: 40 * 1024 }
}

/// What was appended, by number, and the state after each.
#[derive(Clone, Debug)]
struct Model {
    payloads: Vec<Vec<u8>>,
    states: Vec<Keys>,
}

impl Model {
    fn new() -> Self {
        Self { payloads: vec![Vec::new()], states: vec![[0; 8]] }
    }

    fn last(&self) -> u64 {
        self.payloads.len() as u64 - 1
    }

    fn append(
        &mut self,
        journal: &mut Journal<MemoryDisk>,
        key: u8,
        value: u64,
        filler: usize,
    ) -> Result<(), WriteError> {
        let mut payload = vec![key];
        payload.extend(value.to_le_bytes());
        payload.extend((0..=u8::MAX).cycle().map(|at| at.wrapping_mul(31) ^ key).take(filler));
        journal.append(self.last() + 1, &payload)?;
        let mut state = *self.states.last().unwrap();
        state[usize::from(key)] = value;
        self.payloads.push(payload);
        self.states.push(state);
        Ok(())
    }

    /// Reads the journal back and holds it against what was appended.
    fn recover(&mut self, disk: &MemoryDisk) -> Result<Recovery<MemoryDisk>, RecoverError> {
        let mut keys: Keys = [0; 8];
        let recovery = recover(disk.clone(), CLUSTER, &mut |record| {
            let expected = usize::try_from(record.sequence).ok().and_then(|at| self.payloads.get(at));
            assert_eq!(Some(record.payload), expected.map(Vec::as_slice), "record {}", record.sequence);
            let value = record.payload[1..9].try_into().map_err(|_| "too short")?;
            keys[usize::from(record.payload[0])] = u64::from_le_bytes(value);
            Ok(())
        })?;
        let last = usize::try_from(recovery.summary().last_sequence).unwrap();
        assert_eq!(Some(&keys), self.states.get(last), "the state after record {last}");
        self.payloads.truncate(last + 1);
        self.states.truncate(last + 1);
        Ok(recovery)
    }
}

fn open(model: &mut Model, disk: &MemoryDisk) -> Journal<MemoryDisk> {
    let recovery = model.recover(disk).unwrap();
    let generation = recovery.summary().generation + 1;
    recovery.start(generation, options()).unwrap()
}

fn filled(records: u64) -> (MemoryDisk, Model, Journal<MemoryDisk>) {
    let disk = MemoryDisk::new(1);
    let mut model = Model::new();
    let mut journal = open(&mut model, &disk);
    for value in 1..=records {
        model.append(&mut journal, 1, value, 100).unwrap();
        journal.commit().unwrap();
    }
    (disk, model, journal)
}

const FRAME: u64 = framed_bytes(109) as u64;

#[test]
fn one_commit_is_one_sync_however_much_was_appended() {
    let (disk, mut model, mut journal) = filled(0);
    let before = (disk.syncs(), disk.operations());
    for value in 0..100 {
        model.append(&mut journal, 3, value, 50).unwrap();
    }
    assert_eq!(journal.commit().unwrap(), Committed { through: 100, checkpoint_done: false });
    assert_eq!((disk.syncs(), disk.operations()), (before.0 + 1, before.1 + 2));
    journal.commit().unwrap();
    assert_eq!(disk.syncs(), before.0 + 1, "nothing to do");
}

/// However long it serves, the files stay below the limit and what one checkpoint needs.
#[test]
fn checkpoints_bound_the_journal() {
    let (disk, mut model, mut journal) = filled(0);
    let mut checkpoints = 0;
    for value in 0..2000_u64 {
        model.append(&mut journal, u8::try_from(value % 8).unwrap(), value, 200).unwrap();
        if journal.should_checkpoint() {
            journal.begin_checkpoint().unwrap();
            assert_eq!(journal.begin_checkpoint(), Err(WriteError::Checkpoint("under way already")));
            for key in 0..8_u8 {
                let value = model.states.last().unwrap()[usize::from(key)];
                model.append(&mut journal, key, value, 0).unwrap();
                model.append(&mut journal, 0, value, 0).unwrap();
            }
            journal.end_checkpoint().unwrap();
            checkpoints += 1;
            assert_eq!(disk.list().unwrap().len(), 2, "the older one stays until the end mark is durable");
            assert!(journal.commit().unwrap().checkpoint_done);
            assert_eq!(disk.list().unwrap().len(), 1);
        }
        assert!(journal.live_bytes() < 60_000);
    }
    journal.commit().unwrap();
    assert!(checkpoints > 5);
    assert_eq!(journal.end_checkpoint(), Err(WriteError::Checkpoint("not under way")));
    let mut inside = 0;
    let recovery = recover(disk.clone(), CLUSTER, &mut |record| {
        inside += u64::from(record.in_checkpoint);
        Ok(())
    })
    .unwrap();
    assert_eq!(inside, 16, "what stands before the end mark is told apart");
    assert!(recovery.summary().bytes < 60_000);
    model.recover(&disk).unwrap();
}

#[test]
fn starts_without_number_do_not_gather_files_without_number() {
    let (disk, mut model, journal) = filled(1);
    drop(journal);
    for _ in 0..70 {
        drop(open(&mut model, &disk));
    }
    assert!(open(&mut model, &disk).should_checkpoint());
}

#[test]
fn what_cannot_be_appended_changes_nothing() {
    let (_, mut model, mut journal) = filled(2);
    assert_eq!(journal.append(5, b""), Err(WriteError::Sequence { expected: 3, got: 5 }));
    let long = vec![0; PAYLOAD_BYTES_MAX + 1];
    assert_eq!(journal.append(3, &long), Err(WriteError::TooLong(long.len())));
    while journal.pending_bytes() + framed_bytes(PAYLOAD_BYTES_MAX) <= PENDING_BYTES_MAX {
        model.append(&mut journal, 1, 0, PAYLOAD_BYTES_MAX - 9).unwrap();
    }
    assert_eq!(model.append(&mut journal, 1, 0, PAYLOAD_BYTES_MAX - 9), Err(WriteError::CommitFirst));
    assert_eq!(journal.commit().unwrap().through, model.last());
}
