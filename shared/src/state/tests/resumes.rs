//! Detached opens: who gets in their way, who gets them back, and what is told.

use super::world::*;
use crate::journal::record::Record;
use crate::state::{Effect, Input, Limits, Work};
use crate::types::{
    Access, Disposition, GoneReason, HoldClass, OpenId, SessionId, ShareMode, Status, Verdict,
};
use crate::wire::control::{
    Gone, Open, Opened, Refusal, Rename, Reply, Request, Resume, SetAttributes, Target,
};
use std::time::Duration;

const HOLD: Duration = Duration::from_millis(1000);
const TICK: Duration = Duration::from_nanos(1);

/// An open of session 1 on file 5, held for a second, whose session is lost at time 0.
fn orphan(access: Access, share: ShareMode) -> (World, Opened) {
    let mut world = World::new();
    let session = world.begin(1, "u1");
    let opened = world.open(session, held(1, access, share, 1000), 5);
    world.lose(session, 5);
    (world, opened)
}

fn gone(effects: &[Effect]) -> Gone {
    match effects {
        [Effect::Reply { reply: Reply::Gone(gone), .. }] => *gone,
        other => panic!("not told that it is gone: {other:?}"),
    }
}

fn busy_ms(effects: &[Effect]) -> Option<u64> {
    let replies = effects.iter().find_map(|effect| match effect {
        Effect::Reply { reply: Reply::Refused(Refusal { status: Status::Busy, retry_ms, .. }), .. } => {
            Some(*retry_ms)
        }
        _ => None,
    });
    replies.unwrap_or_else(|| panic!("not busy: {effects:?}"))
}

/// Opens a contender's file until the authority has an answer.
fn contend(world: &mut World, session: SessionId, request: Open) -> Vec<Effect> {
    let mut effects = world.try_open(session, request, 5);
    loop {
        effects = world.look(effects, 5);
        let again = effects.iter().find_map(|effect| match effect {
            Effect::OpenFile { operation, .. } => Some(*operation),
            _ => None,
        });
        match again {
            Some(operation) => effects = world.found(operation, 5, false),
            None => return effects,
        }
    }
}

#[test]
fn rsm_01_within_the_hold_time_everything_is_as_it_was() {
    let mut world = World::new();
    let first = world.begin(1, "u1");
    world.give(Input::LinkUp { service_blob: Vec::new(), held: Vec::new() });
    let before = world.open(first, held(1, RW, ShareMode::NONE, 1000), 5);
    world.bind(&session_key(1), &before, 1);
    for (sequence, offset) in [(1, 0), (2, 10), (3, 20)] {
        assert!(done(&world.ask(first, lock(before.open, sequence, offset, 5))));
    }
    world.touch(5); // Its own write.
    world.lose(first, 5);
    let rival = world.begin(2, "u2");
    assert_eq!(busy_ms(&world.try_open(rival, open(1, RW, ShareMode::ALL), 5)), Some(1000));
    let second = world.begin(3, "u1");
    let effects = world.ask(second, resume(&before, None));
    let asked = fences(&effects);
    assert_eq!((asked.len(), asked[0].reason), (1, Status::Superseded));
    assert!(!effects.iter().any(|effect| matches!(effect, Effect::Reply { .. })), "fence first");
    let effects = world.confirm(asked[0]);
    let after = resumed(&world.look(effects, 5));
    assert_eq!((after.verdict, after.locks_kept, after.lock_sequence), (Verdict::Unchanged, true, 3));
    assert_eq!((after.opened.open, after.opened.epoch), (before.open, before.epoch + 1));
    assert_eq!((after.share, after.opened.access), (ShareMode::NONE, RW));
    assert_ne!(after.opened.handle, before.handle);
    assert_eq!(world.authority.counts().locks, 3);
    assert_eq!(refusal(&world.try_open(rival, open(1, RW, ShareMode::ALL), 5)), Status::ShareConflict);
    // The secret is the new session's.
    assert_eq!(world.redeem(right(&session_key(1), &after.opened, 2, RW)).err(), Some(Status::BadKey));
    assert_eq!(world.redeem(right(&session_key(3), &after.opened, 2, RW)).unwrap().epoch, 2);
}

#[test]
fn rsm_03_the_deadline_is_exact() {
    for (wait, verdict) in [
        (HOLD - TICK, Verdict::Unchanged),
        (HOLD, Verdict::ExpiredUnchanged),
        (HOLD + TICK, Verdict::ExpiredUnchanged),
    ] {
        for locks in [false, true] {
            let mut world = World::new();
            let session = world.begin(1, "u1");
            let opened = world.open(session, held(1, RW, ShareMode::ALL, 1000), 5);
            if locks {
                assert!(done(&world.ask(session, lock(opened.open, 1, 0, 5))));
            }
            world.lose(session, 5);
            world.pass(wait);
            let second = world.begin(2, "u1");
            let resumed = resumed(&world.resume(second, &opened, 5));
            assert_eq!(resumed.verdict, verdict);
            assert_eq!(resumed.locks_kept, verdict == Verdict::Unchanged || !locks);
        }
    }
    // The same for who is in the way.
    for (wait, let_in) in [(HOLD - TICK, false), (HOLD, true)] {
        let (mut world, _) = orphan(RW, ShareMode::NONE);
        let rival = world.begin(2, "u2");
        world.pass(wait);
        let effects = contend(&mut world, rival, open(1, RW, ShareMode::ALL));
        if let_in {
            assert!(effects.iter().any(|e| matches!(e, Effect::Reply { reply: Reply::Opened(_), .. })));
        } else {
            assert_eq!(busy_ms(&effects), Some(1));
        }
    }
}

