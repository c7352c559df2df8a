//! Lock requests and what dataplane must have done before they are answered.

use super::world::*;
use crate::state::rules::LockMode;
use crate::state::{Effect, Input, Work};
use crate::types::{
    Access, Disposition, HoldClass, LockItem, LockKind, LockRange, OpenId, SessionId, ShareMode, Status,
};
use crate::wire::control::{CancelLock, Lock, Open, Opened, Reply, Request, SetAttributes, Target, Unlock};
use crate::wire::link::{Held, LinkBinding, Restrict, Restricted};
use std::time::Duration;

/// Two clients with an open each of file 5, both bound.
fn two() -> (World, [SessionId; 2], [Opened; 2]) {
    let mut world = World::new();
    let sessions = [world.begin(1, "u1"), world.begin(2, "u2")];
    world.give(Input::LinkUp { service_blob: Vec::new(), held: Vec::new() });
    let opens = sessions.map(|session| world.open(session, held(1, RW, ShareMode::ALL, 1000), 5));
    for (n, opened) in [1, 2].into_iter().zip(&opens) {
        world.bind(&session_key(n), opened, n);
    }
    (world, sessions, opens)
}

fn restricts(effects: &[Effect]) -> Vec<Restrict> {
    let restrict = |effect: &Effect| match effect {
        Effect::Restrict(restrict) => Some(restrict.clone()),
        _ => None,
    };
    effects.iter().filter_map(restrict).collect()
}

fn obey(world: &mut World, restrict: &Restrict) -> Vec<Effect> {
    world.give(Input::Restricted(Restricted { open: restrict.open, version: restrict.version }))
}

/// Dataplane obeys whatever it is told; all effects.
fn obey_all(world: &mut World, mut effects: Vec<Effect>) -> Vec<Effect> {
    let mut told = 0;
    while let Some(restrict) = restricts(&effects).get(told) {
        told += 1;
        effects.extend(obey(world, restrict));
    }
    effects
}

fn waits(request: Request, wait_ms: u64) -> Request {
    match request {
        Request::Lock(lock) => Request::Lock(Lock { wait_ms: Some(wait_ms), ..lock }),
        other => other,
    }
}

fn shared(open: OpenId, sequence: u64, offset: u64, length: u64) -> Request {
    let range = LockRange::new(offset, length).unwrap();
    let locks = vec![LockItem { range, kind: LockKind::Shared }];
    Request::Lock(Lock { open, sequence, owner: 0, locks, wait_ms: None })
}

#[test]
fn lck_01_others_are_told_what_they_may_not_touch() {
    let (mut world, sessions, opens) = two();
    let effects = world.ask(sessions[0], lock(opens[0].open, 1, 10, 5));
    let told = restricts(&effects);
    assert_eq!((effects.len(), told.len(), told[0].open), (1, 1, opens[1].open), "not the holder");
    assert_eq!((told[0].rules[0].range.offset(), told[0].rules[0].deny), (10, RW));
    assert!(done(&obey(&mut world, &told[0])));
    // Shared: nobody writes, the holder included.
    let effects = world.ask(sessions[0], shared(opens[0].open, 2, 20, 5));
    let told = restricts(&effects);
    assert_eq!(told.iter().map(|told| told.open).collect::<Vec<_>>(), [opens[0].open, opens[1].open]);
    assert!(told.iter().all(|told| told.rules.last().map(|rule| rule.deny) == Some(Access::WRITE)));
    assert!(obey(&mut world, &told[1]).is_empty());
    assert!(done(&obey(&mut world, &told[0])));
    // A bind carries what is in force.
    let grant = world.redeem(right(&session_key(2), &opens[1], 7, RW)).unwrap();
    assert_eq!((grant.rules.clone(), grant.rules_version), (told[1].rules.clone(), told[1].version));
}

