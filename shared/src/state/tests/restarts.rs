//! What a crash must not make of an open: the steps between "granted" and "settled".

use super::world::*;
use crate::state::rules::LockMode;
use crate::state::{Effect, Input, Inspected, OpenState, Work};
use crate::types::{Access, Disposition, Evidence, ShareMode, Status, Verdict};
use crate::wire::control::{Open, Opened, Reply, Request, SetAttributes, Target};

/// Answers the file system's work on the way to an open's answer; the answer, and whether the file was truncated.
fn open_and_truncate(world: &mut World, effects: Vec<Effect>, inode: u64) -> (Opened, bool) {
    let mut truncated = false;
    let mut effects = effects;
    loop {
        effects = match &effects[..] {
            [Effect::OpenFile { operation, .. }] => {
                let result = Ok(world.opened(inode, false));
                world.give(Input::FileOpened { operation: *operation, result })
            }
            [Effect::Perform { operation, work }] => {
                truncated |= matches!(work, Work::SetAttributes(_, changes) if changes.size == Some(0));
                world.performed(*operation, inode)
            }
            [Effect::Inspect { .. }] => {
                let seen = effects;
                world.look(seen, inode)
            }
            [Effect::Reply { reply: Reply::Opened(opened), .. }] => return (opened.clone(), truncated),
            other => panic!("not on the way to an answer: {other:?}"),
        };
    }
}

#[test]
fn a_truncation_that_a_crash_cut_off_is_made_when_the_request_is_repeated() {
    for done in [false, true] {
        let mut world = World::new();
        let first = world.begin(1, "u1");
        let request =
            Open { disposition: Disposition::OverwriteOrCreate, ..held(1, RW, ShareMode::NONE, 60_000) };
        let effects = world.ask(first, Request::Open(request.clone()));
        let [Effect::OpenFile { operation, .. }] = &effects[..] else { panic!("{effects:?}") };
        let result = Ok(world.opened(5, false));
        let effects = world.give(Input::FileOpened { operation: *operation, result });
        let [Effect::Perform { operation, .. }] = &effects[..] else { panic!("{effects:?}") };
        if done {
            opened(&world.performed(*operation, 5));
        }
        let world = world.recover();
        assert_eq!(world.authority.counts().opens, usize::from(done));
        // And after another crash it is the same.
        let mut world = world.recover();
        assert_eq!(world.authority.counts().opens, usize::from(done));
        let second = world.begin(2, "u1");
        let effects = world.ask(second, Request::Open(request));
        let (_, truncated) = open_and_truncate(&mut world, effects, 5);
        assert_eq!(truncated, !done);
    }
}

#[test]
fn a_truncation_that_ends_after_its_session_is_not_undone() {
    let mut world = World::new();
    let first = world.begin(1, "u1");
    let request = Open { disposition: Disposition::Overwrite, ..held(1, RW, ShareMode::NONE, 60_000) };
    let effects = world.ask(first, Request::Open(request));
    let [Effect::OpenFile { operation, .. }] = &effects[..] else { panic!("{effects:?}") };
    let result = Ok(world.opened(5, false));
    let effects = world.give(Input::FileOpened { operation: *operation, result });
    let [Effect::Perform { operation, .. }] = &effects[..] else { panic!("{effects:?}") };
    assert!(world.lose(first, 5).is_empty());
    let effects = world.performed(*operation, 5);
    world.look(effects, 5);
    assert_eq!(world.recover().authority.counts().detached, 1);
}

#[test]
fn only_the_link_settles_what_was_recovered() {
    let mut world = World::new();
    let first = world.begin(1, "u1");
    let before = world.open(first, held(1, RW, ShareMode::NONE, 60_000), 5);
    let (mut world, reopens) = world.restart();
    world.give(Input::JournalRoom(false));
    world.give(Input::JournalRoom(true));
    for reopen in reopens {
        let seen = Inspected { attributes: attributes(5), evidence: world.evidence_of(5) };
        world.give(Input::Reopened { open: reopen.open, result: Ok(seen) });
    }
    let second = world.begin(2, "u1");
    assert_eq!(world.refused(second, resume(&before, None)), Status::Unavailable);
    assert_eq!(world.refused(second, Request::Open(open(2, RW, ShareMode::ALL))), Status::Unavailable);
    world.give(Input::LinkLost);
    assert_eq!(resumed(&world.resume(second, &before, 5)).verdict, Verdict::Unchanged);
}

#[test]
fn an_open_that_nobody_told_to_be_open_again_is_busy() {
    let mut world = World::new();
    let first = world.begin(1, "u1");
    let before = world.open(first, held(1, RW, ShareMode::NONE, 60_000), 5);
    let (mut world, _) = world.restart();
    let mut effects = Vec::new();
    // Without the checks of what must hold: the shell has broken its promise.
    world.authority.handle(world.now, Input::LinkLost, &mut effects);
    let began = crate::state::SessionBegan {
        session: crate::types::SessionId([2; 16]),
        request: 0,
        principal: "u1".into(),
        key: session_key(2),
        process: crate::types::ProcessId(2),
    };
    let session = began.session;
    world.authority.handle(world.now, Input::SessionBegan(Box::new(began)), &mut effects);
    effects.clear();
    for supersede in [None, Some(first)] {
        let (request, fresh) = (resume(&before, supersede), world.fresh());
        world.authority.handle(world.now, Input::Request { session, id: 7, request, fresh }, &mut effects);
        assert_eq!(refusal(&std::mem::take(&mut effects)), Status::Busy);
    }
}