#[test]
fn rsm_04_hold_times_are_honoured_clamped_and_never_wrap() {
    let mut world = World::new();
    let session = world.begin(1, "u1");
    for (n, (asked, granted)) in [
        (None, 60_000),
        (Some(0), 0),
        (Some(1), 1),
        (Some(600_000), 600_000),
        (Some(600_001), 600_000),
        (Some(u64::from(u32::MAX)), 600_000),
        (Some(u64::MAX), 600_000),
    ]
    .into_iter()
    .enumerate()
    {
        let create = u8::try_from(n).unwrap() + 1;
        let request = Open { hold_ms: asked, ..open(create, Access::READ, ShareMode::ALL) };
        assert_eq!(world.open(session, request, 5).hold_ms, granted);
    }
    world.now = crate::types::Timestamp::from_nanos(u64::MAX - 1);
    world.lose(session, 5);
    assert_eq!(world.authority.counts().detached, 6, "one was not to be held");
}

#[test]
fn rsm_06_a_change_by_anybody_is_told() {
    // Late enough, the file is changed by another who opened it beside the orphan.
    let (mut world, opened) = orphan(RW, ShareMode::ALL);
    world.pass(HOLD);
    let rival = world.begin(2, "u2");
    world.open(rival, open(1, RW, ShareMode::ALL), 5);
    world.touch(5);
    let second = world.begin(3, "u1");
    assert_eq!(resumed(&world.resume(second, &opened, 5)).verdict, Verdict::Changed);

    // One who may write and does not, changes nothing: there was a baseline.
    let (mut world, opened) = orphan(RW, ShareMode::ALL);
    let rival = world.begin(2, "u2");
    world.open(rival, open(1, RW, ShareMode::ALL), 5);
    let second = world.begin(3, "u1");
    assert_eq!(resumed(&world.resume(second, &opened, 5)).verdict, Verdict::Unchanged);

    // Without a baseline it can't be known.
    let mut world = World::new();
    let first = world.begin(1, "u1");
    world.give(Input::LinkUp { service_blob: Vec::new(), held: Vec::new() });
    let opened = world.open(first, held(1, RW, ShareMode::ALL, 1000), 5);
    world.bind(&session_key(1), &opened, 1);
    world.lose(first, 5);
    let rival = world.begin(2, "u2");
    world.open(rival, open(1, RW, ShareMode::ALL), 5);
    let second = world.begin(3, "u1");
    let asked = fences(&world.ask(second, resume(&opened, None)));
    let effects = world.confirm(asked[0]);
    assert_eq!(resumed(&world.look(effects, 5)).verdict, Verdict::Changed);
}

#[test]
fn rsm_06_renaming_over_or_removing_marks_or_evicts() {
    for remove in [true, false] {
        for late in [false, true] {
            let (mut world, opened) = orphan(RW, ShareMode::NONE);
            let rival = world.begin(2, "u2");
            if late {
                world.pass(HOLD);
            }
            let rename = Rename { from: place("a"), to: place("file"), no_replace: false };
            let (request, names) = if remove {
                (Request::Remove(place("file")), vec![Some(identity(5))])
            } else {
                (Request::Rename(rename), vec![Some(identity(9)), Some(identity(5))])
            };
            let effects = world.ask(rival, request);
            let [Effect::Resolve { operation, .. }] = effects[..] else { panic!("{effects:?}") };
            let effects = world.give(Input::Resolved { operation, result: Ok(names.clone()) });
            if !late {
                assert_eq!(busy_ms(&effects), Some(1000));
                continue;
            }
            // The orphan goes, and the names are looked at again.
            let [Effect::CloseFile(_), Effect::Resolve { operation, .. }] = effects[..] else {
                panic!("{effects:?}")
            };
            let effects = world.give(Input::Resolved { operation, result: Ok(names) });
            let [Effect::Perform { operation, .. }] = effects[..] else { panic!("{effects:?}") };
            world.give(Input::Performed { operation, result: Ok(Reply::Done) });
            world.touch(5);
            let second = world.begin(3, "u1");
            let told = gone(&world.resume(second, &opened, 5));
            assert_eq!(told, Gone { reason: GoneReason::Evicted, changed: true });
        }
    }
}

