//! Opens that are taken from their owners, and resumes that fail: what is told, and what goes on meanwhile.

use super::world::*;
use crate::state::{Effect, Input, Limits, OpenState};
use crate::types::{Access, HoldClass, OpenId, SessionId, ShareMode, Status, Verdict};
use crate::wire::control::{Gone, Open, Opened, Reply, Request, SetAttributes, Target};
use crate::wire::link::{Restrict, Restricted};
use std::time::Duration;

/// With a dataplane that holds nothing.
fn linked() -> World {
    let mut world = World::new();
    world.give(Input::LinkUp { service_blob: Vec::new(), held: Vec::new() });
    world
}

fn gone(effects: &[Effect]) -> Gone {
    match effects {
        [Effect::Reply { reply: Reply::Gone(gone), .. }] => *gone,
        other => panic!("not gone: {other:?}"),
    }
}

fn restricts(effects: &[Effect], open: OpenId) -> Vec<Restrict> {
    let of_open = |effect: &Effect| match effect {
        Effect::Restrict(restrict) if restrict.open == open => Some(restrict.clone()),
        _ => None,
    };
    effects.iter().filter_map(of_open).collect()
}

/// Another principal's open of the file, with a binding.
fn beside(world: &mut World, session: SessionId, create: u8) -> Opened {
    let opened = world.open(session, held(create, RW, ShareMode::ALL, 60_000), 5);
    world.bind(&session_key(2), &opened, 1);
    opened
}

#[test]
fn who_writes_while_an_open_is_taken_away_is_told_in_the_end() {
    for before in [false, true] {
        let mut world = linked();
        let first = world.begin(1, "u1");
        let rival = world.begin(2, "u2");
        let taken = world.open(first, held(1, RW, ShareMode::ALL, 60_000), 5);
        world.bind(&session_key(1), &taken, 1);
        if before {
            world.open(rival, held(2, RW, ShareMode::ALL, 60_000), 5);
        }
        let asked = fences(&world.give(Input::ForceClose(taken.open)));
        if !before {
            world.open(rival, held(2, RW, ShareMode::ALL, 60_000), 5);
        }
        // It wrote before the last look at the file.
        world.touch(5);
        let effects = world.confirm(asked[0]);
        world.look(effects, 5);
        let second = world.begin(3, "u1");
        assert!(gone(&world.resume(second, &taken, 5)).changed, "{before}");
    }
}

#[test]
fn rsm_17_what_an_earlier_resume_waited_for_does_not_serve_a_later_one() {
    let mut world = linked();
    let first = world.begin(1, "u1");
    let away = world.open(first, held(1, RW, ShareMode::ALL, 1000), 5);
    assert!(done(&world.ask(first, lock(away.open, 1, 0, 10))));
    let rival = world.begin(2, "u2");
    let other = beside(&mut world, rival, 2);
    world.lose(first, 5);
    world.pass(Duration::from_secs(2));
    let second = world.begin(3, "u1");
    let asked = restricts(&world.ask(second, resume(&away, None)), other.open);
    world.give(Input::SessionLost(second));
    let third = world.begin(4, "u1");
    let again = restricts(&world.ask(third, resume(&away, None)), other.open);
    let confirm = |world: &mut World, restrict: &Restrict| {
        world.give(Input::Restricted(Restricted { open: restrict.open, version: restrict.version }))
    };
    assert!(!confirm(&mut world, &asked[0]).iter().any(|effect| matches!(effect, Effect::Inspect { .. })));
    let effects = confirm(&mut world, again.last().unwrap());
    let after = resumed(&world.look(effects, 5));
    assert_eq!((after.verdict, after.opened.epoch), (Verdict::Changed, 2));
}

#[test]
fn a_resume_with_locks_waits_for_changes_of_size_that_others_began() {
    let mut world = linked();
    let first = world.begin(1, "u1");
    let away = world.open(first, held(1, RW, ShareMode::ALL, 1000), 5);
    assert!(done(&world.ask(first, lock(away.open, 1, 0, 10))));
    let rival = world.begin(2, "u2");
    let other = world.open(rival, held(2, RW, ShareMode::ALL, 60_000), 5);
    world.lose(first, 5);
    world.pass(Duration::from_secs(2));
    // An expired open's locks allow it.
    let set = SetAttributes {
        target: Target::Open(other.open),
        size: None,
        mode: Some(0o600),
        accessed: None,
        modified: None,
    };
    let effects = world.ask(rival, Request::SetAttributes(set));
    let [Effect::Perform { operation, .. }] = &effects[..] else { panic!("{effects:?}") };
    let second = world.begin(3, "u1");
    assert!(world.ask(second, resume(&away, None)).is_empty());
    let effects = world.performed(*operation, 5);
    let (looks, answers): (Vec<Effect>, Vec<Effect>) =
        effects.into_iter().partition(|effect| matches!(effect, Effect::Inspect { .. }));
    assert!(matches!(&answers[..], [Effect::Reply { reply: Reply::Attributes(_), .. }]), "{answers:?}");
    resumed(&world.look(looks, 5));
}

