//! Opens from the outside: dispositions, share modes, create ids, names that go, and who waits for whom.

use crate::common::probe::*;
use crate::common::{Deployment, Wish};
use holdfast_client::{
    Access, Changes, CreateId, Disposition, Error, GoneReason, HoldClass, OpenOptions, ProcessId, ShareMode,
    Status, Verdict,
};
use std::time::Duration;

fn with(disposition: Disposition) -> OpenOptions {
    OpenOptions::read_write().disposition(disposition, 0o640)
}

/// To read, write and delete; the name goes with the last open.
fn doomed() -> OpenOptions {
    rw().access(RWD).delete_on_close(true)
}

#[test]
fn opn_dispositions_of_what_is_there_and_what_is_not() {
    use Disposition::{CreateNew, Open, OpenOrCreate, Overwrite, OverwriteOrCreate};
    let server = Deployment::start();
    let file = server.volume().join("file");
    run(async {
        let session = connect(&server).await;
        for disposition in [Open, Overwrite] {
            assert_eq!(tried(&session, "file", &with(disposition)).await, Some(Status::NotFound));
            assert!(!file.exists(), "{disposition:?} makes nothing");
        }
        for disposition in [OpenOrCreate, CreateNew, OverwriteOrCreate] {
            let open = open(&session, "file", &with(disposition)).await;
            assert!(open.created() && open.attributes().size == 0, "{disposition:?}");
            open.close().await.unwrap();
            std::fs::remove_file(&file).unwrap();
        }
        for (disposition, size) in [(Open, 5), (OpenOrCreate, 5), (OverwriteOrCreate, 0), (Overwrite, 0)] {
            std::fs::write(&file, "12345").unwrap();
            let open = open(&session, "file", &with(disposition)).await;
            assert!(!open.created(), "{disposition:?}");
            assert_eq!(open.attributes().size, size, "{disposition:?}");
            assert_eq!(std::fs::metadata(&file).unwrap().len(), size, "{disposition:?}");
            open.close().await.unwrap();
        }
        std::fs::write(&file, "12345").unwrap();
        assert_eq!(tried(&session, "file", &with(CreateNew)).await, Some(Status::Exists));
        // What is refused has changed nothing.
        let held = open(&session, "file", &OpenOptions::read().share(ShareMode::READ)).await;
        for disposition in [Overwrite, OverwriteOrCreate] {
            assert_eq!(tried(&session, "file", &with(disposition)).await, Some(Status::ShareConflict));
            let reader = with(disposition).access(Access::READ);
            assert_eq!(tried(&session, "file", &reader).await, Some(Status::AccessDenied));
        }
        assert_eq!(std::fs::read(&file).unwrap(), b"12345");
        held.close().await.unwrap();
        std::fs::create_dir(server.volume().join("dir")).unwrap();
        for (name, disposition, refused) in [
            ("dir", Open, Status::IsDirectory),
            ("dir", CreateNew, Status::Exists),
            ("", OpenOrCreate, Status::IsDirectory),
            ("none/file", OpenOrCreate, Status::NotFound),
            ("file/below", OpenOrCreate, Status::NotDirectory),
            ("../file", OpenOrCreate, Status::PathEscape),
        ] {
            let got = tried(&session, name, &with(disposition)).await;
            assert_eq!(got, Some(refused), "{name:?} {disposition:?}");
        }
        let doom = rw().delete_on_close(true);
        assert_eq!(tried(&session, "file", &doom).await, Some(Status::AccessDenied), "without the right");
    });
}