#[test]
fn rsm_07_a_yielding_open_goes_at_once() {
    for wrote in [false, true] {
        let mut world = World::new();
        let first = world.begin(1, "u1");
        let request = Open { class: HoldClass::Yield, ..held(1, RW, ShareMode::NONE, 60_000) };
        let opened = world.open(first, request, 5);
        world.lose(first, 5);
        let rival = world.begin(2, "u2");
        let effects = contend(&mut world, rival, open(1, RW, ShareMode::ALL));
        let theirs = effects.iter().find_map(|effect| match effect {
            Effect::Reply { reply: Reply::Opened(opened), .. } => Some(opened.open),
            _ => None,
        });
        let theirs = theirs.unwrap_or(OpenId::NONE);
        assert_ne!(theirs, opened.open);
        if wrote {
            world.touch(5);
        }
        let second = world.begin(3, "u1");
        let told = gone(&world.resume(second, &opened, 5));
        assert_eq!(told, Gone { reason: GoneReason::Evicted, changed: wrote });
        assert_eq!(world.redeem(right(&session_key(1), &opened, 1, RW)).err(), Some(Status::BadKey));
        // Another principal learns nothing of it.
        assert_eq!(world.refused(rival, resume(&opened, None)), Status::BadKey);
    }
}

#[test]
fn rsm_08_a_held_open_is_in_the_way_of_what_conflicts_and_of_nothing_else() {
    for row in 0..256u16 {
        let share = ShareMode::from_bits(u8::try_from(row & 7).unwrap()).unwrap();
        let access = Access::from_bits(u8::try_from((row >> 3) & 7).unwrap()).unwrap();
        let (locked, overwrite) = (row & 64 != 0, row & 128 != 0);
        if overwrite && !access.contains(Access::WRITE) {
            continue;
        }
        let mut world = World::new();
        let first = world.begin(1, "u1");
        let before = world.open(first, held(1, RW, share, 1000), 5);
        if locked {
            assert!(done(&world.ask(first, lock(before.open, 1, 0, 5))));
        }
        world.lose(first, 5);
        let rival = world.begin(2, "u2");
        let disposition = if overwrite { Disposition::Overwrite } else { Disposition::Open };
        let request = Open { disposition, ..open(1, access, ShareMode::ALL) };
        world.size = 100;
        let effects = contend(&mut world, rival, request.clone());
        let conflict = crate::types::conflicts((RW, share), (access, ShareMode::ALL));
        let let_in = effects.iter().any(|e| matches!(e, Effect::Reply { reply: Reply::Opened(_), .. }));
        assert_eq!(let_in, !(conflict || (locked && overwrite)), "{share:?} {access:?} {locked} {overwrite}");
        if !let_in {
            assert_eq!(busy_ms(&effects), Some(1000), "at once, with the time left");
        }
        let second = world.begin(3, "u1");
        let after = resumed(&world.resume(second, &before, 5));
        assert!(after.locks_kept);
        if !let_in {
            let wanted = if conflict { Status::ShareConflict } else { Status::LockConflict };
            assert_eq!(refusal(&contend(&mut world, rival, request.clone())), wanted);
            assert!(closes(&world.ask(second, close(before.open))));
            let effects = contend(&mut world, rival, request);
            assert!(effects.iter().any(|e| matches!(e, Effect::Reply { reply: Reply::Opened(_), .. })));
        }
    }
}

#[test]
fn rsm_08_a_request_that_waits_is_let_in_when_the_open_goes() {
    for how in 0..4 {
        let (mut world, before) = orphan(RW, ShareMode::NONE);
        let rival = world.begin(2, "u2");
        let request =
            Open { wait_ms: Some(if how == 3 { 999 } else { 5000 }), ..open(1, RW, ShareMode::ALL) };
        assert!(matches!(world.try_open(rival, request, 5)[..], [Effect::CloseFile(_)]), "it waits");
        assert_eq!(world.authority.counts().contenders, 1);
        let effects = match how {
            // It expires, and is evicted.
            0 => world.pass(HOLD),
            // Its owner comes back, and stays.
            1 => {
                let second = world.begin(3, "u1");
                world.resume(second, &before, 5)
            }
            // Its owner comes back, and closes it.
            2 => world.give(Input::ForceClose(before.open)),
            _ => world.pass(HOLD - TICK),
        };
        let again = effects.iter().find_map(|effect| match effect {
            Effect::OpenFile { operation, .. } => Some(*operation),
            _ => None,
        });
        let Some(operation) = again else {
            assert_eq!((how, busy_ms(&effects)), (3, Some(1000)));
            continue;
        };
        let mut effects = world.found(operation, 5, false);
        if how == 0 {
            let again = effects.iter().find_map(|effect| match effect {
                Effect::OpenFile { operation, .. } => Some(*operation),
                _ => None,
            });
            effects = world.found(again.unwrap(), 5, false);
        }
        if how == 1 {
            assert_eq!(refusal(&effects), Status::ShareConflict);
        } else {
            opened(&effects);
        }
        assert_eq!(world.authority.counts().contenders, 0);
    }
}

