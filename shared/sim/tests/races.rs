//! Cases of the groups LCK and RSM, by their ids, each over many seeds.

use holdfast_sim::races::{self, EndOfWait, Winner};
use std::collections::BTreeMap;

#[test]
fn rsm_11_a_resume_and_an_open_that_conflicts_have_one_order() {
    let mut won: BTreeMap<Winner, u64> = BTreeMap::new();
    for seed in 0..10_000 {
        let winner = races::resume_against_open(seed).unwrap_or_else(|words| panic!("seed {seed}: {words}"));
        *won.entry(winner).or_default() += 1;
    }
    println!("{won:?}");
    assert!(won.len() == 2 && won.values().all(|count| *count > 500), "the race is no race: {won:?}");
}

#[test]
fn rsm_13_of_two_resumes_at_once_one_wins() {
    let mut won: BTreeMap<usize, u64> = BTreeMap::new();
    for seed in 0..10_000 {
        let winner =
            races::resume_against_resume(seed).unwrap_or_else(|words| panic!("seed {seed}: {words}"));
        *won.entry(winner).or_default() += 1;
    }
    println!("{won:?}");
    assert!(won.len() == 2 && won.values().all(|count| *count > 500), "the race is no race: {won:?}");
}

#[test]
fn rsm_19_ten_thousand_expire_in_one_tick_and_others_are_answered() {
    races::many_expire(1, 10_000).unwrap_or_else(|words| panic!("{words}"));
}

#[test]
fn lck_07_a_wait_that_ends_is_answered_once_and_the_next_is_granted() {
    for by in [EndOfWait::Cancel, EndOfWait::Close, EndOfWait::Logoff, EndOfWait::Drop] {
        for seed in 0..500 {
            races::wait_ends(seed, by).unwrap_or_else(|words| panic!("{by:?}, seed {seed}: {words}"));
        }
    }
}

#[test]
fn lck_13_two_lock_against_each_other_without_a_stall() {
    races::lock_rounds(1, 100_000).unwrap_or_else(|words| panic!("{words}"));
}
