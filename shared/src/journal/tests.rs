//! The journal on a disk that fails in every way the simulator knows.
//!
//! Records set one of eight keys, so that a checkpoint (which sets each once more) leaves the state alone, and the state
//! after any number of records is known.

use super::layout::{FRAME_HEAD_BYTES, HEADER_BYTES, Header, file_name};
use super::sim::{Fault, MemoryDisk, Seeded};
use super::*;
use crate::types::ClusterId;
use proptest::prelude::*;

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

/// Appends, commits and makes checkpoints as the seed says, until the disk fails or `steps` are done. What was
/// committed then.
fn run(model: &mut Model, journal: &mut Journal<MemoryDisk>, random: &mut Seeded, steps: u64) -> u64 {
    let mut fed: Option<u8> = None;
    for _ in 0..steps {
        let done = match (random.below(8), fed) {
            (0..=3, _) => {
                let key = u8::try_from(random.below(8)).unwrap();
                let filler =
                    if random.below(10) == 0 { 20_000 } else { usize::try_from(random.below(400)).unwrap() };
                model.append(journal, key, random.number(), filler)
            }
            (4..=5, Some(8)) => journal.end_checkpoint().map(|()| fed = None),
            (4..=5, Some(key)) => {
                let value = model.states.last().unwrap()[usize::from(key)];
                fed = Some(key + 1);
                model.append(journal, key, value, 0)
            }
            (4, None) if journal.should_checkpoint() || random.below(4) == 0 => {
                match journal.begin_checkpoint() {
                    Err(WriteError::Checkpoint(_)) => Ok(()),
                    done => done.map(|()| fed = Some(0)),
                }
            }
            _ => journal.commit().map(|committed| assert_eq!(committed.through, model.last())),
        };
        match done {
            Ok(()) => {}
            Err(WriteError::Failed(_)) => break,
            Err(other) => panic!("{other}"),
        }
    }
    journal.committed()
}

/// A script is run once to count its disk operations, and then again for each of them, with the power cut there.
fn every_power_cut(seed: u64, steps: u64, by: usize) {
    let script = |disk: &MemoryDisk, model: &mut Model| -> u64 {
        let started = model.recover(disk).unwrap().start(1, options());
        let Ok(mut journal) = started else { return 0 };
        run(model, &mut journal, &mut Seeded::new(seed), steps)
    };
    let whole = MemoryDisk::new(seed);
    let mut model = Model::new();
    script(&whole, &mut model);
    assert_eq!(model.recover(&whole).unwrap().summary().last_sequence, model.last());
    for cut in (1..=whole.operations()).step_by(by) {
        let disk = MemoryDisk::new(seed ^ cut);
        disk.fault_at(cut, Fault::PowerCut);
        let mut model = Model::new();
        let mut committed = script(&disk, &mut model);
        // And again while it starts anew, and while it goes on.
        for again in 0..3 {
            disk.power_on();
            let recovery =
                model.recover(&disk).unwrap_or_else(|e| panic!("cut at {cut}, again {again}: {e}"));
            assert!(recovery.summary().last_sequence >= committed, "cut at {cut}, again {again}");
            committed = recovery.summary().last_sequence;
            if again < 2 {
                disk.fault_at(disk.operations() + 1 + (cut + again) % 9, Fault::PowerCut);
            }
            let generation = recovery.summary().generation + 1;
            if let Ok(mut journal) = recovery.start(generation, options()) {
                committed = run(&mut model, &mut journal, &mut Seeded::new(cut), 12).max(committed);
            }
        }
    }
}

