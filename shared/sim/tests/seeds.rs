//! Many short runs, each with faults of its own.

/// Runs the seeds, and shows the first that fails.
fn seeds(from: u64, count: u64, steps: u64) {
    let (mut resumed, mut verdicts) = (0, [0; 4]);
    for seed in from..from + count {
        match holdfast_sim::run(seed, steps) {
            Ok(done) => {
                resumed += done.resumed;
                for (sum, more) in verdicts.iter_mut().zip(done.verdicts) {
                    *sum += more;
                }
            }
            Err(failure) => panic!("{failure}"),
        }
    }
    println!("{count} seeds: {resumed} resumes, verdicts {verdicts:?}");
    assert!(verdicts.iter().all(|count| *count > 0), "a verdict was never told: {verdicts:?}");
}

#[test]
fn short_runs() {
    seeds(0, 2000, 400);
}

/// A late answer that waits for its record while the open is detached anew: it speaks of the time before that.
#[test]
fn an_answer_on_its_way_is_judged_by_the_loss_it_answers() {
    if let Err(failure) = holdfast_sim::run(302_664, 500) {
        panic!("{failure}");
    }
}

/// An open that is evicted while the record of a lock of it is being written: the lock was there before.
#[test]
fn a_lock_may_be_told_after_its_open_was_evicted() {
    if let Err(failure) = holdfast_sim::run(1_000_058, 4000) {
        panic!("{failure}");
    }
}

#[test]
fn longer_runs() {
    seeds(1_000_000, 200, 4000);
}

#[test]
fn the_same_seed_gives_the_same_run() {
    for seed in 0..50 {
        assert_eq!(holdfast_sim::run(seed, 1000), holdfast_sim::run(seed, 1000));
    }
}
