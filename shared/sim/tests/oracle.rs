//! The oracle bites: each rule that the world breaks on purpose is found.

use holdfast_sim::{Broken, Setting, run_with};

/// Of many seeds with this rule broken, at least one is caught, and not by chance: unbroken, the same seeds are well.
fn is_caught(broken: Broken, words: &[&str]) {
    let mut caught = 0;
    for seed in 0..4000 {
        let setting = Setting::of_seed(seed);
        let broken_too = Setting { broken: Some(broken), ..setting.clone() };
        let Err(failure) = run_with(seed, 800, &broken_too) else { continue };
        if words.iter().any(|word| failure.words.contains(word)) && run_with(seed, 800, &setting).is_ok() {
            caught += 1;
            if caught == 3 {
                return;
            }
        }
    }
    panic!("{broken:?} was caught {caught} times");
}

#[test]
fn a_fence_confirmed_too_early_is_caught() {
    is_caught(Broken::FenceEarly, &["lands after"]);
}

#[test]
fn a_barrier_confirmed_too_early_is_caught() {
    is_caught(Broken::BarrierEarly, &["in flight under it", "lands under a lock"]);
}

#[test]
fn ignored_rules_are_caught() {
    is_caught(Broken::RulesIgnored, &["lands under a lock"]);
}

#[test]
fn a_record_called_durable_too_early_is_caught() {
    is_caught(Broken::PersistedEarly, &["after a restart"]);
}

#[test]
fn a_disk_that_forgets_is_caught() {
    is_caught(Broken::SyncForgets, &["after a restart"]);
}

#[test]
fn stale_evidence_is_caught() {
    is_caught(Broken::StaleEvidence, &["in spite of"]);
}

#[test]
fn a_second_reply_is_caught() {
    is_caught(Broken::ReplyTwice, &["answered twice"]);
}

#[test]
fn a_hold_that_is_too_short_is_caught() {
    is_caught(Broken::FastClock, &["is protected", "while", "before its time"]);
}

#[test]
fn a_flush_that_does_nothing_is_caught() {
    is_caught(Broken::FlushNothing, &["is flushed"]);
}
