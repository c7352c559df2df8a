//! What locks forbid, against a model that looks at every byte.

use super::*;
use crate::types::{Access, ByteRange, io_conflict, io_rules_ordered};
use proptest::prelude::*;

const BOTH: Access = Access::READ.union(Access::WRITE);
/// Bytes looked at.
const BYTES: u64 = 24;

fn rule(offset: u64, length: u64, deny: Access) -> IoRule {
    IoRule { range: ByteRange::new(offset, length).unwrap(), deny }
}

#[test]
fn lck_01_what_each_open_may_do() {
    let mut table = Table::new();
    table.lock(&open(1, 1), &[item(Exclusive, 10, 0), item(Shared, 10, 20)]).unwrap();
    let rules = |table: &Table, of| table.0.io_rules(FILE, id(of), |_| true);
    assert_eq!(
        rules(&table, 1),
        [rule(20, 10, Access::WRITE)],
        "a shared lock forbids the holder's writes too"
    );
    assert_eq!(rules(&table, 2), [rule(0, 10, BOTH), rule(20, 10, Access::WRITE)]);
    table.lock(&open(2, 1), &[item(Shared, 10, 25), item(Shared, 5, 10), item(Exclusive, 0, 50)]).unwrap();
    let shared = [rule(10, 5, Access::WRITE), rule(20, 15, Access::WRITE)];
    assert_eq!(rules(&table, 1), shared);
    assert_eq!(rules(&table, 3), [&[rule(0, 10, BOTH)], &shared[..]].concat());
    assert_eq!(table.0.io_rules(FILE, id(3), |of| of != id(1)), [shared[0], rule(25, 10, Access::WRITE)]);
    assert_eq!(rules(&Table::new(), 1), []);
}

#[test]
fn advisory_locks_and_those_beyond_a_file_forbid_nothing() {
    let mut table = Table::new();
    table.lock(&process(1, 1), &[item(Exclusive, 10, 0)]).unwrap();
    table.lock(&open(2, 1), &[item(Exclusive, 1, 1 << 63), item(Exclusive, 0, 100)]).unwrap();
    table.lock(&open(2, 1), &[item(Exclusive, 10, (1 << 63) - 5)]).unwrap_err();
    table.lock(&open(2, 1), &[item(Exclusive, 5, (1 << 63) - 5)]).unwrap();
    let end = ByteRange::END_MAX;
    assert_eq!(table.0.io_rules(FILE, id(3), |_| true), [rule(end - 4, 4, BOTH)]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]
    #[test]
    fn lck_01_rules_say_what_the_locks_say(
        locks in proptest::collection::vec((1u8..4, any::<bool>(), 0u64..6, 0..BYTES), 0..12),
        expired in 1u8..5,
    ) {
        let mut table = Table::new();
        let mut held = Vec::new();
        for (of, exclusive, length, offset) in locks {
            let item = item(if exclusive { Exclusive } else { Shared }, length, offset);
            if table.lock(&open(of, 1), &[item]).is_ok() {
                held.push((of, item));
            }
        }
        for of in 1..5 {
            let rules = table.0.io_rules(FILE, id(of), |holder| holder != id(expired));
            assert!(io_rules_ordered(&rules));
            for (rule, next) in rules.iter().zip(rules.iter().skip(1)) {
                let touch = rule.range.end() == next.range.offset();
                assert!(!(touch && rule.deny == next.deny), "two rules where one would do: {rules:?}");
            }
            let refused = |byte: u64, access: Access| held.iter().any(|(holder, item)| {
                let covers = item.range.offset() <= byte && byte < item.range.offset() + item.range.length();
                *holder != expired && covers && match item.kind {
                    Exclusive => *holder != of,
                    Shared => access.contains(Access::WRITE),
                }
            });
            for access in [Access::READ, Access::WRITE, BOTH] {
                for offset in 0..BYTES + 6 {
                    for length in 0..8 {
                        let wanted = (offset..offset + length).any(|byte| refused(byte, access));
                        let range = ByteRange::new(offset, length).unwrap();
                        assert_eq!(io_conflict(&rules, range, access), wanted, "{range:?} of {of} in {rules:?}");
                    }
                }
            }
        }
    }
}
