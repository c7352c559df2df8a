//! Opening, repeating, closing; limits; names.

use super::world::*;
use crate::state::{Effect, Input, Limits, Work};
use crate::types::{Access, Disposition, OpenId, ShareMode, Status, Timestamp};
use crate::wire::control::{Open, Refusal, Rename, Reply, Request, SetAttributes, Target};
use std::time::Duration;

/// OPN-01, as far as one open after another: all 4,096 rows.
#[test]
fn opn_01_the_second_open_is_refused_exactly_on_conflict() {
    for row in 0u16..4096 {
        let part = |shift: u16| u8::try_from((row >> shift) & 7).unwrap();
        let access = |shift| Access::from_bits(part(shift)).unwrap();
        let share = |shift| ShareMode::from_bits(part(shift)).unwrap();
        let (first, second) = ((access(0), share(3)), (access(6), share(9)));
        let mut world = World::new();
        let session = world.begin(1, "u1");
        world.open(session, open(1, first.0, first.1), 5);
        let effects = world.try_open(session, open(2, second.0, second.1), 5);
        if crate::types::conflicts(first, second) {
            assert_eq!(refusal(&effects), Status::ShareConflict);
            assert!(matches!(effects[0], Effect::CloseFile(_)));
        } else {
            opened(&effects);
        }
        // Another file is another matter.
        opened(&world.try_open(session, open(3, second.0, second.1), 6));
    }
}

#[test]
fn opn_01_nothing_is_truncated_before_the_share_check() {
    let mut world = World::new();
    let session = world.begin(1, "u1");
    world.open(session, open(1, Access::READ, ShareMode::READ), 5);
    let overwrite = Open { disposition: Disposition::Overwrite, ..open(2, RW, ShareMode::ALL) };
    let effects = world.ask(session, Request::Open(overwrite.clone()));
    let [Effect::OpenFile { operation, .. }] = effects[..] else { panic!("{effects:?}") };
    let effects = world.found(operation, 5, false);
    assert!(!effects.iter().any(|effect| matches!(effect, Effect::Perform { .. })));
    assert_eq!(refusal(&effects), Status::ShareConflict);
    // While the truncation is under way the claim stands already.
    let effects = world.ask(session, Request::Open(Open { share: ShareMode::NONE, ..overwrite }));
    let [Effect::OpenFile { operation, .. }] = effects[..] else { panic!("{effects:?}") };
    let found = world.opened(6, false);
    let effects = world.give(Input::FileOpened { operation, result: Ok(found) });
    let [Effect::Perform { operation, work: Work::SetAttributes(..) }] = effects[..] else {
        panic!("{effects:?}")
    };
    let rival = world.try_open(session, open(3, Access::READ, ShareMode::ALL), 6);
    assert_eq!(refusal(&rival), Status::ShareConflict);
    let failed = Refusal { status: Status::Io, detail: String::new(), retry_ms: None };
    let effects = world.give(Input::Performed { operation, result: Err(failed) });
    assert_eq!(refusal(&effects), Status::Io);
    opened(&world.try_open(session, open(3, Access::READ, ShareMode::ALL), 6));
}

#[test]
fn opn_06_a_replay_gets_the_same_open_whenever_it_comes() {
    let mut world = World::new();
    let first = world.begin(1, "u1");
    let request = Open { disposition: Disposition::CreateNew, ..open(1, RW, ShareMode::ALL) };
    let effects = world.ask(first, Request::Open(request.clone()));
    let [Effect::OpenFile { operation, .. }] = effects[..] else { panic!("{effects:?}") };
    // While it is under way, on the same and on another connection of the principal.
    let second = world.begin(2, "u1");
    assert!(world.ask(first, Request::Open(request.clone())).is_empty());
    assert!(world.ask(second, Request::Open(request.clone())).is_empty());
    let other = Open { access: Access::READ, ..request.clone() };
    assert_eq!(world.refused(second, Request::Open(other.clone())), Status::DuplicateCreate);
    let answers = world.found(operation, 5, true);
    assert_eq!(answers.len(), 3);
    // The open is the later session's; the earlier one must not think that it has it too.
    assert_eq!(refusal(&answers[..1]), Status::Superseded);
    assert_eq!(refusal(&answers[1..2]), Status::Superseded);
    let ids: [OpenId; 1] = [opened(&answers[2..]).open];
    assert_eq!(world.refused(first, close(ids[0])), Status::Closed);

    // After it, on a third: the open and its secret move there.
    let third = world.begin(3, "u1");
    let effects = world.ask(third, Request::Open(request.clone()));
    assert!(matches!(effects[..], [Effect::Disconnect(_), Effect::Inspect { .. }]), "{effects:?}");
    let effects = world.look(effects, 5);
    let again = opened(&effects[1..]);
    assert_eq!((again.open, again.created), (ids[0], true));
    assert_eq!(world.authority.counts().opens, 1);
    assert_eq!(world.refused(third, Request::Open(other)), Status::DuplicateCreate);
    world.give(Input::LinkUp { service_blob: Vec::new(), held: Vec::new() });
    assert_eq!(world.redeem(right(&session_key(2), &again, 1, RW)).err(), Some(Status::BadKey));
    world.bind(&session_key(3), &again, 1);
    // The first connections end; the open is the third's.
    world.give(Input::SessionLost(first));
    world.give(Input::SessionLost(second));
    assert_eq!(world.authority.counts().opens, 1);
    // Another principal's create id is another create id.
    let stranger = world.begin(4, "u2");
    opened(&world.try_open(stranger, open(1, Access::READ, ShareMode::ALL), 6));
}

