use super::*;
use proptest::prelude::*;
use std::collections::HashMap;

const LONG: u64 = 1 << 20;

fn at(number: u64) -> u64 {
    number * EXTENT_BYTES
}

/// Reads an extent until it is to be mapped.
fn heated(heat: &mut Heat<u32>, now_ms: u64, number: u64) -> Option<Wish<u32>> {
    (0..2 * HOT_SCORE / READ_SCORE).find_map(|_| heat.read(now_ms, at(number), 4096))
}

/// As above, and it is mapped whole.
fn mapped(heat: &mut Heat<u32>, now_ms: u64, number: u64, mapping: u32) -> Option<u32> {
    let wish = heated(heat, now_ms, number).unwrap();
    assert_eq!(wish.number, number);
    assert_eq!(heat.made(now_ms, number, mapping, at(number + 1)), None);
    wish.let_go
}

#[test]
fn what_is_read_several_times_over_is_mapped_and_found() {
    let mut heat = Heat::new(8);
    assert_eq!(heat.find(at(3), 4096), None);
    for _ in 1..HOT_SCORE / READ_SCORE {
        assert!(heat.read(5, at(3) + 8192, 4096).is_none(), "too early");
    }
    assert_eq!(heat.read(5, at(3), 4096).unwrap().number, 3);
    assert!(heated(&mut heat, 5, 4).is_none(), "one is made at a time");
    assert_eq!(heat.made(6, 3, 77, at(3) + 10_000), None);
    for (offset, length, found) in [
        (at(3), 4096, true),
        (at(3) + 9_999, 1, true),
        (at(3) + 9_999, 2, false),
        (at(3) - 1, 2, false),
        (at(4), 1, false),
        (at(3), 0, false),
        (u64::MAX, 2, false),
    ] {
        assert_eq!(heat.find(offset, length).map(|(_, mapping)| mapping), found.then_some(77), "{offset}");
    }
}

#[test]
fn one_way_through_a_file_maps_nothing_and_the_third_does() {
    for length in [4096, 128 << 10, LONG] {
        let mut heat = Heat::<()>::new(8);
        let mut pass =
            |now_ms| (0..EXTENT_BYTES / length).any(|n| heat.read(now_ms, n * length, length).is_some());
        assert!(!pass(0), "{length}");
        assert!(pass(10) || pass(20), "{length}: several times over");
    }
}

#[test]
fn what_was_read_long_ago_counts_no_more() {
    let mut heat = Heat::<()>::new(8);
    for second in 0..100 {
        for _ in 0..HOT_SCORE / READ_SCORE / 3 {
            assert!(heat.read(second * HALF_LIFE_MS, at(1), 4096).is_none(), "second {second}");
        }
    }
}

#[test]
fn an_extent_that_was_written_lately_is_not_mapped_and_one_that_is_written_often_is_let_go() {
    let mut heat = Heat::new(8);
    assert!(heat.read(0, at(0), 4096).is_none());
    assert!(heat.wrote(100, at(0), 4096).is_empty());
    assert!(heated(&mut heat, 99 + WRITTEN_MS, 0).is_none(), "written lately");
    assert_eq!(mapped(&mut heat, 100 + WRITTEN_MS, 0, 7), None);
    // Read-mostly: it stays.
    for _ in 0..1000 {
        assert!((0..WRITE_WEIGHT).all(|_| heat.find(at(0), 1).is_some()));
        assert!(heat.wrote(2000, at(0) + 5, 1).is_empty());
    }
    let writes = (0..).find(|_| heat.wrote(3000, at(0), 1) == [7]).unwrap();
    assert!(writes < CREDIT_MAX / WRITE_WEIGHT);
    assert_eq!((heat.find(at(0), 1), heat.mapped()), (None, 0));
    // Over the border it is a write of both.
    mapped(&mut heat, 9000, 0, 8);
    mapped(&mut heat, 9000, 1, 9);
    let let_go: Vec<u32> = (0..CREDIT_MAX).flat_map(|_| heat.wrote(9001, at(1) - 1, 2)).collect();
    assert_eq!(let_go, [8, 9]);
}

