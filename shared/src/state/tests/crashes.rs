//! What is known again after a crash: the journal's records, from the first to any of them.

use super::world::*;
use crate::journal::record::Record;
use crate::state::{Effect, Input, Limits, OpenState};
use crate::types::{Access, Evidence, OpenId, SessionId, ShareMode, Status, Verdict};
use crate::wire::control::{Opened, Reply, Request, Resume};
use crate::wire::link::{Held, LinkBinding, Wrote};
use std::time::Duration;

fn held_binding(binding: LinkBinding, opened: &Opened, epoch: u64, last_write_ns: u64) -> Held {
    Held {
        binding,
        open: opened.open,
        handle: opened.handle,
        epoch,
        access: RW,
        ending: false,
        last_write_ns,
        rules_version: 0,
        transcript: [0; 32],
    }
}

#[test]
fn crs_01_every_open_and_lock_stands_before_anybody_is_let_in() {
    let mut world = World::new();
    let first = world.begin(1, "u1");
    let before = world.open(first, held(1, RW, ShareMode::READ, 1000), 5);
    assert!(done(&world.ask(first, lock(before.open, 1, 0, 10))));
    world.now = world.now.saturating_add(Duration::from_secs(99));
    let mut world = world.recover();
    let rival = world.begin(2, "u2");
    let effects = world.try_open(rival, open(1, RW, ShareMode::ALL), 5);
    assert_eq!(refusal(&effects), Status::Busy);
    let reader = world.open(rival, open(2, Access::READ, ShareMode::ALL), 5);
    assert_eq!(world.refused(rival, lock(reader.open, 1, 0, 1)), Status::Busy);
    // Another file is open for business from the first second.
    world.open(rival, open(3, RW, ShareMode::NONE), 6);
    // The hold time counts anew.
    world.pass(Duration::from_millis(999));
    assert_eq!(refusal(&world.try_open(rival, open(1, RW, ShareMode::ALL), 5)), Status::Busy);
    let second = world.begin(3, "u1");
    let after = resumed(&world.resume(second, &before, 5));
    assert_eq!((after.verdict, after.locks_kept, after.lock_sequence), (Verdict::Unchanged, true, 1));
    assert_eq!(after.opened.epoch, 2);
    world.give(Input::LinkUp { service_blob: Vec::new(), held: Vec::new() });
    world.bind(&session_key(3), &after.opened, 1);
}

#[test]
fn crs_03_nobody_came_or_somebody_did() {
    for changed in [false, true] {
        let mut world = World::new();
        let first = world.begin(1, "u1");
        let before = world.open(first, held(1, RW, ShareMode::ALL, 1000), 5);
        let mut world = world.recover();
        world.pass(Duration::from_secs(2));
        if changed {
            world.touch(5);
        }
        let second = world.begin(2, "u1");
        let wanted = if changed { Verdict::Changed } else { Verdict::ExpiredUnchanged };
        assert_eq!(resumed(&world.resume(second, &before, 5)).verdict, wanted);
    }
}

#[test]
fn crs_05_a_change_between_two_crashes_is_told() {
    let mut world = World::new();
    let first = world.begin(1, "u1");
    let before = world.open(first, held(1, RW, ShareMode::ALL, 1000), 5);
    let mut world = world.recover();
    world.pass(Duration::from_secs(2));
    let rival = world.begin(2, "u2");
    world.open(rival, open(1, RW, ShareMode::ALL), 5);
    world.touch(5);
    let mut world = world.recover();
    let second = world.begin(3, "u1");
    assert_eq!(resumed(&world.resume(second, &before, 5)).verdict, Verdict::Changed);
}