#[test]
fn a_stamp_for_all_files_explains_nothing_beside_a_living_dataplane() {
    for (lives, wanted) in [(true, Verdict::Changed), (false, Verdict::Unchanged)] {
        let mut world = World::new();
        let first = world.begin(1, "u1");
        let before = world.open(first, held(1, RW, ShareMode::NONE, 60_000), 5);
        world.evidence.insert(5, Evidence { changed_ns: 60, ..Evidence::default() });
        let mut world = world.crash();
        world.authority.set_last_write(70);
        let up = Input::LinkUp { service_blob: Vec::new(), held: Vec::new() };
        world.give(if lives { up } else { Input::LinkLost });
        let second = world.begin(2, "u1");
        assert_eq!(resumed(&world.resume(second, &before, 5)).verdict, wanted, "{lives}");
    }
}

#[test]
fn locks_keep_the_meaning_they_were_taken_with() {
    let mut before = World::with_mode(LockMode::Advisory);
    let first = before.begin(1, "u1");
    let old = before.open(first, held(1, RW, ShareMode::ALL, 60_000), 5);
    assert!(done(&before.ask(first, lock(old.open, 1, 0, 10))));
    // Only an advisory lock can be split.
    assert!(done(&before.ask(first, unlock(old.open, 2, 2, 3))));
    // The configuration says otherwise now.
    let mut world = World::new().recover_from(&before.journal);
    assert_eq!(world.authority.counts().locks, 2);
    let second = world.begin(2, "u1");
    let after = resumed(&world.resume(second, &old, 5)).opened;
    assert!(done(&world.ask(second, unlock(after.open, 3, 1, 8))));
}

#[test]
fn opn_09_delete_on_close_outlives_a_crash_with_any_open_that_is_left() {
    let mut world = World::new();
    let first = world.begin(1, "u1");
    let removes = Open { delete_on_close: true, ..held(1, RW | Access::DELETE, ShareMode::ALL, 60_000) };
    let flagged = world.open(first, removes, 5);
    let left: Vec<Opened> =
        (2..4).map(|n| world.open(first, held(n, RW, ShareMode::ALL, 60_000), 5)).collect();
    assert!(closes(&world.ask(first, close(flagged.open))));
    // Whichever of them is closed next.
    for (next, last) in [(&left[0], &left[1]), (&left[1], &left[0])] {
        let mut world = world.recover();
        let second = world.begin(2, "u1");
        resumed(&world.resume(second, next, 5));
        assert!(closes(&world.ask(second, close(next.open))));
        let mut world = world.recover();
        let third = world.begin(3, "u1");
        resumed(&world.resume(third, last, 5));
        let effects = world.ask(third, close(last.open));
        assert!(matches!(&effects[..], [Effect::Perform { work: Work::Remove(..), .. }]), "{effects:?}");
    }
}

#[test]
fn rsm_04_without_a_hold_time_an_open_ends_with_a_crash() {
    let mut world = World::new();
    let first = world.begin(1, "u1");
    world.open(first, open(1, RW, ShareMode::NONE), 5);
    let kept = world.open(first, held(2, RW, ShareMode::NONE, 1000), 6);
    let mut world = world.recover();
    let there = world.authority.list_opens(world.now, None, 9);
    assert_eq!(there.iter().map(|view| view.open).collect::<Vec<_>>(), [kept.open]);
    assert!(matches!(there[0].state, OpenState::Detached));
    let rival = world.begin(2, "u2");
    world.open(rival, open(1, RW, ShareMode::NONE), 5);
}

#[test]
fn an_opens_own_change_of_attributes_is_no_change_after_a_crash() {
    let mut world = World::new();
    let first = world.begin(1, "u1");
    let before = world.open(first, held(1, RW, ShareMode::NONE, 60_000), 5);
    let set = SetAttributes {
        target: Target::Open(before.open),
        size: None,
        mode: Some(0o600),
        accessed: None,
        modified: None,
    };
    let effects = world.ask(first, Request::SetAttributes(set));
    let [Effect::Perform { operation, .. }] = &effects[..] else { panic!("{effects:?}") };
    world.touch(5);
    let changed = crate::types::FileTime { seconds: 0, nanos: 1 };
    let after = crate::wire::control::Attributes { changed, ..attributes(5) };
    world.give(Input::Performed { operation: *operation, result: Ok(Reply::Attributes(after)) });
    let mut world = world.recover();
    let second = world.begin(2, "u1");
    assert_eq!(resumed(&world.resume(second, &before, 5)).verdict, Verdict::Unchanged);
}