#[test]
fn crs_06_after_a_power_cut_at_every_disk_operation_all_that_was_committed_is_there() {
    for seed in 0..6 {
        every_power_cut(seed, 150, 1);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn crs_06_power_cuts_of_any_seed(seed: u64) {
        every_power_cut(seed, 60, 3);
    }

    /// A failed sync, a crash of the process alone, and then a power cut: what was read after the first must not vanish
    /// with the second.
    #[test]
    fn crs_06_a_failed_sync_is_never_believed_later(seed: u64, steps in 20_u64..120) {
        let disk = MemoryDisk::new(seed);
        let mut model = Model::new();
        let mut journal = open(&mut model, &disk);
        disk.fault_at(disk.operations() + 2 + seed % 40, Fault::Failed);
        let mut committed = run(&mut model, &mut journal, &mut Seeded::new(seed), steps);
        disk.restart();
        let recovery = model.recover(&disk).unwrap();
        prop_assert!(recovery.summary().last_sequence >= committed);
        committed = recovery.summary().last_sequence;
        drop(recovery.start(2, options()).unwrap());
        disk.power_on();
        prop_assert!(model.recover(&disk).unwrap().summary().last_sequence >= committed);
    }

    /// A flipped bit is named, or lies where nothing was (then at most what came after the last sync's start is cut).
    #[test]
    fn crs_08_a_flipped_bit_is_named_and_never_passed_over(seed: u64, place: u64) {
        let disk = MemoryDisk::new(seed);
        let mut model = Model::new();
        let mut journal = open(&mut model, &disk);
        run(&mut model, &mut journal, &mut Seeded::new(seed), 200);
        journal.commit().unwrap();
        let before_last = model.last();
        model.append(&mut journal, 0, 1, 10).unwrap();
        journal.commit().unwrap();
        let names = disk.list().unwrap();
        let name = &names[usize::try_from(place % names.len() as u64).unwrap()];
        let written = disk.bytes(name).unwrap().iter().rposition(|byte| *byte != 0).unwrap() as u64;
        let bits = (written + 1) * 8;
        disk.flip(name, (place >> 8) % bits);
        match model.recover(&disk) {
            Ok(recovery) => prop_assert!(recovery.summary().last_sequence >= before_last),
            Err(RecoverError::Corrupt { file, offset, .. }) => {
                prop_assert_eq!(&file, name);
                prop_assert!(offset <= (place >> 8) % bits / 8);
            }
            Err(other) => prop_assert!(false, "{}", other),
        }
    }
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
fn crs_08_every_bit_of_a_record_that_others_follow_is_watched() {
    let (disk, mut model, _journal) = filled(6);
    let second = HEADER_BYTES as u64 + FRAME;
    for bit in second * 8..(second + FRAME) * 8 {
        disk.flip(&file_name(1), bit);
        let error = model.recover(&disk).unwrap_err();
        assert!(
            matches!(&error, RecoverError::Corrupt { file, offset, .. } if *file == file_name(1) && *offset == second),
            "{error}"
        );
        disk.flip(&file_name(1), bit);
    }
    let text = {
        disk.flip(&file_name(1), second * 8);
        model.recover(&disk).unwrap_err().to_string()
    };
    assert!(text.contains("journal-0000000000000001.log is damaged at byte 208"), "{text}");
    assert!(text.contains("Restore the journal directory"), "{text}");
}

#[test]
fn a_torn_last_write_is_cut_and_reported() {
    let (disk, mut model, _journal) = filled(6);
    let last = HEADER_BYTES as u64 + 5 * FRAME;
    disk.flip(&file_name(1), (last + FRAME_HEAD_BYTES as u64 + 3) * 8);
    let recovery = model.recover(&disk).unwrap();
    assert_eq!(recovery.summary().last_sequence, 5);
    let cut = recovery.summary().cut.clone().unwrap();
    assert_eq!((cut.file, cut.offset), (file_name(1), last));
    assert!(cut.bytes > 100 && cut.bytes <= FRAME, "{}", cut.bytes);
    // Cut for good: the next start finds a whole file.
    drop(recovery.start(2, options()).unwrap());
    let again = model.recover(&disk).unwrap();
    assert_eq!((again.summary().cut.clone(), again.summary().last_sequence), (None, 5));
    assert_eq!(again.summary().generation, 2);
}

#[test]
fn crs_08_missing_files_and_foreign_files_stop_the_start() {
    let (disk, mut model, journal) = filled(3);
    drop(journal);
    for value in 0..2 {
        let mut journal = open(&mut model, &disk);
        model.append(&mut journal, 2, value, 0).unwrap();
        journal.commit().unwrap();
    }
    assert_eq!(disk.list().unwrap().len(), 3);
    let second = disk.bytes(&file_name(2)).unwrap();
    disk.lose(&file_name(2));
    let error = model.recover(&disk).unwrap_err().to_string();
    assert!(error.contains("journal-0000000000000002.log, is missing"), "{error}");
    disk.put(&file_name(2), &second);
    model.recover(&disk).unwrap();
    // Its last record, and with it all that proves that there was one, is lost.
    let record = second.iter().rposition(|byte| *byte != 0).unwrap();
    let mut shorter = second.clone();
    shorter[HEADER_BYTES..=record].fill(0);
    disk.put(&file_name(2), &shorter);
    let error = model.recover(&disk).unwrap_err().to_string();
    assert!(error.contains("begins with record 5, the file before it ends with 3"), "{error}");
    disk.put(&file_name(2), &second);
    disk.lose(&file_name(1));
    let error = model.recover(&disk).unwrap_err().to_string();
    assert!(error.contains("files before it are missing"), "{error}");
    let foreign = recover(disk, ClusterId([8; 16]), &mut |_| Ok(())).unwrap_err();
    assert_eq!(foreign, RecoverError::Foreign { file: file_name(2) });
}

#[test]
fn crs_08_other_formats_are_refused_with_words() {
    for (version, words) in [(0_u16, "no longer reads"), (2, "Start the newer release")] {
        let (disk, mut model, _journal) = filled(1);
        let mut bytes = disk.bytes(&file_name(1)).unwrap();
        bytes[4..6].copy_from_slice(&version.to_le_bytes());
        let checksum = crc32c::crc32c(&bytes[..60]);
        bytes[60..64].copy_from_slice(&checksum.to_le_bytes());
        disk.put(&file_name(1), &bytes);
        let error = model.recover(&disk).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    }
}

#[test]
fn a_record_that_is_not_understood_is_named() {
    let (disk, _, _journal) = filled(2);
    let mut seen = 0;
    let error = recover(disk, CLUSTER, &mut |record| {
        seen = record.sequence;
        if record.sequence == 2 { Err("no such kind".into()) } else { Ok(()) }
    })
    .unwrap_err();
    assert_eq!(seen, 2);
    assert!(matches!(error, RecoverError::Corrupt { offset, .. } if offset == HEADER_BYTES as u64 + FRAME));
}

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
    assert_eq!(model.append(&mut journal, 1, 1, 0), Err(WriteError::Full));
    disk.set_capacity(u64::MAX);
    assert_eq!(journal.room().unwrap(), Room::Free);
    model.append(&mut journal, 1, 1, 0).unwrap();
    journal.commit().unwrap();
    drop(journal);
    disk.set_capacity(disk.used());
    assert_eq!(model.recover(&disk).unwrap().summary().last_sequence, 4);
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

/// A payload that looks like a frame, and a frame of another segment, are not taken for one that follows damage.
#[test]
fn frames_within_payloads_and_of_other_files_do_not_count() {
    let (disk, mut model, mut journal) = filled(1);
    let first = disk.bytes(&file_name(1)).unwrap();
    let frame = &first[HEADER_BYTES..HEADER_BYTES + usize::try_from(FRAME).unwrap()];
    journal.append(2, frame).unwrap();
    journal.commit().unwrap();
    let at = HEADER_BYTES as u64 + FRAME;
    disk.flip(&file_name(1), at * 8);
    assert_eq!(model.recover(&disk).unwrap().summary().last_sequence, 1);
    let other = Header {
        kind: super::layout::SegmentKind::First,
        cluster: CLUSTER,
        segment: 1,
        generation: 9,
        first_sequence: 1,
    };
    let mut bytes = other.encode().to_vec();
    bytes.extend(frame);
    disk.put(&file_name(1), &bytes);
    let recovery = model.recover(&disk).unwrap();
    assert_eq!((recovery.summary().last_sequence, recovery.summary().generation), (0, 9));
}
