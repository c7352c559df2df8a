//! A journal that is not what it was, and one that is full.

use crate::common::Server;
use crate::common::client::{Client, held, open, resume};
use holdfast_shared::types::{LockRange, Status, Verdict};
use holdfast_shared::wire::control::{Opened, Reply, Request, Unlock};
use std::os::unix::fs::FileExt;
use std::process::Command;
use std::time::{Duration, Instant};

async fn some_opens(server: &Server, count: usize) -> Vec<Opened> {
    let mut client = Client::connect(server, "writer").await;
    let mut opens = Vec::new();
    for n in 0..count {
        opens.push(client.open(held(&format!("file{n}"))).await);
    }
    opens
}

/// Where the frames of a journal's file begin.
fn frames(file: &std::path::Path) -> Vec<usize> {
    let bytes = std::fs::read(file).unwrap();
    (64..bytes.len() - 4).step_by(8).filter(|at| &bytes[*at..at + 4] == b"HFJR").collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_middle_stops_the_start_and_is_named() {
    let mut server = Server::start();
    let opens = some_opens(&server, 6).await;
    server.kill();
    let file = server.journal().pop().unwrap();
    let at = frames(&file)[3];
    let journal = std::fs::OpenOptions::new().write(true).open(&file).unwrap();
    journal.write_all_at(b"!", at as u64 + 40).unwrap();
    let words = server.refuses_to_start();
    let name = file.file_name().unwrap().to_str().unwrap();
    assert!(words.contains(name) && words.contains(&format!("at byte {at}")), "{words}");
    assert!(words.contains(server.state("journal").to_str().unwrap()), "{words}");

    // The operator may give it up: then nothing of it is known.
    server.begin(&["--accept-journal-loss"]).ready(&mut server);
    let mut client = Client::connect(&server, "writer").await;
    for opened in &opens {
        assert_eq!(client.refused(resume(opened)).await, Status::BadKey);
    }
    let aside = std::fs::read_dir(server.dir.path().join("state")).unwrap();
    let aside =
        aside.flatten().find(|entry| entry.file_name().to_string_lossy().starts_with("journal.lost-"));
    assert!(aside.unwrap().path().join(name).exists(), "nothing is removed");
    server.restart();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_torn_end_is_cut() {
    let mut server = Server::start();
    let opens = some_opens(&server, 3).await;
    server.kill();
    let file = server.journal().pop().unwrap();
    let last = *frames(&file).last().unwrap();
    // As if a fourth had been half written when the power went.
    let bytes = std::fs::read(&file).unwrap();
    let length = u32::from_le_bytes(bytes[last + 4..last + 8].try_into().unwrap()) as usize;
    let end = last + (32 + length).next_multiple_of(8);
    let journal = std::fs::OpenOptions::new().write(true).open(&file).unwrap();
    journal.write_all_at(&bytes[last..end - 8], end as u64).unwrap();
    let ready = server.start_again();
    assert_eq!(ready["recovered"], 3);
    let mut client = Client::connect(&server, "writer").await;
    for opened in &opens {
        assert_eq!(client.resumed(opened).await.verdict, Verdict::Unchanged);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn crs_08_a_lost_or_older_journal_is_noticed() {
    let mut server = Server::start();
    let old = some_opens(&server, 1).await;
    server.kill();
    let (journal, copy) = (server.state("journal"), server.state("copy"));
    assert!(Command::new("cp").arg("-a").arg(&journal).arg(&copy).status().unwrap().success());
    server.start_again();
    let new = some_opens(&server, 2).await;
    server.kill();

    // An older copy.
    std::fs::rename(&journal, server.state("newest")).unwrap();
    std::fs::rename(&copy, &journal).unwrap();
    let words = server.refuses_to_start();
    assert!(words.contains("ends with start 1") && words.contains("knows start 2"), "{words}");
    assert!(words.contains("--accept-journal-loss"), "{words}");
    // Nothing at all.
    std::fs::remove_dir_all(&journal).unwrap();
    let words = server.refuses_to_start();
    assert!(words.contains("is missing") && words.contains("--accept-journal-loss"), "{words}");
    // And the state directory's own witness lost too: the volume knows, where it can.
    std::fs::rename(server.state("generation"), server.state("witness")).unwrap();
    let name = "user.holdfast.generation";
    if rustix::fs::getxattr(server.dir.path().join("data"), name, &mut [0; 64]).is_ok() {
        std::fs::remove_dir_all(&journal).unwrap();
        let words = server.refuses_to_start();
        assert!(words.contains("volume \"data\" knows start 2"), "{words}");
    }
    std::fs::rename(server.state("witness"), server.state("generation")).unwrap();
    // The newest one put back is as good as ever.
    std::fs::remove_dir_all(&journal).unwrap();
    std::fs::rename(server.state("newest"), &journal).unwrap();
    server.start_again();
    let mut client = Client::connect(&server, "writer").await;
    for opened in old.iter().chain(&new) {
        assert_eq!(client.resumed(opened).await.verdict, Verdict::Unchanged);
    }
    drop(client);
    server.kill();
    std::fs::remove_dir_all(&journal).unwrap();
    server.begin(&["--accept-journal-loss"]).ready(&mut server);
    let mut client = Client::connect(&server, "writer").await;
    for opened in old.iter().chain(&new) {
        assert_eq!(client.refused(resume(opened)).await, Status::BadKey);
    }
    drop(client);
    // From then on it is a journal like any other.
    server.restart();
}

#[tokio::test(flavor = "multi_thread")]
async fn two_servers_do_not_share_a_state_directory() {
    let server = Server::start();
    let words = server.refuses_to_start();
    assert!(words.contains("another control process uses this state directory"), "{words}");
}

/// Small file systems are mounted only where that is allowed; elsewhere this says so.
struct SmallDisk(std::path::PathBuf);

impl SmallDisk {
    fn mount(at: &std::path::Path, kib: u64) -> Option<Self> {
        std::fs::create_dir_all(at).unwrap();
        let size = format!("size={kib}k,mode=0700");
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", &size, "tmpfs"]).arg(at).status();
        mounted.is_ok_and(|status| status.success()).then(|| Self(at.to_owned()))
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn crs_12_with_a_full_disk_nothing_is_granted_and_everything_can_be_closed() {
    let dir = tempfile::tempdir().unwrap();
    let disk = tempfile::tempdir().unwrap();
    let Some(_disk) = SmallDisk::mount(disk.path(), 8 * 1024) else {
        println!("skipped: mounting is not allowed here");
        return;
    };
    let limits = format!("[journal]\ndirectory = '{}/journal'", disk.path().display());
    let server = Server::in_directory(dir, &limits);
    let mut client = Client::connect(&server, "writer").await;
    let kept = client.open(held("kept")).await;
    // Somebody else fills the disk.
    let filler = std::fs::File::create(disk.path().join("filler")).unwrap();
    let mut at = 0;
    while filler.write_all_at(&[1; 4096], at).is_ok() {
        at += 4096;
    }
    let end = Instant::now() + Duration::from_secs(60);
    let mut granted = Vec::new();
    loop {
        assert!(Instant::now() < end, "still granted after {}", granted.len());
        match client.ask(Request::Open(held(&format!("f{}", granted.len())))).await {
            Reply::Opened(opened) => granted.push(opened),
            Reply::Refused(refusal) => {
                assert_eq!(refusal.status, Status::NoSpace);
                break;
            }
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(client.refused(crate::common::client::lock(kept.open, 1, 0, 1)).await, Status::NoSpace);
    assert_eq!(server.gauge("journal_full"), 1);
    for opened in &granted {
        client.close(opened.open).await;
    }
    // And when there is room again, all is as before.
    drop(filler);
    std::fs::remove_file(disk.path().join("filler")).unwrap();
    server.await_gauge("journal_full", 0);
    client.open(open("again")).await;
    client.close(kept.open).await;
}

/// Ends a process that is not ready in time, so that its test fails instead of waiting.
fn watch(pid: u32) -> std::sync::Arc<std::sync::atomic::AtomicBool> {
    let ready = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let seen = ready.clone();
    std::thread::spawn(move || {
        std::thread::sleep(Duration::from_secs(20));
        let pid = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw);
        if let (false, Some(pid)) = (seen.load(std::sync::atomic::Ordering::Relaxed), pid) {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
    });
    ready
}

#[tokio::test(flavor = "multi_thread")]
async fn crs_12_a_start_on_a_full_disk_has_every_open_and_lets_it_be_closed() {
    let dir = tempfile::tempdir().unwrap();
    let disk = tempfile::tempdir().unwrap();
    let Some(_disk) = SmallDisk::mount(disk.path(), 8 * 1024) else {
        println!("skipped: mounting is not allowed here");
        return;
    };
    let limits = format!("[journal]\ndirectory = '{}/journal'", disk.path().display());
    let mut server = Server::in_directory(dir, &limits);
    let mut client = Client::connect(&server, "writer").await;
    let mut opens = Vec::new();
    for n in 0..8 {
        opens.push(client.open(held(&format!("kept{n}"))).await);
    }
    let filler = std::fs::File::create(disk.path().join("filler")).unwrap();
    let mut at = 0;
    let mut fill = || {
        while filler.write_all_at(&[1; 4096], at).is_ok() {
            at += 4096;
        }
    };
    fill();
    // What the journal took ahead is used up.
    let end = Instant::now() + Duration::from_secs(60);
    for round in 1.. {
        assert!(Instant::now() < end, "locks are still granted");
        let (open, owner) = (opens[0].open, 1);
        match client.ask(crate::common::client::lock(open, 2 * round, 0, 1)).await {
            Reply::Done => {}
            Reply::Refused(refusal) if refusal.status == Status::NoSpace => break,
            other => panic!("{other:?}"),
        }
        let ranges = vec![LockRange::new(0, 1).unwrap()];
        let unlock = Unlock { open, sequence: 2 * round + 1, owner, ranges };
        assert_eq!(client.ask(Request::Unlock(unlock)).await, Reply::Done);
    }
    server.kill();
    fill();
    let starting = server.begin(&[]);
    let ready = watch(starting.0.id());
    let line = starting.ready(&mut server);
    ready.store(true, std::sync::atomic::Ordering::Relaxed);
    assert_eq!(line["recovered"], opens.len());
    assert_eq!(server.gauge("journal_full"), 1);
    let mut client = Client::connect(&server, "writer").await;
    assert_eq!(client.refused(Request::Open(held("another"))).await, Status::NoSpace);
    assert_eq!(client.refused(resume(&opens[0])).await, Status::NoSpace);
    drop(filler);
    std::fs::remove_file(disk.path().join("filler")).unwrap();
    server.await_gauge("journal_full", 0);
    for opened in &opens {
        let back = client.resumed(opened).await;
        assert_eq!(back.verdict, Verdict::Unchanged);
        client.close(opened.open).await;
    }
}