#[test]
fn one_eviction_at_a_time_makes_room() {
    let limits = Limits { opens_per_principal: 3, ..Limits::default() };
    let mut world = World::with(limits, 1);
    let first = world.begin(1, "u1");
    world.give(Input::LinkUp { service_blob: Vec::new(), held: Vec::new() });
    for n in 1..=3 {
        let opened = world.open(first, held(n, RW, ShareMode::ALL, 1000), n.into());
        world.bind(&session_key(1), &opened, n);
    }
    world.give(Input::SessionLost(first));
    world.pass(Duration::from_secs(2));
    let second = world.begin(2, "u1");
    for _ in 0..3 {
        assert_eq!(world.refused(second, Request::Open(held(9, RW, ShareMode::ALL, 1000))), Status::TooMany);
    }
    let there = world.authority.list_opens(world.now, None, 9);
    assert_eq!(there.iter().filter(|view| matches!(view.state, OpenState::Closing)).count(), 1);
}

#[test]
fn locks_of_an_expired_open_restrict_nobody_while_it_is_evicted() {
    let mut world = linked();
    let first = world.begin(1, "u1");
    let away = world.open(first, held(1, RW, ShareMode::ALL, 1000), 5);
    world.bind(&session_key(1), &away, 1);
    assert!(done(&world.ask(first, lock(away.open, 1, 0, 10))));
    let rival = world.begin(2, "u2");
    let other = beside(&mut world, rival, 2);
    world.lose(first, 5);
    let expired = restricts(&world.pass(Duration::from_secs(2)), other.open);
    assert!(expired.last().unwrap().rules.is_empty());
    // It wants the lock: the expired open is evicted.
    let effects = world.ask(rival, lock(other.open, 1, 0, 10));
    assert!(restricts(&effects, other.open).iter().all(|restrict| restrict.rules.is_empty()));
    assert!(!fences(&effects).is_empty() || world.authority.counts().fences > 0);
    let effects = world.ask(rival, lock(other.open, 2, 100, 10));
    assert!(restricts(&effects, other.open).iter().all(|restrict| restrict.rules.is_empty()));
}

#[test]
fn lck_07_numbers_that_leave_no_room_for_others_are_refused() {
    let mut world = World::new();
    let first = world.begin(1, "u1");
    let opened = world.open(first, held(1, RW, ShareMode::ALL, 1000), 5);
    for number in [u64::MAX, u64::MAX - 31] {
        assert_eq!(world.refused(first, lock(opened.open, number, 0, 10)), Status::Invalid);
    }
    assert!(done(&world.ask(first, lock(opened.open, u64::MAX - 32, 0, 10))));
    assert!(done(&world.ask(first, lock(opened.open, u64::MAX - 32, 0, 10))));
    assert_eq!(world.authority.counts().locks, 1);
}

#[test]
fn who_supersedes_a_live_open_is_not_too_late() {
    let mut world = World::new();
    let first = world.begin(1, "u1");
    let opened = world.open(first, open(1, RW, ShareMode::NONE), 5);
    let second = world.begin(2, "u1");
    let effects = world.ask(second, resume(&opened, Some(first)));
    let effects = world.look(effects, 5);
    let replies: Vec<Effect> =
        effects.into_iter().filter(|effect| matches!(effect, Effect::Reply { .. })).collect();
    assert_eq!(resumed(&replies).verdict, Verdict::Unchanged);
}

#[test]
fn who_is_asked_again_waits_no_longer_for_that() {
    let mut world = linked();
    let first = world.begin(1, "u1");
    let yields =
        |create| Open { class: HoldClass::Yield, ..held(create, Access::READ, ShareMode::ALL, 60_000) };
    for n in 1..=2 {
        let away = world.open(first, yields(n), 5);
        world.bind(&session_key(1), &away, n);
    }
    world.lose(first, 5);
    let rival = world.begin(2, "u2");
    let asked = fences(&world.try_open(rival, open(1, RW, ShareMode::NONE), 5));
    assert_eq!(asked.len(), 2);
    let fence_wait = Limits::default().fence_wait;
    world.pass(fence_wait / 2);
    // One is gone: it is asked again, and waits for the other.
    let effects = world.confirm(asked[0]);
    let mut found = Vec::new();
    for effect in world.look(effects, 5) {
        if let Effect::OpenFile { operation, .. } = effect {
            found.extend(world.found(operation, 5, false));
        }
    }
    assert_eq!(world.authority.counts().contenders, 1, "{found:?}");
    let effects = world.pass(fence_wait - fence_wait / 2);
    assert_eq!(refusal(&effects), Status::Busy);
}