#[test]
fn rsm_10_ones_own_other_open_is_another() {
    let mut world = World::new();
    let (first, third) = (world.begin(1, "u1"), world.begin(2, "u1"));
    let orphans = [1, 2].map(|n| world.open(first, held(n, Access::READ, ShareMode::ALL, 1000), 5));
    world.lose(first, 5);
    world.open(third, open(3, RW, ShareMode::ALL), 5);
    world.touch(5);
    let second = world.begin(3, "u1");
    for orphan in orphans {
        assert_eq!(resumed(&world.resume(second, &orphan, 5)).verdict, Verdict::Changed);
    }
}

#[test]
fn rsm_11_who_comes_first_wins() {
    // The resume: while it is under way the contender is refused, whatever the clock says.
    let (mut world, before) = orphan(RW, ShareMode::NONE);
    world.pass(HOLD);
    let (rival, second) = (world.begin(2, "u2"), world.begin(3, "u1"));
    let looking = world.ask(second, resume(&before, None));
    assert!(matches!(looking[..], [Effect::Inspect { .. }]));
    assert_eq!(refusal(&world.try_open(rival, open(1, RW, ShareMode::ALL), 5)), Status::ShareConflict);
    assert_eq!(resumed(&world.look(looking, 5)).verdict, Verdict::ExpiredUnchanged);
    // The contender: the owner is told.
    let mut world = World::new();
    let first = world.begin(1, "u1");
    world.give(Input::LinkUp { service_blob: Vec::new(), held: Vec::new() });
    let before = world.open(first, held(1, RW, ShareMode::NONE, 1000), 5);
    world.bind(&session_key(1), &before, 1);
    world.lose(first, 5);
    let (rival, second) = (world.begin(2, "u2"), world.begin(3, "u1"));
    world.pass(HOLD);
    let effects = world.try_open(rival, open(1, RW, ShareMode::ALL), 5);
    let asked = fences(&effects);
    assert_eq!(asked[0].reason, Status::Evicted);
    assert!(!effects.iter().any(|effect| matches!(effect, Effect::Reply { .. })), "fence before grant");
    assert_eq!(busy_ms(&world.ask(second, resume(&before, None))), Some(100));
    let effects = world.confirm(asked[0]);
    let effects = world.look(effects, 5);
    let [Effect::CloseFile(_), Effect::OpenFile { operation, .. }] = effects[..] else {
        panic!("{effects:?}")
    };
    opened(&world.found(operation, 5, false));
    assert!(!gone(&world.resume(second, &before, 5)).changed);
}

#[test]
fn rsm_13_of_two_resumes_one_wins() {
    let (mut world, before) = orphan(RW, ShareMode::NONE);
    let (one, two) = (world.begin(2, "u1"), world.begin(3, "u1"));
    let looking = world.ask(one, resume(&before, None));
    assert_eq!(busy_ms(&world.ask(two, resume(&before, None))), Some(50), "a matter of a moment");
    let after = resumed(&world.look(looking, 5));
    assert_eq!(after.opened.epoch, before.epoch + 1);
    assert_eq!(busy_ms(&world.ask(two, resume(&before, None))), None);
    assert_eq!(world.redeem(right(&session_key(3), &after.opened, 1, RW)).err(), Some(Status::BadKey));
    world.give(Input::LinkUp { service_blob: Vec::new(), held: Vec::new() });
    world.bind(&session_key(2), &after.opened, 1);
}

#[test]
fn rsm_14_a_live_open_is_busy_unless_its_session_is_named() {
    let mut world = World::new();
    let (one, two) = (world.begin(1, "u1"), world.begin(2, "u1"));
    let before = world.open(one, held(1, RW, ShareMode::NONE, 1000), 5);
    let other = world.open(one, held(2, RW, ShareMode::NONE, 1000), 6);
    for supersede in [None, Some(two), Some(SessionId([9; 16]))] {
        assert_eq!(busy_ms(&world.ask(two, resume(&before, supersede))), None);
    }
    for supersede in [None, Some(one)] {
        assert_eq!(busy_ms(&world.ask(one, resume(&before, supersede))), None);
    }
    let stranger = world.begin(3, "u2");
    assert_eq!(world.refused(stranger, resume(&before, Some(one))), Status::BadKey);
    assert!(matches!(world.ask(one, Request::Ping)[..], [Effect::Reply { .. }]), "undisturbed");
    let effects = world.ask(two, resume(&before, Some(one)));
    assert!(effects.iter().any(|effect| matches!(effect, Effect::Disconnect(session) if *session == one)));
    let effects = world.look(effects, 5);
    let after = effects.iter().find_map(|effect| match effect {
        Effect::Reply { reply: Reply::Resumed(resumed), .. } => Some(resumed),
        _ => None,
    });
    assert_eq!(after.map(|after| after.verdict), Some(Verdict::Unchanged));
    assert!(world.ask(one, Request::Ping).is_empty(), "it is gone");
    // Its other open is detached, and can be resumed as well.
    assert_eq!(world.authority.counts().detached, 1);
    resumed(&world.resume(two, &other, 6));
}

