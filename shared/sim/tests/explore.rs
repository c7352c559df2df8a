//! All orders of small worlds.

use holdfast_sim::Broken;
use holdfast_sim::explore::{Do, Seen, Small, explore};

const ALONE: Do = Do::Open { alone: true, hold_ms: 100 };
const SHARED: Do = Do::Open { alone: false, hold_ms: 100 };

fn small(scripts: Vec<Vec<Do>>) -> Small {
    Small { scripts, crash: false, time: false, broken: None }
}

fn all(name: &str, small: &Small, limit: u64) -> Seen {
    let seen = explore(small, limit).unwrap_or_else(|words| panic!("{name}: {words}"));
    println!("{name}: {seen:?}");
    seen
}

#[test]
fn locks_of_two_ranges_with_a_crash_in_all_orders() {
    let scripts = vec![vec![SHARED, Do::Lock(0), Do::Unlock], vec![SHARED, Do::Lock(0), Do::Lock(1)]];
    let seen = all("locks, crash", &Small { crash: true, ..small(scripts) }, 40_000);
    assert!(seen.complete && seen.ends > 3, "{seen:?}");
}

#[test]
fn resume_against_open_in_all_orders() {
    let scripts = vec![vec![ALONE, Do::Drop, Do::Resume], vec![ALONE, Do::Close]];
    let seen = all("resume against open", &Small { time: true, ..small(scripts) }, 25_000);
    assert!(seen.complete && seen.ends > 3, "{seen:?}");
}

#[test]
fn resume_against_open_with_a_crash_in_many_orders() {
    let scripts = vec![vec![ALONE, Do::Drop, Do::Resume], vec![ALONE]];
    all("resume against open, crash", &Small { crash: true, time: true, ..small(scripts) }, 4000);
}

#[test]
fn writes_against_a_lock_in_all_orders() {
    let small = small(vec![vec![SHARED, Do::Bind, Do::Write(0)], vec![SHARED, Do::Lock(0)]]);
    let seen = all("write against lock", &small, 6000);
    assert!(seen.complete, "{seen:?}");
    let broken = Small { broken: Some(Broken::BarrierEarly), ..small };
    assert!(explore(&broken, 6000).is_err(), "a barrier that is no barrier is not found");
}