#[test]
fn lck_02_all_handles_of_an_open_are_equal_and_others_are_not() {
    let (mut world, sessions, opens) = two();
    world.give(Input::LinkLost);
    assert!(done(&world.ask(sessions[0], lock(opens[0].open, 1, 0, 10))));
    assert_eq!(world.refused(sessions[1], lock(opens[1].open, 1, 5, 1)), Status::LockNotGranted);
    assert_eq!(world.refused(sessions[1], unlock(opens[1].open, 1, 0, 10)), Status::NotLocked);
    assert_eq!(world.refused(sessions[1], unlock(opens[0].open, 1, 0, 10)), Status::Closed);
    assert_eq!(world.refused(sessions[0], unlock(opens[0].open, 2, 0, 9)), Status::NotLocked);
    assert!(done(&world.ask(sessions[0], unlock(opens[0].open, 2, 0, 10))));
    assert!(done(&world.ask(sessions[1], lock(opens[1].open, 1, 5, 1))));
}

#[test]
fn a_repeated_change_is_answered_and_not_executed_again() {
    let (mut world, sessions, opens) = two();
    let request = lock(opens[0].open, 1, 0, 10);
    let told = restricts(&world.ask(sessions[0], request.clone()));
    // While it is under way it is joined.
    assert!(world.ask(sessions[0], request.clone()).is_empty());
    let effects = obey(&mut world, &told[0]);
    assert_eq!(effects.len(), 2, "each request has its answer");
    let before = world.journal.len();
    assert!(done(&world.ask(sessions[0], request)));
    world.give(Input::LinkLost);
    assert!(done(&world.ask(sessions[0], unlock(opens[0].open, 2, 0, 10))));
    assert!(done(&world.ask(sessions[0], unlock(opens[0].open, 2, 0, 10))));
    assert_eq!((world.journal.len(), world.authority.counts().locks), (before + 1, 0));
    // What was refused was not executed, and may be asked again under its number.
    assert_eq!(world.refused(sessions[0], unlock(opens[0].open, 3, 0, 10)), Status::NotLocked);
    assert!(done(&world.ask(sessions[0], lock(opens[0].open, 3, 0, 10))));
    for sequence in 4..=35 {
        assert!(done(&world.ask(sessions[0], shared(opens[0].open, sequence, 100, 1))));
    }
    assert_eq!(world.refused(sessions[0], unlock(opens[0].open, 3, 0, 10)), Status::Invalid, "forgotten");
    assert!(done(&world.ask(sessions[0], shared(opens[0].open, 4, 100, 1))), "the last 32 are known");
    assert_eq!(world.refused(sessions[0], shared(opens[0].open, 0, 100, 1)), Status::Invalid);
}

#[test]
fn lck_07_a_waiter_is_answered_once_or_vanishes_and_the_next_is_granted() {
    for how in ["cancel", "close", "logoff", "drop", "time", "granted"] {
        let (mut world, sessions, opens) = two();
        world.give(Input::LinkLost);
        let third = world.begin(3, "u2");
        let next = world.open(third, held(3, RW, ShareMode::ALL, 1000), 5);
        assert!(done(&world.ask(sessions[0], lock(opens[0].open, 1, 0, 10))));
        assert!(world.ask(sessions[1], waits(lock(opens[1].open, 1, 0, 5), 500)).is_empty());
        assert!(world.ask(third, waits(lock(next.open, 1, 0, 5), 60_000)).is_empty());
        assert!(world.ask(sessions[1], lock(opens[1].open, 1, 0, 5)).is_empty(), "repeated: joined");
        let cancel = CancelLock { open: opens[1].open, sequence: 1 };
        let effects = match how {
            "cancel" => world.ask(sessions[1], Request::CancelLock(cancel)),
            "close" => world.ask(sessions[1], close(opens[1].open)),
            "logoff" => world.ask(sessions[1], Request::Logoff),
            "drop" => world.give(Input::SessionLost(sessions[1])),
            "time" => world.pass(Duration::from_millis(500)),
            _ => Vec::new(),
        };
        let refusals: Vec<Status> = effects
            .iter()
            .filter_map(|effect| match effect {
                Effect::Reply { reply: Reply::Refused(refusal), .. } => Some(refusal.status),
                _ => None,
            })
            .collect();
        let wanted = match how {
            "cancel" => vec![Status::Cancelled; 2],
            "close" | "logoff" => vec![Status::Closed; 2],
            "time" => vec![Status::LockNotGranted; 2],
            _ => Vec::new(),
        };
        assert_eq!(refusals, wanted, "{how}");
        world.look(effects, 5);
        let effects = world.ask(sessions[0], unlock(opens[0].open, 2, 0, 10));
        let told = |session| {
            let to = |effect: &&Effect| matches!(effect, Effect::Reply { session: to, .. } if *to == session);
            effects.iter().filter(to).count()
        };
        assert_eq!(told(sessions[0]), 1);
        let granted = how == "granted";
        assert_eq!(
            (told(sessions[1]), told(third)),
            (if granted { 2 } else { 0 }, usize::from(!granted)),
            "{how}"
        );
        let left = world.authority.counts();
        assert_eq!((left.locks, left.lock_waiters), (1, usize::from(granted)), "{how}");
    }
}