#[test]
fn rsm_18_bindings_outlive_their_session_for_a_while_and_the_link_ends_no_open() {
    // (a) The session alone is lost: I/O goes on, and a client that names its handles keeps them.
    let mut world = World::new();
    let first = world.begin(1, "u1");
    world.give(Input::LinkUp { service_blob: Vec::new(), held: Vec::new() });
    let before = world.open(first, held(1, RW, ShareMode::NONE, 60_000), 5);
    let mut grants = [1, 2].map(|n| world.redeem(right(&session_key(1), &before, n, RW)).unwrap());
    assert!(world.lose(first, 5).is_empty(), "no fence yet");
    world.pass(Duration::from_secs(4));
    let second = world.begin(2, "u1");
    let request =
        Resume { resume_key: before.key.resume_key.clone(), supersede: None, keep: vec![grants[1].handle] };
    let asked = fences(&world.ask(second, Request::Resume(request)));
    assert_eq!(asked.iter().map(|fence| fence.binding).collect::<Vec<_>>(), [grants[0].binding]);
    let effects = world.confirm(asked[0]);
    let after = resumed(&world.look(effects, 5));
    assert_eq!((after.kept.clone(), after.verdict), (vec![grants[1].handle], Verdict::Unchanged));
    grants.swap(0, 1);
    // Lost again, and nobody comes: after the linger all is fenced, then the baseline taken.
    assert!(world.lose(second, 5).is_empty());
    let asked = fences(&world.pass(Duration::from_secs(5)));
    assert_eq!((asked[0].binding, asked[0].reason), (grants[0].binding, Status::SessionGone));
    let effects = world.confirm(asked[0]);
    assert!(matches!(effects[..], [Effect::Inspect { .. }]));
    world.look(effects, 5);
    world.touch(5); // Beside the server.
    let third = world.begin(3, "u1");
    assert_eq!(resumed(&world.resume(third, &after.opened, 5)).verdict, Verdict::Changed);
    // (b) The link alone is lost: the open is live, and can be bound anew.
    world.give(Input::LinkDown);
    world.give(Input::LinkLost);
    world.give(Input::LinkUp { service_blob: Vec::new(), held: Vec::new() });
    assert_eq!(world.authority.counts().detached, 0);
    world.bind(&session_key(3), &after.opened, 9);
}

#[test]
fn opn_05_a_resume_gives_what_was_stored() {
    let (mut world, before) = orphan(Access::READ, ShareMode::NONE);
    let second = world.begin(2, "u1");
    let after = resumed(&world.resume(second, &before, 5));
    assert_eq!((after.opened.access, after.share), (Access::READ, ShareMode::NONE));
    assert_eq!(world.redeem(right(&session_key(2), &after.opened, 1, RW)).err(), Some(Status::AccessDenied));
    let rival = world.begin(3, "u2");
    assert_eq!(refusal(&world.try_open(rival, open(1, RW, ShareMode::ALL), 5)), Status::ShareConflict);
}

#[test]
fn a_failed_resume_leaves_the_open_as_it_was() {
    let limits = Limits { opens_per_session: 1, ..Limits::default() };
    let mut world = World::with(limits, 1);
    let first = world.begin(1, "u1");
    let before = world.open(first, held(1, RW, ShareMode::NONE, 1000), 5);
    world.lose(first, 5);
    world.pass(Duration::from_millis(500));
    let (full, dies, fails) = (world.begin(2, "u1"), world.begin(3, "u1"), world.begin(4, "u1"));
    world.open(full, open(7, Access::READ, ShareMode::ALL), 7);
    let view = |world: &World| world.authority.list_opens(world.now, None, 10).remove(0);
    let stored = view(&world);
    assert_eq!((stored.hold_left_ms, stored.epoch), (Some(500), 1));
    assert_eq!(world.refused(full, resume(&before, None)), Status::TooMany);
    assert_eq!(view(&world), stored);
    let looking = world.ask(dies, resume(&before, None));
    world.give(Input::SessionLost(dies));
    assert!(world.look(looking, 5).is_empty());
    assert_eq!(view(&world), stored);
    let looking = world.ask(fails, resume(&before, None));
    let [Effect::Inspect { operation, .. }] = looking[..] else { panic!("{looking:?}") };
    let error = Refusal { status: Status::Io, detail: String::new(), retry_ms: None };
    let effects = world.give(Input::Inspected { operation, result: Err(error) });
    assert_eq!(refusal(&effects), Status::Io);
    assert_eq!(view(&world), stored);
    assert_eq!(resumed(&world.resume(fails, &before, 5)).verdict, Verdict::Unchanged);
}