#[test]
fn a_session_lost_while_its_file_is_opened_leaves_nothing() {
    let mut world = World::new();
    let session = world.begin(1, "u1");
    let effects = world.ask(session, Request::Open(open(1, RW, ShareMode::NONE)));
    let [Effect::OpenFile { operation, file, .. }] = effects[..] else { panic!("{effects:?}") };
    world.give(Input::SessionLost(session));
    let effects = world.found(operation, 5, true);
    assert!(matches!(effects[0], Effect::CloseFile(closed) if closed == file));
    assert_eq!(world.authority.counts(), Default::default());
}

#[test]
fn opn_08_close_waits_for_every_fence_and_all_work() {
    let mut world = World::new();
    let session = world.begin(1, "u1");
    world.give(Input::LinkUp { service_blob: Vec::new(), held: Vec::new() });
    let held = world.open(session, open(1, RW, ShareMode::NONE), 5);
    let bindings = [1, 2].map(|nonce| world.bind(&session_key(1), &held, nonce));
    let size = SetAttributes {
        target: Target::Open(held.open),
        size: Some(1),
        mode: None,
        accessed: None,
        modified: None,
    };
    let effects = world.ask(session, Request::SetAttributes(size));
    let [Effect::Perform { operation, .. }] = effects[..] else { panic!("{effects:?}") };
    let asked = fences(&world.ask(session, close(held.open)));
    assert_eq!(asked.iter().map(|fence| fence.binding).collect::<Vec<_>>(), bindings);
    // KEY-07: the key is dead from now on.
    assert_eq!(world.redeem(right(&session_key(1), &held, 3, RW)).err(), Some(Status::BadKey));
    assert_eq!(world.refused(session, Request::QueryKey(held.open)), Status::Closed);
    assert!(world.confirm(asked[0]).is_empty());
    assert!(world.confirm(asked[0]).is_empty(), "twice is once");
    assert!(world.ask(session, close(held.open)).is_empty(), "the second close waits with the first");
    // A binding that ends by itself while it is being fenced has ended as well.
    assert!(world.give(Input::Released(bindings[1])).is_empty(), "work is left");
    let rival = world.try_open(session, open(2, Access::READ, ShareMode::ALL), 5);
    assert_eq!(refusal(&rival), Status::ShareConflict, "fence before grant");
    let effects = world.performed(operation, 5);
    let done = effects.iter().filter(|e| matches!(e, Effect::Reply { reply: Reply::Done, .. })).count();
    assert!(effects.iter().any(|e| matches!(e, Effect::CloseFile(_))) && done == 2);
    opened(&world.try_open(session, open(2, Access::READ, ShareMode::ALL), 5));
    assert_eq!(world.refused(session, close(held.open)), Status::Closed);
}

#[test]
fn a_fence_that_is_not_confirmed_is_told_once_and_waited_for() {
    let mut world = World::new();
    let session = world.begin(1, "u1");
    world.give(Input::LinkUp { service_blob: Vec::new(), held: Vec::new() });
    let held = world.open(session, open(1, RW, ShareMode::ALL), 5);
    let binding = world.bind(&session_key(1), &held, 1);
    assert_eq!(world.authority.poll_timeout(), None);
    let asked = fences(&world.give(Input::SessionLost(session)));
    let due = world.authority.poll_timeout().unwrap();
    assert_eq!(due, Timestamp::default().saturating_add(Duration::from_secs(10)));
    let mut effects = Vec::new();
    world.authority.handle_timeout(due, &mut effects);
    assert!(matches!(effects[..], [Effect::FenceOverdue(overdue)] if overdue == binding));
    assert_eq!(world.authority.poll_timeout(), None);
    assert_eq!(world.authority.counts().opens, 1, "no proof, no end");
    world.authority.check_invariants();
    assert!(matches!(world.confirm(asked[0])[..], [Effect::CloseFile(_)]));
    assert_eq!(world.authority.counts(), Default::default());
}