/// Share modes are the file's, whatever name it was opened by; an open without access is in nobody's way.
#[test]
fn opn_01_two_names_are_one_file_and_no_access_is_no_claim() {
    let server = Deployment::start();
    std::fs::write(server.volume().join("one"), "x").unwrap();
    std::fs::hard_link(server.volume().join("one"), server.volume().join("two")).unwrap();
    std::os::unix::fs::symlink("one", server.volume().join("link")).unwrap();
    run(async {
        let (mine, theirs) = (connect(&server).await, connect(&server).await);
        let none = OpenOptions::read().access(Access::NONE).share(ShareMode::NONE);
        let looks = open(&theirs, "one", &none).await;
        let alone = open(&mine, "one", &rw().share(ShareMode::NONE)).await;
        for name in ["one", "two", "link"] {
            let refused = tried(&theirs, name, &OpenOptions::read()).await;
            assert_eq!(refused, Some(Status::ShareConflict), "{name}");
            assert_eq!(tried(&theirs, name, &none).await, None, "{name}");
            // One's own other open is another open.
            assert_eq!(tried(&mine, name, &OpenOptions::read()).await, Some(Status::ShareConflict), "{name}");
        }
        assert_eq!(looks.attributes_now().await.unwrap().size, 1);
        let shorter = Changes { size: Some(0), ..Changes::default() };
        assert_eq!(status(looks.set_attributes(&shorter).await), Some(Status::AccessDenied));
        assert_eq!(lock(&looks, shared(0, 1)).await, Some(Status::AccessDenied));
        let channel = looks.connect(holdfast_client::Transport::Tcp).await.unwrap();
        assert_eq!(
            status(looks.bind(&channel).await),
            Some(Status::AccessDenied),
            "nothing to read or write"
        );
        alone.close().await.unwrap();
        assert_eq!(
            tried(&theirs, "two", &rw().share(ShareMode::NONE)).await,
            None,
            "beside one without access"
        );
    });
}

/// Every pair of one right against one share mode, in both orders, against an open whose client is away: what is a conflict is
/// `Busy` with the time left, and takes the file at once from a class that yields.
#[test]
fn opn_01_every_right_against_every_share_mode_of_a_detached_open() {
    let server = Deployment::start();
    std::fs::write(server.volume().join("file"), "x").unwrap();
    let rights = [
        (Access::READ, ShareMode::READ),
        (Access::WRITE, ShareMode::WRITE),
        (Access::DELETE, ShareMode::DELETE),
    ];
    run(async {
        let other = connect(&server).await;
        let all_but =
            |denied: ShareMode| ShareMode::from_bits(ShareMode::ALL.bits() & !denied.bits()).unwrap();
        for (access, _) in rights {
            for (_, denied) in rights {
                for denies in [true, false] {
                    // Either the first open denies what the second wants, or the second denies what the first has.
                    let owner = if denies { all_but(denied) } else { ShareMode::ALL };
                    let (key, _) = detached(&server, "file", &rw().access(access).share(owner)).await;
                    for (wanted, right) in rights {
                        let share = if denies { ShareMode::ALL } else { all_but(denied) };
                        let conflict = if denies { right == denied } else { !share.admits(access) };
                        let options = rw().access(wanted).share(share);
                        let words = format!("{access:?} {owner:?} against {wanted:?} {share:?}");
                        match other.open(&place("file"), &options).await {
                            Ok(open) => {
                                assert!(!conflict, "{words}");
                                open.close().await.unwrap();
                            }
                            Err(Error::Refused(refusal)) => {
                                assert!(conflict && refusal.status == Status::Busy, "{words}: {refusal}");
                                let left = refusal.retry.expect("the time left");
                                assert!(left <= Duration::from_secs(60), "{words}: {left:?}");
                            }
                            Err(error) => panic!("{words}: {error:?}"),
                        }
                    }
                    resume(&other, &key).await.unwrap().open.close().await.unwrap();
                }
            }
        }
        for wrote in [false, true] {
            let (key, _) =
                detached(&server, "file", &rw().share(ShareMode::NONE).class(HoldClass::Yield)).await;
            assert_eq!(tried(&other, "file", &rw().access(Access::NONE)).await, None, "no conflict, no end");
            let open = open(&other, "file", &rw()).await;
            if wrote {
                write(&bound(&open).await, 0, 1).await.unwrap();
            }
            let gone = resume(&other, &key).await.err();
            let expected = |e: &Error| matches!(e, Error::Gone { reason: GoneReason::Evicted, changed } if *changed == wrote);
            assert!(gone.as_ref().is_some_and(expected), "{wrote}: {gone:?}");
            open.close().await.unwrap();
        }
    });
}