#[test]
fn the_servers_own_writes_are_no_change_and_a_later_one_is() {
    // How the file looks after the crash, the last write that is known, and from whom.
    for (changed_ns, last_write, told_by_binding, wanted) in [
        (0, 0, false, Verdict::Unchanged),
        (70, 0, false, Verdict::Changed),
        (70, 69, false, Verdict::Changed),
        (70, 70, false, Verdict::Unchanged),
        // It lives and may write: what it wrote after it had told its time is its own, too.
        (70, 69, true, Verdict::Unchanged),
        (70, 71, true, Verdict::Unchanged),
    ] {
        let mut world = World::new();
        let first = world.begin(1, "u1");
        world.give(Input::LinkUp { service_blob: Vec::new(), held: Vec::new() });
        let before = world.open(first, held(1, RW, ShareMode::ALL, 1000), 5);
        let binding = world.bind(&session_key(1), &before, 1);
        world.evidence.insert(5, Evidence { changed_ns, ..Evidence::default() });
        let mut world = world.crash();
        if told_by_binding {
            world.give(Input::DataplaneMayLive);
            let held = vec![held_binding(binding, &before, 1, last_write)];
            assert!(world.give(Input::LinkUp { service_blob: Vec::new(), held }).is_empty());
        } else {
            world.authority.set_last_write(last_write);
            world.give(Input::LinkLost);
            world.give(Input::LinkUp { service_blob: Vec::new(), held: Vec::new() });
        }
        let second = world.begin(2, "u1");
        let resume_key = before.key.resume_key.clone();
        let keep = vec![before.handle];
        let effects = world.ask(second, Request::Resume(Resume { resume_key, supersede: None, keep }));
        let after = resumed(&world.look(effects, 5));
        assert_eq!(after.verdict, wanted, "{changed_ns} {last_write} {told_by_binding}");
        assert_eq!(after.kept.len(), usize::from(told_by_binding));
    }
}

#[test]
fn what_a_binding_wrote_that_is_gone_is_its_opens_own() {
    // How the file looks after control's crash; what a living dataplane tells of the open, and of another one.
    for (changed_ns, wrote, others, wanted) in [
        (70, 0, 0, Verdict::Changed),
        (70, 70, 0, Verdict::Unchanged),
        (70, 69, 0, Verdict::Changed),
        (70, 0, 99, Verdict::Changed),
    ] {
        let mut world = World::new();
        let first = world.begin(1, "u1");
        world.give(Input::LinkUp { service_blob: Vec::new(), held: Vec::new() });
        let before = world.open(first, held(1, RW, ShareMode::ALL, 1000), 5);
        let other = world.open(first, held(2, RW, ShareMode::ALL, 1000), 6);
        world.evidence.insert(5, Evidence { changed_ns, ..Evidence::default() });
        let mut world = world.crash();
        world.give(Input::DataplaneMayLive);
        let wrote = [(before.open, wrote), (other.open, others), (OpenId([9; 16]), 99)];
        let wrote = wrote.map(|(open, last_write_ns)| Wrote { open, last_write_ns });
        world.give(Input::Wrote(wrote.to_vec()));
        world.give(Input::LinkUp { service_blob: Vec::new(), held: Vec::new() });
        let second = world.begin(2, "u1");
        let after = resumed(&world.resume(second, &before, 5));
        assert_eq!(after.verdict, wanted, "{changed_ns} {wrote:?}");
    }
}

#[test]
fn rsm_18_bindings_that_outlived_control_are_adopted_or_fenced() {
    let mut world = World::new();
    let first = world.begin(1, "u1");
    world.give(Input::LinkUp { service_blob: Vec::new(), held: Vec::new() });
    let before = world.open(first, held(1, RW, ShareMode::NONE, 60_000), 5);
    let closed = world.open(first, held(2, RW, ShareMode::NONE, 60_000), 6);
    let binding = world.bind(&session_key(1), &before, 1);
    assert!(closes(&world.ask(first, close(closed.open))));
    let mut world = world.crash();
    world.give(Input::DataplaneMayLive);
    let session = world.begin(2, "u1");
    assert_eq!(world.refused(session, resume(&before, None)), Status::Unavailable);
    let strange = LinkBinding(99);
    let old = LinkBinding(98);
    let held = vec![
        held_binding(binding, &before, 1, 0),
        held_binding(old, &before, 0, 0),
        held_binding(strange, &closed, 1, 0),
    ];
    let asked = fences(&world.give(Input::LinkUp { service_blob: Vec::new(), held }));
    assert_eq!(asked.iter().map(|fence| fence.binding).collect::<Vec<_>>(), [old, strange]);
    // Until the stray one is gone nothing is granted.
    assert_eq!(world.refused(session, Request::Open(open(3, RW, ShareMode::ALL))), Status::Unavailable);
    world.confirm(asked[1]);
    assert_eq!(world.authority.counts().bindings, 2);
    world.confirm(asked[0]);
    opened(&world.try_open(session, open(3, RW, ShareMode::ALL), 7));
    // New numbers are unlike any old ones.
    let other = world.open(session, open(4, RW, ShareMode::ALL), 8);
    assert!(world.bind(&session_key(2), &other, 1).0 > 1 << 32);
    // The adopted one lives on for the linger, then it is fenced.
    let asked = fences(&world.pass(Duration::from_secs(5)));
    assert_eq!(asked[0].binding, binding);
}