#[test]
fn lck_09_an_unlock_waits_for_its_own_io_and_a_grant_for_the_others() {
    let (mut world, sessions, opens) = two();
    let told = restricts(&world.ask(sessions[0], lock(opens[0].open, 1, 0, 10)));
    obey(&mut world, &told[0]);
    assert!(world.ask(sessions[1], waits(lock(opens[1].open, 1, 0, 10), 60_000)).is_empty());
    let effects = world.ask(sessions[0], unlock(opens[0].open, 2, 0, 10));
    let drain = restricts(&effects);
    assert_eq!((effects.len(), drain[0].open), (1, opens[0].open));
    assert_eq!(world.authority.counts().locks, 1, "not before its I/O has ended");
    // Another open's lock there is refused until then, and an old confirmation means nothing.
    let stale = Restrict { version: drain[0].version - 1, ..drain[0].clone() };
    assert!(obey(&mut world, &stale).is_empty());
    let effects = obey(&mut world, &drain[0]);
    let told = restricts(&effects);
    assert!(!effects.iter().any(|effect| matches!(effect, Effect::Reply { .. })));
    // Now the second holds it: the first must obey before the second is told.
    assert_eq!(
        world.authority.list_opens(world.now, None, 10).iter().map(|o| o.locks.len()).sum::<usize>(),
        1
    );
    let mut answers = Vec::new();
    for told in &told {
        answers.extend(obey(&mut world, told));
    }
    let to: Vec<SessionId> = answers
        .iter()
        .filter_map(|effect| match effect {
            Effect::Reply { session, reply: Reply::Done, .. } => Some(*session),
            _ => None,
        })
        .collect();
    assert!(to.contains(&sessions[0]) && to.contains(&sessions[1]) && to.len() == 2, "{answers:?}");
}

#[test]
fn lck_09_a_grant_waits_for_a_size_change_under_way() {
    let (mut world, sessions, opens) = two();
    world.give(Input::LinkLost);
    let target = Target::Open(opens[1].open);
    let set = SetAttributes { target, size: Some(0), mode: None, accessed: None, modified: None };
    let effects = world.ask(sessions[1], Request::SetAttributes(set.clone()));
    let [Effect::Perform { operation, work: Work::SetAttributes(..) }] = effects[..] else {
        panic!("{effects:?}")
    };
    assert!(world.ask(sessions[0], lock(opens[0].open, 1, 0, 10)).is_empty());
    let effects = world.performed(operation, 5);
    assert!(effects.iter().any(|effect| matches!(effect, Effect::Reply { reply: Reply::Done, .. })));
    assert_eq!(world.refused(sessions[1], Request::SetAttributes(set)), Status::LockConflict);
}

#[test]
fn a_lost_link_or_a_lost_binding_obeys() {
    for how in 0..3 {
        let (mut world, sessions, opens) = two();
        assert_eq!(restricts(&world.ask(sessions[0], lock(opens[0].open, 1, 0, 10))).len(), 1);
        assert!(world.give(Input::LinkDown).is_empty());
        let told = match how {
            0 => world.give(Input::LinkLost),
            1 => world.give(Input::Released(LinkBinding(2))),
            // It comes back with the binding, and is asked again.
            _ => {
                let held = Held {
                    binding: LinkBinding(2),
                    open: opens[1].open,
                    handle: opens[1].handle,
                    epoch: 1,
                    access: RW,
                    ending: false,
                    last_write_ns: 0,
                    rules_version: 0,
                    transcript: [0; 32],
                };
                let effects = world.give(Input::LinkUp { service_blob: Vec::new(), held: vec![held] });
                let told = restricts(&effects);
                assert_eq!((effects.len(), told[0].open), (1, opens[1].open));
                obey(&mut world, &told[0])
            }
        };
        assert!(done(&told), "{told:?}");
    }
}