/// The same request under the same create id is the same open: in its session, in a later one, after a restart of control.
#[test]
fn opn_06_a_create_id_names_one_open() {
    let mut server = Deployment::with(&Wish { principals: &[("other", "read-write")], ..Wish::default() });
    run(async {
        let (mine, theirs) = (connect(&server).await, connect_as(&server, "other").await);
        let id = CreateId::from_random(holdfast_client::random_bytes().unwrap());
        let asked = OpenOptions::create_new(0o600).create_id(id).hold(Duration::from_secs(50));
        let first = open(&mine, "file", &asked).await;
        let again = open(&mine, "file", &asked).await;
        assert_eq!((again.id(), again.created()), (first.id(), true), "in the same session");
        for (what, other) in [
            ("access", asked.clone().access(Access::READ)),
            ("share mode", asked.clone().share(ShareMode::READ)),
            ("disposition", asked.clone().disposition(Disposition::OpenOrCreate, 0o600)),
            ("mode", asked.clone().disposition(Disposition::CreateNew, 0o644)),
            ("hold time", asked.clone().hold(Duration::from_secs(51))),
            ("class", asked.clone().class(HoldClass::Yield)),
            ("waiting", asked.clone().wait(Duration::from_secs(1))),
            ("process", asked.clone().process(ProcessId(7))),
        ] {
            assert_eq!(tried(&mine, "file", &other).await, Some(Status::DuplicateCreate), "another {what}");
        }
        assert_eq!(tried(&mine, "elsewhere", &asked).await, Some(Status::DuplicateCreate));
        assert!(!server.volume().join("elsewhere").exists());
        // Another principal's create ids are its own.
        assert_eq!(tried(&theirs, "file", &asked).await, Some(Status::Exists));
        // Its client is gone: else that would resume the open by itself, and one of the two would be told so.
        mine.detach().await;
        until_state(&server, first.id(), &["detached"]);
        server.kill_control();
        server.await_planes();
        let later = connect(&server).await;
        let taken = open(&later, "file", &asked).await;
        assert_eq!((taken.id(), taken.created()), (first.id(), true), "in a later session, after a restart");
        write(&bound(&taken).await, 0, 4).await.unwrap();
        assert!(server.gauges()["control.opens"] == 1, "there is no second open");
        taken.close().await.unwrap();
        // What is closed is forgotten: it would be opened anew, and the file is there.
        assert_eq!(tried(&later, "file", &asked).await, Some(Status::Exists));
        let anew = asked.clone().disposition(Disposition::OpenOrCreate, 0o600);
        let anew = open(&later, "file", &anew).await;
        assert!(anew.id() != first.id() && !anew.created());
    });
}