#[test]
fn opn_06_a_create_id_is_known_after_a_crash() {
    let mut world = World::new();
    let first = world.begin(1, "u1");
    let request = held(1, RW, ShareMode::NONE, 1000);
    let before = world.open(first, request.clone(), 5);
    let mut world = world.recover();
    for n in 2..5 {
        let later = world.begin(n, "u1");
        let effects = world.ask(later, Request::Open(request.clone()));
        let effects = world.look(effects, 5);
        let again = effects.iter().find_map(|effect| match effect {
            Effect::Reply { reply: Reply::Opened(opened), .. } => Some(opened),
            _ => None,
        });
        let again = again.unwrap_or_else(|| panic!("{effects:?}"));
        assert_eq!((again.open, again.created), (before.open, before.created));
    }
    assert_eq!(world.authority.counts().opens, 1);
}

#[test]
fn a_file_that_is_lost_is_told_so() {
    let mut world = World::new();
    let first = world.begin(1, "u1");
    let before = world.open(first, held(1, RW, ShareMode::NONE, 1000), 5);
    let (mut world, reopens) = world.restart();
    assert_eq!((reopens.len(), reopens[0].identity), (1, identity(5)));
    assert_eq!((reopens[0].file_handle.as_slice(), reopens[0].at.path.as_str()), (&[1, 2, 3][..], "file"));
    world.give(Input::Reopened { open: before.open, result: Err("it is gone".into()) });
    world.give(Input::LinkLost);
    let second = world.begin(2, "u1");
    let effects = world.resume(second, &before, 5);
    assert!(matches!(
        effects[..],
        [Effect::Reply { reply: Reply::Gone(gone), .. }] if gone.changed && gone.reason == crate::types::GoneReason::FileLost
    ));
    world.open(second, open(1, RW, ShareMode::NONE), 5);
}

/// CRS-06: what was acknowledged is there after a crash at any record; what was not, is there or not. Here a whole story is
/// told with a slow disk, and the crash comes after each record of it.
#[test]
fn crs_06_what_was_acknowledged_is_there_after_a_crash_at_any_record() {
    let mut world = World::new();
    world.holds_journal = true;
    let mut acks: Vec<(usize, &str)> = Vec::new();
    let first = world.begin(1, "u1");
    let mut say = |world: &mut World, effects: Vec<Effect>, what: &'static str| {
        let acknowledges =
            |effects: &[Effect]| effects.iter().any(|effect| matches!(effect, Effect::Reply { .. }));
        assert!(!acknowledges(&effects), "{what} is answered before it is durable");
        let effects = world.sync();
        let effects = world.look(effects, 5);
        let effects = [effects, world.sync()].concat_effects();
        assert!(acknowledges(&effects), "{what} is not answered: {effects:?}");
        acks.push((world.journal.len(), what));
        effects
    };
    let effects = world.try_open(first, held(1, RW, ShareMode::NONE, 1000), 5);
    let effects = say(&mut world, effects, "opened");
    let before = opened(&effects);
    let effects = world.ask(first, lock(before.open, 1, 0, 10));
    say(&mut world, effects, "locked");
    let effects = world.ask(first, lock(before.open, 2, 20, 10));
    say(&mut world, effects, "locked again");
    let effects = world.ask(first, unlock(before.open, 3, 0, 10));
    say(&mut world, effects, "unlocked");
    world.lose(first, 5);
    let effects = world.sync();
    world.look(effects, 5);
    world.sync();
    let second = world.begin(2, "u1");
    let effects = world.ask(second, resume(&before, None));
    let effects = world.look(effects, 5);
    let after = resumed(&say(&mut world, effects, "resumed")).opened;
    let effects = world.ask(second, close(after.open));
    say(&mut world, effects, "closed");

    for crash in 0..=world.journal.len() {
        let acked = |what: &str| acks.iter().any(|(at, said)| *said == what && *at <= crash);
        let mut recovered = world.recover_from(&world.journal[..crash]);
        let view = recovered.authority.list_opens(recovered.now, None, 10).pop();
        let locks = view.as_ref().map_or(0, |view| view.locks.len());
        if acked("closed") {
            assert!(view.is_none() && locks == 0);
        } else if acked("opened") {
            let view = view.unwrap();
            assert_eq!((view.open, view.state), (before.open, OpenState::Detached));
            let holds = |offset| view.locks.iter().any(|(_, lock)| lock.range.offset() == offset);
            let unlock_written = crash >= acks[3].0;
            assert!(!acked("locked") || unlock_written || holds(0), "after record {crash}");
            assert!(!acked("locked again") || holds(20), "after record {crash}");
            assert!(!acked("unlocked") || !holds(0), "after record {crash}");
            assert_eq!(view.epoch, if crash >= acks[4].0 { 2 } else { 1 });
        }
        // Whoever the owner is now, it comes back with what it was told last.
        let third = recovered.begin(9, "u1");
        let effects = recovered.resume(third, &before, 5);
        if acked("closed") || crash == 0 {
            assert_eq!(refusal(&effects), Status::BadKey);
        } else {
            assert_eq!(resumed(&effects).verdict, Verdict::Unchanged);
        }
    }
}