#[test]
fn waits_grow_with_each_loss_and_begin_anew_after_a_long_life() {
    let mut heat = Heat::new(8);
    let (mut now, mut waits) = (0, Vec::new());
    for n in 0..9 {
        mapped(&mut heat, now, 0, n);
        let (place, _) = heat.find(at(0), 1).unwrap();
        assert_eq!(heat.lost(now, place), Some(n));
        assert_eq!(heat.lost(now, place), None, "once");
        let lost = now;
        while heated(&mut heat, now, 0).is_none() {
            now += 500;
        }
        waits.push(now - lost);
        heat.refused(now, 0, Refused::Limit);
        now += COOL_MS_MAX;
    }
    assert_eq!(waits, [1000, 2000, 4000, 8000, 16_000, 32_000, 64_000, 64_000, 64_000]);
    mapped(&mut heat, now, 0, 1);
    now += COOL_MS_MAX;
    let (place, _) = heat.find(at(0), 1).unwrap();
    heat.lost(now, place);
    assert!(heated(&mut heat, now + COOL_MS - 1, 0).is_none());
    assert!(heated(&mut heat, now + COOL_MS, 0).is_some());
}

#[test]
fn a_limit_holds_for_all_extents_and_a_refusal_for_its_own() {
    let mut heat = Heat::<u32>::new(8);
    heated(&mut heat, 0, 0).unwrap();
    heat.refused(0, 0, Refused::ForNow);
    assert!(heated(&mut heat, 1, 0).is_none());
    heated(&mut heat, 1, 1).unwrap();
    heat.refused(1, 1, Refused::Limit);
    assert!(heated(&mut heat, COOL_MS, 2).is_none());
    heated(&mut heat, 1 + COOL_MS, 2).unwrap();
    heat.refused(1 + COOL_MS, 2, Refused::Limit);
    assert!(heated(&mut heat, 3 * COOL_MS, 2).is_none(), "it grows");
    assert!(heated(&mut heat, 1 + 3 * COOL_MS, 2).is_some());
}

#[test]
fn the_least_recently_used_is_let_go_for_a_hotter_one_if_hardly_anybody_reads_it() {
    let mut heat = Heat::new(3);
    for n in 0..3 {
        assert_eq!(mapped(&mut heat, 0, n, u32::try_from(n).unwrap()), None);
    }
    assert!(heated(&mut heat, 10, 5).is_none(), "all are new");
    // Two are read on, the third hardly.
    for second in 1..=2 {
        for _ in 0..100 {
            assert!(heat.find(at(0), 1).is_some() && heat.find(at(2), 1).is_some());
        }
        assert!(heat.find(at(1), 1).is_some());
        heat.read(second * HALF_LIFE_MS, at(9), 1);
    }
    assert_eq!(mapped(&mut heat, 2 * HALF_LIFE_MS, 5, 5), Some(1));
    assert_eq!(heat.mapped(), 3);
    assert!(heated(&mut heat, 2 * HALF_LIFE_MS, 6).is_none(), "the others are as hot");
}

#[test]
fn a_file_that_grew_is_mapped_further_and_one_that_did_not_is_asked_ever_more_seldom() {
    let mut heat = Heat::new(8);
    heated(&mut heat, 0, 0).unwrap();
    assert_eq!(heat.made(0, 0, 1, 4096), None);
    let beyond = |heat: &mut Heat<u32>, now| (0..1000).find_map(|_| heat.read(now, 4096, 4096));
    assert!(beyond(&mut heat, COOL_MS - 1).is_none());
    assert_eq!(beyond(&mut heat, COOL_MS).unwrap().let_go, Some(1));
    heat.made(COOL_MS, 0, 2, 4096);
    assert!(beyond(&mut heat, 3 * COOL_MS - 1).is_none());
    assert_eq!(beyond(&mut heat, 3 * COOL_MS).unwrap().let_go, Some(2));
    heat.made(3 * COOL_MS, 0, 3, 9000);
    assert!(heat.find(4096, 4096).is_some());
}

#[test]
fn the_next_seat_has_none_of_the_mappings_and_all_of_the_waits() {
    let mut heat = Heat::new(8);
    mapped(&mut heat, 0, 0, 1);
    mapped(&mut heat, 0, 1, 2);
    heated(&mut heat, 0, 2).unwrap();
    let (mut next, let_go) = heat.succeed(100, 8);
    assert_eq!(let_go, [1, 2]);
    assert_eq!(heat.made(100, 2, 3, at(3)), Some(3), "nobody has use for it");
    assert!(heated(&mut heat, 9000, 0).is_none(), "the old one maps nothing more");
    assert!(heated(&mut next, 99 + COOL_MS, 0).is_none());
    assert!(heated(&mut next, 100 + COOL_MS, 0).is_some());
    next.refused(200 + COOL_MS, 0, Refused::ForNow);
    assert_eq!(next.clear(), [0u32; 0]);
}