/// KEY-06, KEY-07, KEY-09: whoever has no right to an open learns nothing of it, and changes nothing.
#[test]
fn key_06_every_key_that_is_not_ones_own_is_the_same_bad_key() {
    let (mut world, mine) = orphan(RW, ShareMode::NONE);
    let mut other = World::with(Limits::default(), 2);
    let session = other.begin(1, "u1");
    let theirs = other.open(session, held(1, RW, ShareMode::NONE, 1000), 5);
    let (stranger, owner) = (world.begin(2, "u2"), world.begin(3, "u1"));
    let closed = world.open(owner, open(9, RW, ShareMode::ALL), 9);
    assert!(closes(&world.ask(owner, close(closed.open))));
    let journal = world.journal.len();
    let counts = world.authority.counts();
    let mut answers = Vec::new();
    let mut flipped = mine.clone();
    flipped.key.resume_key[40] ^= 1;
    for (session, opened) in [(stranger, &mine), (owner, &theirs), (owner, &closed), (owner, &flipped)] {
        for effect in world.ask(session, resume(opened, None)) {
            let Effect::Reply { reply, .. } = effect else { panic!("{effect:?}") };
            answers.push(reply);
        }
    }
    assert_eq!(answers.len(), 4);
    assert!(answers.iter().all(|answer| *answer == answers[0]));
    assert!(matches!(&answers[0], Reply::Refused(Refusal { status: Status::BadKey, .. })));
    assert_eq!((world.journal.len(), world.authority.counts()), (journal, counts), "no effect");
    assert_eq!(resumed(&world.resume(owner, &mine, 5)).verdict, Verdict::Unchanged);
}

#[test]
fn opn_09_a_file_goes_with_the_last_open_that_asked_for_it() {
    let deletes = |create, hold_ms| Open {
        delete_on_close: true,
        ..held(create, Access::READ | Access::DELETE, ShareMode::ALL, hold_ms)
    };
    let removes = |effects: &[Effect]| {
        effects.iter().find_map(|effect| match effect {
            Effect::Perform { operation, work: Work::Remove(_, file) } if *file == identity(5) => {
                Some(*operation)
            }
            _ => None,
        })
    };
    // (a) Resumed, then closed. Without the right to delete it is refused.
    let mut world = World::new();
    let first = world.begin(1, "u1");
    let wrong = Open { access: Access::READ, ..deletes(1, 1000) };
    assert_eq!(world.refused(first, Request::Open(wrong)), Status::AccessDenied);
    let one = world.open(first, deletes(1, 1000), 5);
    world.lose(first, 5);
    let second = world.begin(2, "u1");
    resumed(&world.resume(second, &one, 5));
    let effects = world.ask(second, close(one.open));
    let operation = removes(&effects).unwrap();
    assert_eq!(effects.len(), 1, "answered when it is gone");
    assert!(closes(&world.give(Input::Performed { operation, result: Ok(Reply::Done) })));
    // (b) Its hold time passes, and it is evicted.
    let mut world = World::new();
    let first = world.begin(1, "u1");
    let keeps = Open { share: ShareMode::READ | ShareMode::DELETE, ..deletes(1, 1000) };
    world.open(first, keeps, 5);
    world.lose(first, 5);
    world.pass(HOLD);
    let rival = world.begin(2, "u2");
    let effects = world.try_open(rival, open(1, RW, ShareMode::ALL), 5);
    assert!(removes(&effects).is_some(), "{effects:?}");
    // (c) Two; the second is resumed when the first is over.
    let mut world = World::new();
    let first = world.begin(1, "u1");
    let brief = world.open(first, deletes(1, 1000), 5);
    let long = world.open(first, deletes(2, 10_000), 5);
    world.lose(first, 5);
    world.pass(Duration::from_secs(2));
    let second = world.begin(2, "u1");
    resumed(&world.resume(second, &long, 5));
    assert!(removes(&world.give(Input::ForceClose(brief.open))).is_none(), "another open is left");
    assert!(removes(&world.ask(second, close(long.open))).is_some());
}

#[test]
fn a_force_closed_open_is_fenced_and_its_owner_told() {
    let mut world = World::new();
    let session = world.begin(1, "u1");
    world.give(Input::LinkUp { service_blob: Vec::new(), held: Vec::new() });
    let held = world.open(session, held(1, RW, ShareMode::NONE, 1000), 5);
    world.bind(&session_key(1), &held, 1);
    let asked = fences(&world.give(Input::ForceClose(held.open)));
    assert_eq!(asked[0].reason, Status::ForceClosed);
    assert_eq!(world.refused(session, Request::QueryKey(held.open)), Status::ForceClosed);
    let effects = world.confirm(asked[0]);
    assert!(matches!(world.look(effects, 5)[..], [Effect::CloseFile(_)]));
    assert_eq!(world.refused(session, Request::QueryKey(held.open)), Status::ForceClosed);
    let told = gone(&world.resume(session, &held, 5));
    assert_eq!(told, Gone { reason: GoneReason::ForceClosed, changed: false });
    // It is forgotten in time, and then as unknown as any.
    world.pass(Limits::default().tombstone_keep);
    assert_eq!(world.refused(session, resume(&held, None)), Status::BadKey);
}