/// Puts two lists of effects together.
trait Concat {
    fn concat_effects(self) -> Vec<Effect>;
}

impl Concat for [Vec<Effect>; 2] {
    fn concat_effects(self) -> Vec<Effect> {
        self.into_iter().flatten().collect()
    }
}

#[test]
fn crs_06_a_tombstone_is_durable_before_the_contender_is_let_in() {
    let mut world = World::new();
    let first = world.begin(1, "u1");
    let before = world.open(first, held(1, RW, ShareMode::NONE, 1000), 5);
    world.lose(first, 5);
    world.pass(Duration::from_secs(1));
    world.holds_journal = true;
    let rival = world.begin(2, "u2");
    let effects = world.try_open(rival, open(1, RW, ShareMode::ALL), 5);
    assert!(effects.iter().all(|effect| matches!(effect, Effect::CloseFile(_))), "{effects:?}");
    assert!(matches!(world.journal.last(), Some(Record::Tombstone(_))));
    let effects = world.sync();
    assert!(effects.iter().any(|effect| matches!(effect, Effect::OpenFile { .. })));
    let mut world = world.recover();
    let second = world.begin(3, "u1");
    let effects = world.resume(second, &before, 5);
    assert!(matches!(effects[..], [Effect::Reply { reply: Reply::Gone(gone), .. }] if !gone.changed));
}

#[test]
fn crs_06_a_mark_is_durable_before_the_writer_is_let_in() {
    let mut world = World::new();
    let first = world.begin(1, "u1");
    world.give(Input::LinkUp { service_blob: Vec::new(), held: Vec::new() });
    let before = world.open(first, held(1, RW, ShareMode::ALL, 1000), 5);
    world.bind(&session_key(1), &before, 1);
    world.lose(first, 5);
    world.holds_journal = true;
    let rival = world.begin(2, "u2");
    assert!(world.try_open(rival, open(1, RW, ShareMode::ALL), 5).is_empty());
    let records = &world.journal[world.journal.len() - 2..];
    assert!(matches!(records, [Record::Marked(id), Record::Opened(_)] if *id == before.open));
    let mut world = world.recover();
    let second = world.begin(3, "u1");
    assert_eq!(resumed(&world.resume(second, &before, 5)).verdict, Verdict::Changed);
}

#[test]
fn crs_12_without_room_nothing_new_is_promised_and_everything_can_be_closed() {
    let mut world = World::new();
    let (first, second) = (world.begin(1, "u1"), world.begin(2, "u1"));
    let kept = world.open(first, held(1, RW, ShareMode::ALL, 1000), 5);
    let live = world.open(second, held(2, RW, ShareMode::ALL, 1000), 5);
    assert!(done(&world.ask(second, lock(live.open, 1, 0, 10))));
    // One is on its way when the room goes.
    let effects = world.ask(second, Request::Open(open(3, RW, ShareMode::ALL)));
    let [Effect::OpenFile { operation, .. }] = effects[..] else { panic!("{effects:?}") };
    world.lose(first, 5);
    world.give(Input::JournalRoom(false));
    assert_eq!(refusal(&world.found(operation, 5, false)), Status::NoSpace);
    let before = world.journal.len();
    assert_eq!(world.refused(second, Request::Open(open(4, RW, ShareMode::ALL))), Status::NoSpace);
    assert_eq!(world.refused(second, lock(live.open, 2, 20, 1)), Status::NoSpace);
    assert_eq!(world.refused(second, resume(&kept, None)), Status::NoSpace);
    assert_eq!(world.journal.len(), before);
    assert!(done(&world.ask(second, unlock(live.open, 2, 0, 10))));
    assert!(closes(&world.ask(second, close(live.open))));
    world.give(Input::JournalRoom(true));
    assert_eq!(resumed(&world.resume(second, &kept, 5)).verdict, Verdict::Changed);
}