#[derive(Clone, Debug)]
enum Act {
    Read { number: u64, offset: u64, length: u64, times: u64 },
    Write { offset: u64, length: u64 },
    Answer { granted: Option<u64>, limit: bool },
    Lose { number: u64 },
    Pass { ms: u64 },
}

fn act() -> impl Strategy<Value = Act> {
    let number = 0..90u64;
    prop_oneof![
        6 => (number.clone(), 0..EXTENT_BYTES, 1..LONG, 1..600u64)
            .prop_map(|(number, offset, length, times)| Act::Read { number, offset, length, times }),
        1 => (0..90 * EXTENT_BYTES, 1..2 * EXTENT_BYTES).prop_map(|(offset, length)| Act::Write { offset, length }),
        4 => (proptest::option::weighted(0.7, 1..=EXTENT_BYTES), any::<bool>())
            .prop_map(|(granted, limit)| Act::Answer { granted, limit }),
        1 => number.prop_map(|number| Act::Lose { number }),
        2 => (1..5_000u64).prop_map(|ms| Act::Pass { ms }),
    ]
}

proptest! {
    /// Bounded; nothing is mapped that was not read several times over; none within a wait; no mapping is mislaid.
    #[test]
    fn whatever_happens(acts in proptest::collection::vec(act(), 1..200), max in 1usize..9) {
        let (mut heat, mut now, mut wished, mut made) = (Heat::<u64>::new(max), 0, None, 0u64);
        // What each extent scored since it was last mapped, refused, lost or written; and until when it waits.
        let (mut scores, mut waits, mut limited) = (HashMap::<u64, u64>::new(), HashMap::<u64, u64>::new(), 0);
        let mut living: Vec<u64> = Vec::new();
        for act in acts {
            match act {
                Act::Read { number, offset, length, times } => for _ in 0..times {
                    let from = at(number) + offset;
                    if let Some((_, mapping)) = heat.find(from, length) {
                        prop_assert!(living.contains(&mapping));
                        continue;
                    }
                    if number_of(from, length) == Some(number) {
                        *scores.entry(number).or_default() += length.max(READ_SCORE);
                    }
                    if let Some(wish) = heat.read(now, from, length) {
                        prop_assert!(wished.is_none(), "one at a time");
                        prop_assert!(scores.remove(&wish.number) >= Some(HOT_SCORE), "cold");
                        prop_assert!(waits.get(&wish.number).is_none_or(|until| now >= *until) && now >= limited);
                        living.retain(|mapping| Some(*mapping) != wish.let_go);
                        wished = Some(wish.number);
                    }
                },
                Act::Write { offset, length } => {
                    let let_go = heat.wrote(now, offset, length);
                    living.retain(|mapping| !let_go.contains(mapping));
                }
                Act::Answer { granted, limit } => if let Some(number) = wished.take() {
                    match granted {
                        Some(length) => {
                            made += 1;
                            prop_assert_eq!(heat.made(now, number, made, at(number) + length), None);
                            living.push(made);
                        }
                        None if limit => {
                            heat.refused(now, number, Refused::Limit);
                            limited = now + COOL_MS;
                        }
                        None => {
                            heat.refused(now, number, Refused::ForNow);
                            waits.insert(number, now + COOL_MS);
                        }
                    }
                },
                Act::Lose { number } => if let Some((place, mapping)) = heat.find(at(number), 1) {
                    prop_assert_eq!(heat.lost(now, place), Some(mapping));
                    living.retain(|living| *living != mapping);
                    waits.insert(number, now + COOL_MS);
                },
                Act::Pass { ms } => now += ms,
            }
            prop_assert!(heat.extents.len() <= EXTENTS_MAX);
            prop_assert!(heat.mapped() <= max);
            prop_assert_eq!(heat.mapped(), living.len() + usize::from(wished.is_some()));
        }
        let mut let_go = heat.clear();
        let_go.sort_unstable();
        living.sort_unstable();
        prop_assert_eq!(let_go, living);
    }
}