#[test]
fn a_principal_makes_room_with_its_own_oldest_expired_open() {
    let limits = Limits { opens_per_principal: 2, ..Limits::default() };
    let mut world = World::with(limits, 1);
    let (first, rival) = (world.begin(1, "u1"), world.begin(2, "u2"));
    let theirs = world.open(rival, held(1, Access::READ, ShareMode::ALL, 1), 5);
    let young = world.open(first, held(1, Access::READ, ShareMode::ALL, 2000), 5);
    let old = world.open(first, held(2, Access::READ, ShareMode::ALL, 1000), 5);
    world.lose(rival, 5);
    world.lose(first, 5);
    let second = world.begin(3, "u1");
    let third = || Request::Open(held(3, Access::READ, ShareMode::ALL, 1000));
    assert_eq!(world.refused(second, third()), Status::TooMany);
    world.pass(Duration::from_secs(3));
    let effects = world.ask(second, third());
    assert!(effects.iter().any(|effect| matches!(effect, Effect::OpenFile { .. })), "{effects:?}");
    assert_eq!(gone(&world.resume(second, &old, 5)).reason, GoneReason::Evicted);
    resumed(&world.resume(second, &young, 5));
    let them = world.begin(4, "u2");
    resumed(&world.resume(them, &theirs, 5));
}

#[test]
fn logoff_closes_everything_and_holds_nothing() {
    let mut world = World::new();
    let session = world.begin(1, "u1");
    world.give(Input::LinkUp { service_blob: Vec::new(), held: Vec::new() });
    let held = world.open(session, held(1, RW, ShareMode::NONE, 1000), 5);
    world.bind(&session_key(1), &held, 1);
    let asked = fences(&world.ask(session, Request::Logoff));
    assert_eq!(world.refused(session, Request::Ping), Status::SessionGone);
    let effects = world.confirm(asked[0]);
    assert!(matches!(
        effects[..],
        [Effect::CloseFile(_), Effect::Reply { reply: Reply::Done, .. }, Effect::Disconnect(_)]
    ));
    assert_eq!(world.authority.counts(), Default::default());
}

#[test]
fn a_size_is_not_changed_under_a_held_opens_lock() {
    let mut world = World::new();
    let first = world.begin(1, "u1");
    let before = world.open(first, held(1, RW, ShareMode::ALL, 1000), 5);
    assert!(done(&world.ask(first, lock(before.open, 1, 0, 5))));
    world.lose(first, 5);
    let rival = world.begin(2, "u2");
    let theirs = world.open(rival, open(1, RW, ShareMode::ALL), 5);
    let target = Target::Open(theirs.open);
    let set = SetAttributes { target, size: Some(0), mode: None, accessed: None, modified: None };
    assert_eq!(busy_ms(&world.ask(rival, Request::SetAttributes(set.clone()))), Some(1000));
    world.pass(HOLD);
    assert!(matches!(world.ask(rival, Request::SetAttributes(set))[..], [Effect::Perform { .. }]));
}

/// An open of session 1 beside a writer's, both bound, that is resumed by session 3 after the writer had changed the file;
/// or before, if `late`.
fn resumed_beside_a_writer(late: bool, keep: bool) -> (World, Opened, Opened) {
    let mut world = World::new();
    let first = world.begin(1, "u1");
    world.give(Input::LinkUp { service_blob: Vec::new(), held: Vec::new() });
    let before = world.open(first, held(1, RW, ShareMode::ALL, 60_000), 5);
    world.bind(&session_key(1), &before, 1);
    let rival = world.begin(2, "u2");
    if !late {
        world.open(rival, open(1, RW, ShareMode::ALL), 5);
    }
    world.lose(first, 5);
    let third = world.begin(3, "u1");
    let handle =
        world.authority.list_opens(world.now, None, 10)[0].bindings.first().map(|bound| bound.handle);
    let keep = handle.into_iter().filter(|_| keep).collect();
    let resume_key = before.key.resume_key.clone();
    let effects = world.ask(third, Request::Resume(Resume { resume_key, supersede: None, keep }));
    let mut effects: Vec<Effect> = match fences(&effects).first() {
        Some(fence) => world.confirm(*fence),
        None => effects,
    };
    effects = world.look(effects, 5);
    let after = resumed(&effects);
    assert_eq!(after.verdict, if late { Verdict::Unchanged } else { Verdict::Changed });
    if late {
        world.open(rival, open(1, RW, ShareMode::ALL), 5);
    }
    world.touch(5);
    (world, before, after.opened)
}

#[test]
fn a_verdict_that_was_lost_is_told_again() {
    for (late, keep) in [(false, false), (true, false), (true, true), (false, true)] {
        for crash in [false, true] {
            for heard in [false, true] {
                let (mut world, before, after) = resumed_beside_a_writer(late, keep);
                let third = SessionId([3; 16]);
                if heard {
                    world.ask(third, Request::QueryKey(after.open));
                    assert!(matches!(world.journal.last(), Some(Record::Heard(id)) if *id == after.open));
                    let records = world.journal.len();
                    world.ask(third, Request::QueryKey(after.open));
                    assert_eq!(world.journal.len(), records, "once is enough");
                }
                // The writer is gone before the answer turns out to be lost.
                world.lose(SessionId([2; 16]), 5);
                let evidence = world.evidence_of(5);
                if crash {
                    world = world.recover();
                } else {
                    world.lose(third, 5);
                    let effects = world.give(Input::LinkLost);
                    world.look(effects, 5);
                }
                assert_eq!(world.evidence_of(5), evidence);
                let fourth = world.begin(4, "u1");
                let again = resumed(&world.resume(fourth, &before, 5));
                // After a crash the open's own evidence is that of the resume: it cannot know of what came later.
                let wanted = if heard && !crash { Verdict::Unchanged } else { Verdict::Changed };
                assert_eq!(again.verdict, wanted, "late {late}, keep {keep}, crash {crash}, heard {heard}");
            }
        }
    }
}