/// A checkpoint is taken in chunks while the world goes on: from any of them on, the journal says the same.
#[test]
fn a_checkpoint_says_what_the_records_before_it_said() {
    let mut world = World::new();
    let first = world.begin(1, "u1");
    let opens: Vec<Opened> =
        (1..=6).map(|n| world.open(first, held(n, RW, ShareMode::ALL, 1000), u64::from(n))).collect();
    for (n, opened) in opens.iter().enumerate() {
        assert!(done(&world.ask(first, lock(opened.open, 1, n as u64, 1))));
    }
    let effects = world.give(Input::ForceClose(opens[5].open));
    world.look(effects, 6);
    let mut file: Vec<Record> = Vec::new();
    let mut cursor = None;
    let mut step = 0;
    loop {
        let (chunk, next) = world.authority.checkpoint(cursor, 2);
        file.extend(chunk);
        let before = world.journal.len();
        match step {
            0 => {
                assert!(closes(&world.ask(first, close(opens[0].open))));
                assert!(done(&world.ask(first, unlock(opens[4].open, 2, 4, 1))));
            }
            1 => {
                world.open(first, held(7, RW, ShareMode::ALL, 1000), 7);
                assert!(done(&world.ask(first, lock(opens[1].open, 2, 50, 1))));
            }
            2 => drop(world.lose(first, 5)),
            _ => {}
        }
        file.extend_from_slice(&world.journal[before..]);
        step += 1;
        cursor = next;
        if cursor.is_none() {
            break;
        }
    }
    assert!(step > 2);
    let mut recovery = world.recovery();
    for record in file {
        recovery.apply(record, true).unwrap();
    }
    let (authority, reopens) = recovery.finish(world.journal.len() as u64);
    let whole = world.recover();
    let views = |authority: &crate::state::Authority| {
        let views = authority.list_opens(world.now, None, 100).into_iter();
        views.map(|view| (view.open, view.epoch, view.locks, view.marked)).collect::<Vec<_>>()
    };
    assert_eq!(views(&authority), views(&whole.authority));
    assert_eq!(reopens.len(), views(&authority).len());
    assert_eq!(authority.counts().tombstones, 1);
}

#[test]
fn records_that_cannot_follow_one_another_are_named() {
    let mut world = World::new();
    let first = world.begin(1, "u1");
    let opened = world.open(first, held(1, RW, ShareMode::NONE, 1000), 5);
    assert!(done(&world.ask(first, lock(opened.open, 1, 0, 10))));
    let journal = world.journal.clone();
    let unknown = OpenId([0xEE; 16]);
    for (records, inside, wrong) in [
        (vec![Record::Closed(unknown)], false, true),
        (vec![Record::Closed(unknown)], true, false),
        (vec![journal[0].clone(), Record::Baseline(opened.open, Evidence::default())], false, true),
        (vec![journal[0].clone(), Record::Detached(opened.open), Record::Detached(opened.open)], false, true),
        (vec![journal[1].clone()], false, true),
        (vec![journal[0].clone(), journal[1].clone(), journal[1].clone()], false, true),
        (vec![Record::Forgotten(unknown)], false, true),
        (journal.clone(), false, false),
    ] {
        let mut recovery = world.recovery();
        let results: Vec<_> = records.into_iter().map(|record| recovery.apply(record, inside)).collect();
        let last = results.last().unwrap();
        assert_eq!(last.is_err(), wrong, "{last:?}");
        if let Err(error) = last {
            assert!(error.to_string().contains("open "), "{error}");
        }
    }
    let mut other = World::with(Limits::default(), 2).recovery();
    assert!(other.apply(journal[0].clone(), false).is_err(), "another server's secret");
    let _: SessionId = first;
}