#[test]
fn limits_answer_too_many_and_give_back() {
    let limits = Limits {
        sessions: 3,
        sessions_per_principal: 2,
        opens: 4,
        opens_per_principal: 3,
        opens_per_session: 2,
        operations: 2,
        ..Limits::default()
    };
    let mut world = World::with(limits, 1);
    let (one, two) = (world.begin(1, "u1"), world.begin(2, "u1"));
    let other = world.begin(3, "u2");
    let mut number = 0;
    let mut next = || {
        number += 1;
        open(number, Access::READ, ShareMode::ALL)
    };
    let first = world.open(one, next(), 1);
    world.open(one, next(), 1);
    assert_eq!(world.refused(one, Request::Open(next())), Status::TooMany, "of the session");
    world.open(two, next(), 1);
    assert_eq!(world.refused(two, Request::Open(next())), Status::TooMany, "of the principal");
    world.open(other, next(), 1);
    assert_eq!(world.refused(other, Request::Open(next())), Status::TooMany, "in all");
    assert!(closes(&world.ask(one, close(first.open))));
    // Two operations are under way: no third.
    assert_eq!(world.ask(other, Request::Open(next())).len(), 1);
    let path = || Request::GetAttributes(Target::Path(place("file")));
    assert_eq!(world.ask(two, path()).len(), 1);
    assert_eq!(world.refused(two, path()), Status::TooMany);
}

#[test]
fn one_principal_cannot_use_up_all_operations() {
    let limits = Limits { operations: 4, operations_per_principal: 2, ..Limits::default() };
    let mut world = World::with(limits, 1);
    let (one, two) = (world.begin(1, "u1"), world.begin(2, "u1"));
    let other = world.begin(3, "u2");
    let path = || Request::GetAttributes(Target::Path(place("file")));
    assert_eq!(world.ask(one, path()).len(), 1);
    let effects = world.ask(two, path());
    let [Effect::Perform { operation, .. }] = effects[..] else { panic!("{effects:?}") };
    assert_eq!(world.refused(one, path()), Status::TooMany, "whichever its session");
    // What is under way counts when its session is gone, and until it ends.
    world.give(Input::SessionLost(two));
    assert_eq!(world.refused(one, path()), Status::TooMany);
    assert_eq!(world.ask(other, path()).len(), 1);
    world.performed(operation, 5);
    assert_eq!(world.ask(one, path()).len(), 1);
}

#[test]
fn the_root_of_a_volume_keeps_its_attributes() {
    let mut world = World::new();
    let session = world.begin(1, "u1");
    for path in ["", ".", "./"] {
        let target = Target::Path(place(path));
        let set = SetAttributes { target, size: None, mode: Some(0), accessed: None, modified: None };
        assert_eq!(world.refused(session, Request::SetAttributes(set)), Status::Invalid);
    }
}

#[test]
fn a_removal_claims_its_file_until_it_is_done() {
    let mut world = World::new();
    let session = world.begin(1, "u1");
    let effects = world.ask(session, Request::Remove(place("file")));
    let [Effect::Resolve { operation, .. }] = effects[..] else { panic!("{effects:?}") };
    let effects = world.give(Input::Resolved { operation, result: Ok(vec![Some(identity(5))]) });
    assert!(matches!(effects[..], [Effect::Perform { work: Work::Remove(..), .. }]));
    let keep = ShareMode::READ | ShareMode::WRITE;
    assert_eq!(refusal(&world.try_open(session, open(1, RW, keep), 5)), Status::ShareConflict);
    opened(&world.try_open(session, open(2, RW, ShareMode::ALL), 5));
    world.give(Input::Performed { operation, result: Ok(Reply::Done) });
    opened(&world.try_open(session, open(1, RW, keep), 5));
    // Now there is an open that denies it: for the file, and for what a rename would replace.
    for (names, request) in [
        (vec![Some(identity(5))], Request::Remove(place("file"))),
        (
            vec![Some(identity(9)), Some(identity(5))],
            Request::Rename(Rename { from: place("a"), to: place("file"), no_replace: false }),
        ),
    ] {
        let effects = world.ask(session, request);
        let [Effect::Resolve { operation, .. }] = effects[..] else { panic!("{effects:?}") };
        let effects = world.give(Input::Resolved { operation, result: Ok(names) });
        assert_eq!(refusal(&effects), Status::ShareConflict);
    }
    let across = Rename {
        from: place("a"),
        to: crate::wire::control::Place { volume: "other".into(), path: "b".into() },
        no_replace: false,
    };
    assert_eq!(world.refused(session, Request::Rename(across)), Status::Invalid);
}

#[test]
fn secrets_are_silent() {
    let mut world = World::new();
    let session = world.begin(0xAB, "u1");
    let held = world.open(session, open(1, RW, ShareMode::ALL), 5);
    let redeem = right(&session_key(0xAB), &held, 0xAB, RW);
    assert!(!format!("{redeem:?}").contains(&format!("{:?}", redeem.proof)));
    assert!(!format!("{redeem:?} {held:?}").contains(&format!("{:?}", redeem.resume_key)));
    let shown = format!("{:?}", world.authority);
    assert!(!shown.contains("171, 171"), "the session key is shown");
    assert!(shown.contains("Secret(..)"));
}
