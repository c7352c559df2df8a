//! The power fails at every disk operation, syncs fail, bits flip.

use super::*;
use crate::journal::sim::{Fault, Seeded};
use proptest::prelude::*;

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