#[test]
fn opn_09_the_name_goes_with_the_last_open_whoever_asked() {
    let mut server = Deployment::start();
    run(async {
        let (mine, theirs) = (connect(&server).await, connect(&server).await);
        let there = |name: &str| server.volume().join(name).exists();
        // Who did not ask may be the last.
        let asked = open(&mine, "a", &doomed()).await;
        let other = open(&theirs, "a", &rw()).await;
        asked.close().await.unwrap();
        assert!(there("a"), "another has it open");
        let late = open(&mine, "a", &rw()).await;
        other.close().await.unwrap();
        assert!(there("a"));
        write(&bound(&late).await, 0, 3).await.unwrap();
        late.close().await.unwrap();
        assert!(!there("a"), "the last is closed");
        // Who asked is away.
        let (key, _) = detached(&server, "b", &doomed()).await;
        assert_eq!(tried(&theirs, "b", &rw()).await, None);
        assert!(there("b"), "a detached open counts");
        resume(&mine, &key).await.unwrap().open.close().await.unwrap();
        assert!(!there("b"));
        // Who asked logs off; who asked has no hold time and is lost.
        open(&mine, "c", &doomed()).await;
        mine.logoff().await.unwrap();
        assert!(!there("c"), "logged off");
        let lost = connect(&server).await;
        open(&lost, "d", &doomed().hold(Duration::ZERO)).await;
        lost.detach().await;
        server.until("the open is closed", |g| g["control.opens"] == 0);
        assert!(!there("d"), "lost without a hold time");
        // The file went from under the name: what stands there now is another's.
        let asked = open(&theirs, "e", &doomed()).await;
        std::fs::rename(server.volume().join("e"), server.volume().join("e.old")).unwrap();
        std::fs::write(server.volume().join("e"), "mine").unwrap();
        asked.close().await.unwrap();
        assert!(there("e"), "another file");
        // Closed by the operator.
        let asked = open(&theirs, "f", &doomed()).await;
        server.ok(&["opens", "--close", &asked.id().to_string()]);
        assert!(!there("f"), "closed by force");
    });
    run(async {
        let (key, id) = detached(&server, "g", &doomed()).await;
        server.kill_both();
        server.await_planes();
        assert!(server.volume().join("g").exists(), "a restart closes nothing");
        let session = connect(&server).await;
        let resumed = resume(&session, &key).await.unwrap();
        assert_eq!((resumed.verdict, resumed.open.id()), (Verdict::Unchanged, id));
        resumed.open.close().await.unwrap();
        assert!(!server.volume().join("g").exists(), "and forgets nothing");
    });
}

/// A rename takes the wish to remove along: it is the file that was to go.
#[test]
fn opn_09_a_renamed_file_goes_under_its_new_name() {
    let server = Deployment::start();
    run(async {
        let (mine, theirs) = (connect(&server).await, connect(&server).await);
        let asked = open(&mine, "old", &doomed()).await;
        theirs.rename(&place("old"), &place("new"), false).await.unwrap();
        std::fs::write(server.volume().join("old"), "another").unwrap();
        asked.close().await.unwrap();
        assert!(server.volume().join("old").exists(), "another file");
        assert!(!server.volume().join("new").exists(), "the file that was to go");
    });
}

/// Removing and renaming are judged as opens that want to delete.
#[test]
fn opn_names_change_only_where_every_open_shares_it() {
    let server = Deployment::start();
    run(async {
        let (mine, theirs) = (connect(&server).await, connect(&server).await);
        let denies = ShareMode::READ | ShareMode::WRITE;
        let held = open(&mine, "held", &rw().share(denies)).await;
        open(&mine, "free", &rw()).await.close().await.unwrap();
        let conflict = Some(Status::ShareConflict);
        assert_eq!(status(theirs.remove(&place("held")).await), conflict);
        assert_eq!(status(theirs.rename(&place("held"), &place("x"), false).await), conflict, "away");
        assert_eq!(status(theirs.rename(&place("free"), &place("held"), false).await), conflict, "over");
        assert_eq!(status(mine.remove(&place("held")).await), conflict, "one's own open denies it too");
        let none = status(theirs.rename(&place("free"), &place("held"), true).await);
        assert_eq!(none, Some(Status::Exists));
        held.close().await.unwrap();
        // Removed under an open that lets it: the file lives on, and the name is free.
        let shares = open(&mine, "held", &rw().share(ShareMode::DELETE)).await;
        let io = bound(&shares).await;
        write(&io, 0, 10).await.unwrap();
        theirs.remove(&place("held")).await.unwrap();
        let another = open(&theirs, "held", &OpenOptions::create_new(0o600).share(ShareMode::NONE)).await;
        assert_eq!(read(&io, 0, 20).await.unwrap(), 10, "the old file");
        assert_eq!(shares.attributes_now().await.unwrap().links, 0);
        another.close().await.unwrap();
        shares.close().await.unwrap();
        // The owner is away.
        for (class, wanted) in [(HoldClass::Hold, Some(Status::Busy)), (HoldClass::Yield, None)] {
            let (key, _) = detached(&server, "away", &rw().share(denies).class(class)).await;
            assert_eq!(status(theirs.remove(&place("away")).await), wanted, "{class:?}");
            let back = resume(&mine, &key).await;
            match wanted {
                Some(_) => {
                    let back = back.unwrap();
                    assert_eq!(back.verdict, Verdict::Unchanged);
                    back.open.close().await.unwrap();
                }
                None => assert!(matches!(back, Err(Error::Gone { changed: true, .. })), "{back:?}"),
            }
        }
    });
}