#[test]
fn lck_11_truncation_obeys_the_locks_of_others() {
    let (mut world, sessions, opens) = two();
    world.give(Input::LinkLost);
    world.size = 100;
    assert!(done(&world.ask(sessions[0], lock(opens[0].open, 1, 50, 10))));
    let overwrite = Open { disposition: Disposition::Overwrite, ..held(9, RW, ShareMode::ALL, 1000) };
    assert_eq!(refusal(&world.try_open(sessions[1], overwrite.clone(), 5)), Status::LockConflict);
    let by_name = |size| {
        let target = Target::Path(place("file"));
        let set = SetAttributes { target, size: Some(size), mode: None, accessed: None, modified: None };
        Request::SetAttributes(set)
    };
    for (size, allowed) in [(100, true), (60, true), (59, false), (0, false), (200, true)] {
        let effects = world.ask(sessions[1], by_name(size));
        let [Effect::OpenFile { operation, .. }] = effects[..] else { panic!("{effects:?}") };
        let opened = world.opened(5, false);
        let effects = world.give(Input::FileOpened { operation, result: Ok(opened) });
        let performs = matches!(effects[..], [Effect::Perform { .. }]);
        assert_eq!(performs, allowed, "to {size}");
        if allowed {
            world.performed(operation, 5);
        } else {
            assert_eq!(refusal(&effects), Status::LockConflict);
        }
    }
    assert!(done(&world.ask(sessions[0], unlock(opens[0].open, 2, 50, 10))));
    opened(&world.try_open(sessions[1], overwrite, 5));
}

#[test]
fn locks_of_a_detached_open_hold_back_give_way_and_stop_counting() {
    for class in [HoldClass::Hold, HoldClass::Yield] {
        for expired in [false, true] {
            let mut world = World::new();
            let (first, second) = (world.begin(1, "u1"), world.begin(2, "u2"));
            world.give(Input::LinkUp { service_blob: Vec::new(), held: Vec::new() });
            let theirs = world.open(first, Open { class, ..held(1, RW, ShareMode::ALL, 1000) }, 5);
            let mine = world.open(second, held(1, RW, ShareMode::ALL, 1000), 5);
            world.bind(&session_key(2), &mine, 1);
            let told = restricts(&world.ask(first, lock(theirs.open, 1, 0, 10)));
            obey(&mut world, &told[0]);
            world.lose(first, 5);
            if expired {
                // Its locks restrict nobody's I/O any more.
                let told = restricts(&world.pass(Duration::from_secs(1)));
                assert!(told.len() == 1 && told[0].rules.is_empty());
                obey(&mut world, &told[0]);
            }
            let effects = world.ask(second, lock(mine.open, 1, 0, 10));
            let effects = obey_all(&mut world, effects);
            if class == HoldClass::Hold && !expired {
                assert_eq!(refusal(&effects), Status::Busy);
                assert!(world.ask(second, waits(lock(mine.open, 2, 0, 10), 5000)).is_empty());
                let effects = world.pass(Duration::from_secs(1));
                let effects = obey_all(&mut world, effects);
                assert!(
                    effects.iter().any(|e| matches!(e, Effect::Reply { reply: Reply::Done, .. })),
                    "{effects:?}"
                );
            } else {
                assert!(
                    effects.iter().any(|e| matches!(e, Effect::Reply { reply: Reply::Done, .. })),
                    "{effects:?}"
                );
            }
            assert_eq!(world.authority.counts().tombstones, 1);
        }
    }
}

#[test]
fn a_resume_puts_expired_locks_in_force_before_it_is_answered() {
    let (mut world, sessions, opens) = two();
    let told = restricts(&world.ask(sessions[0], lock(opens[0].open, 1, 0, 10)));
    obey(&mut world, &told[0]);
    world.lose(sessions[0], 5);
    let loosened = world.pass(Duration::from_secs(5));
    let effects = obey(&mut world, &restricts(&loosened)[0]);
    assert!(effects.is_empty());
    let third = world.begin(3, "u1");
    let mut effects = world.ask(third, resume(&opens[0], None));
    let fence = fences(&loosened)[0];
    effects.extend(world.confirm(fence));
    let effects = world.look(effects, 5);
    let told = restricts(&effects);
    assert_eq!((told.len(), told[0].open, told[0].rules.len()), (1, opens[1].open, 1));
    assert!(!effects.iter().any(|effect| matches!(effect, Effect::Reply { .. })));
    let effects = obey(&mut world, &told[0]);
    assert!(!resumed(&world.look(effects, 5)).locks_kept);
}