#[test]
fn rsm_03_that_the_time_was_over_is_told_until_it_was_heard() {
    for how in ["lost", "superseded", "crash", "heard", "heard, then a crash", "repeated open"] {
        for locks in [false, true] {
            let mut world = World::new();
            let first = world.begin(1, "u1");
            let before = world.open(first, held(1, RW, ShareMode::ALL, 1000), 5);
            if locks {
                assert!(done(&world.ask(first, lock(before.open, 1, 0, 5))));
            }
            world.lose(first, 5);
            world.pass(HOLD);
            let second = world.begin(2, "u1");
            let late = resumed(&world.resume(second, &before, 5));
            assert_eq!((late.verdict, late.locks_kept), (Verdict::ExpiredUnchanged, !locks));
            let third = SessionId([3; 16]);
            let again = match how {
                "superseded" => {
                    world.begin(3, "u1");
                    let effects = world.ask(third, resume(&before, Some(second)));
                    let mut effects = world.look(effects, 5);
                    effects.retain(|effect| matches!(effect, Effect::Reply { .. }));
                    resumed(&effects)
                }
                "repeated open" => {
                    // Its client knows of no resume: it asks as if it had never been answered.
                    world.lose(second, 5);
                    world.begin(3, "u1");
                    let effects = world.ask(third, Request::Open(held(1, RW, ShareMode::ALL, 1000)));
                    let _ = opened(&world.look(effects, 5));
                    world.lose(third, 5);
                    let fourth = world.begin(4, "u1");
                    resumed(&world.resume(fourth, &before, 5))
                }
                _ => {
                    if how.starts_with("heard") {
                        world.ask(second, Request::QueryKey(before.open));
                    }
                    if how.ends_with("crash") {
                        world = world.recover();
                    } else {
                        world.lose(second, 5);
                    }
                    world.begin(3, "u1");
                    resumed(&world.resume(third, &before, 5))
                }
            };
            let owed = !how.starts_with("heard") && how != "repeated open";
            let wanted = if owed { Verdict::ExpiredUnchanged } else { Verdict::Unchanged };
            assert_eq!((again.verdict, again.locks_kept), (wanted, !(owed && locks)), "{how}, locks {locks}");
        }
    }
}

#[test]
fn what_proves_that_a_verdict_was_heard() {
    for how in ["other session", "bind", "close", "ping", "early"] {
        let (mut world, before, after) = resumed_beside_a_writer(false, false);
        let third = SessionId([3; 16]);
        let heard = |world: &World| world.journal.iter().any(|record| matches!(record, Record::Heard(_)));
        match how {
            "other session" => drop(world.ask(SessionId([2; 16]), Request::QueryKey(after.open))),
            "bind" => drop(world.bind(&session_key(3), &after, 9)),
            "close" => {
                world.ask(third, close(after.open));
                assert!(!heard(&world), "nothing is left to be told");
                continue;
            }
            "ping" => drop(world.ask(third, Request::Ping)),
            _ => {
                // The answer has not left: the client asks blindly.
                world.lose(third, 5);
                let fourth = world.begin(4, "u1");
                world.holds_journal = true;
                let effects = world.ask(fourth, resume(&before, None));
                assert!(world.look(effects, 5).is_empty());
                world.ask(fourth, Request::QueryKey(after.open));
            }
        }
        assert_eq!(heard(&world), how == "bind", "{how}");
    }
}

#[test]
fn opn_09_nobody_who_denies_it_is_let_in_while_the_name_goes() {
    let mut world = World::new();
    let session = world.begin(1, "u1");
    let delete = Access::READ.union(Access::DELETE);
    let asks = Open { delete_on_close: true, ..open(1, delete, ShareMode::ALL) };
    let asks = world.open(session, asks, 5);
    let last = world.open(session, open(2, Access::READ, ShareMode::ALL), 5);
    assert!(closes(&world.ask(session, close(asks.open))));
    let effects = world.ask(session, close(last.open));
    let [Effect::Perform { operation, work: Work::Remove(..) }] = effects[..] else { panic!("{effects:?}") };
    let rival = world.begin(2, "u2");
    assert_eq!(
        refusal(&world.try_open(rival, open(1, Access::READ, ShareMode::READ), 5)),
        Status::ShareConflict
    );
    world.open(rival, open(2, Access::READ, ShareMode::ALL), 5);
    assert!(closes(&world.give(Input::Performed { operation, result: Ok(Reply::Done) })));
    world.open(rival, open(3, Access::READ, ShareMode::READ), 5);
}