/// Who asked to wait for a detached open is let in when that ends, whatever ends it, and refused when its owner is back.
#[test]
fn rsm_08_who_waits_for_a_detached_open_is_answered_when_it_ends() {
    let server = Deployment::start();
    run(async {
        let (mine, theirs) = (connect(&server).await, connect(&server).await);
        let alone = rw().share(ShareMode::NONE);
        for end in ["resume", "resume and close", "force", "expiry", "cancelled"] {
            let hold = if end == "expiry" { Duration::from_millis(400) } else { Duration::from_secs(60) };
            let (key, id) = detached(&server, "file", &alone.clone().hold(hold)).await;
            let waiting = {
                let (theirs, alone) = (theirs.clone(), alone.clone().wait(Duration::from_secs(50)));
                tokio::spawn(async move { tried(&theirs, "file", &alone).await })
            };
            if end != "expiry" {
                server.until("it waits", |gauges| gauges["control.waiting_opens"] == 1);
            }
            let wanted = match end {
                "resume" => {
                    let open = resume(&mine, &key).await.unwrap().open;
                    assert_eq!(waiting.await.unwrap(), Some(Status::ShareConflict), "its owner is back");
                    open.close().await.unwrap();
                    continue;
                }
                "resume and close" => {
                    resume(&mine, &key).await.unwrap().open.close().await.unwrap();
                    // It may have been told of the resume already.
                    let got = waiting.await.unwrap();
                    assert!(matches!(got, None | Some(Status::ShareConflict)), "{got:?}");
                    continue;
                }
                "force" => {
                    server.ok(&["opens", "--close", &id.to_string()]);
                    GoneReason::ForceClosed
                }
                "expiry" => GoneReason::Evicted,
                _ => {
                    // Who waits goes away: the detached open is as it was.
                    waiting.abort();
                    let _ = waiting.await;
                    let back = resume(&mine, &key).await.unwrap();
                    assert_eq!(back.verdict, Verdict::Unchanged);
                    back.open.close().await.unwrap();
                    settled(&server);
                    continue;
                }
            };
            assert_eq!(waiting.await.unwrap(), None, "{end}");
            let gone = resume(&mine, &key).await.err();
            assert!(matches!(gone, Some(Error::Gone { reason, .. }) if reason == wanted), "{end}: {gone:?}");
        }
    });
}

#[test]
fn lim_01_opens_of_a_session_are_counted_and_given_back() {
    let server = Deployment::with(&Wish { settings: &[("opens_per_session", "3")], ..Wish::default() });
    run(async {
        let (mine, theirs) = (connect(&server).await, connect(&server).await);
        let mut opens = Vec::new();
        for n in 0..3 {
            opens.push(open(&mine, &format!("{n}"), &rw()).await);
        }
        for _ in 0..5 {
            assert_eq!(tried(&mine, "more", &rw()).await, Some(Status::TooMany));
        }
        assert!(!server.volume().join("more").exists(), "refused before anything is made");
        assert_eq!(tried(&theirs, "more", &rw()).await, None, "others are not concerned");
        let (key, _) = detached(&server, "away", &rw()).await;
        assert_eq!(status(resume(&mine, &key).await), Some(Status::TooMany), "a resume is counted");
        opens.pop().unwrap().close().await.unwrap();
        assert_eq!(resume(&mine, &key).await.unwrap().verdict, Verdict::Unchanged);
    });
}