#[test]
fn advisory_volumes_restrict_no_io_and_know_owners_across_opens() {
    let mut world = World::with_mode(LockMode::Advisory);
    let session = world.begin(1, "u1");
    world.give(Input::LinkUp { service_blob: Vec::new(), held: Vec::new() });
    let opens = [1, 2].map(|n| world.open(session, held(n, RW, ShareMode::ALL, 1000), 5));
    let rival = world.begin(2, "u2");
    let other = world.open(rival, held(1, RW, ShareMode::ALL, 1000), 5);
    world.bind(&session_key(2), &other, 1);
    assert!(done(&world.ask(session, lock(opens[0].open, 1, 0, 100))));
    assert_eq!(world.refused(rival, lock(other.open, 1, 50, 10)), Status::LockNotGranted);
    // The same process through its other open: its lock is cut.
    assert!(done(&world.ask(session, unlock(opens[1].open, 1, 50, 10))));
    assert!(done(&world.ask(rival, lock(other.open, 1, 50, 10))));
    let locks = |world: &World, n: usize| {
        let views = world.authority.list_opens(world.now, None, 10);
        views.iter().find(|view| view.open == opens[n].open).map(|view| view.locks.len())
    };
    assert_eq!((locks(&world, 0), locks(&world, 1)), (Some(2), Some(0)));
    let recovered = world.recover();
    assert_eq!(recovered.authority.counts().locks, 3);
    let empty = Unlock { open: other.open, sequence: 2, owner: 0, ranges: vec![LockRange::before(5)] };
    assert_eq!(world.refused(rival, Request::Unlock(empty)), Status::BadRange);
}

#[test]
fn a_lock_that_not_everybody_obeys_is_not_told_when_its_open_ends() {
    for ending in ["close", "force", "logoff"] {
        let (mut world, sessions, opens) = two();
        assert_eq!(restricts(&world.ask(sessions[0], lock(opens[0].open, 1, 0, 10))).len(), 1);
        let effects = match ending {
            "close" => world.ask(sessions[0], close(opens[0].open)),
            "force" => world.give(Input::ForceClose(opens[0].open)),
            _ => world.ask(sessions[0], Request::Logoff),
        };
        let wanted = if ending == "force" { Status::ForceClosed } else { Status::Closed };
        assert_eq!(refusal(&effects), wanted, "{ending}");
    }
}

#[test]
fn io_is_let_go_of_when_the_end_of_the_lock_is_durable_and_not_before() {
    for close_it in [false, true] {
        let (mut world, sessions, opens) = two();
        let told = restricts(&world.ask(sessions[0], lock(opens[0].open, 1, 0, 10)));
        assert!(done(&obey(&mut world, &told[0])));
        world.holds_journal = true;
        let effects = if close_it {
            let effects = world.ask(sessions[0], close(opens[0].open));
            world.confirm(fences(&effects)[0])
        } else {
            let effects = world.ask(sessions[0], unlock(opens[0].open, 2, 0, 10));
            obey(&mut world, &restricts(&effects)[0])
        };
        assert!(effects.is_empty(), "a crash would bring the lock back: {effects:?}");
        assert_eq!(world.redeem(right(&session_key(2), &opens[1], 8, RW)).err(), Some(Status::Unavailable));
        // What forbids more does not overtake it.
        assert!(
            restricts(&world.ask(sessions[1], shared(opens[1].open, 1, 50, 1)))
                .iter()
                .all(|told| told.open != opens[1].open)
        );
        let told = restricts(&world.sync());
        let mine: Vec<&Restrict> = told.iter().filter(|told| told.open == opens[1].open).collect();
        assert!(mine[0].rules.is_empty() && mine[1].rules.len() == 1, "{told:?}");
        world.redeem(right(&session_key(2), &opens[1], 8, RW)).unwrap();
    }
}
