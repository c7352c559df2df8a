//! The journal on a real file system, under kill -9, on full and on failing disks.

use super::*;
use holdfast_shared::journal::DiskError;
use holdfast_shared::journal::sim::{Fault, MemoryDisk};
use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

const CLUSTER: ClusterId = ClusterId([3; 16]);
/// How long anything is waited for.
pub(super) const PATIENCE: Duration = Duration::from_secs(20);
const CHILD: &str = "HOLDFAST_JOURNAL_CHILD";

fn payload(sequence: u64) -> Vec<u8> {
    let length = 8 + usize::try_from(sequence * 37 % 500).unwrap();
    sequence.to_le_bytes().into_iter().cycle().take(length).collect()
}

/// Reads a journal back: every record says what it should.
fn read(directory: &Path, settings: &Settings) -> Recovery<FileDisk> {
    recover(directory, CLUSTER, settings, &mut |record| {
        if record.payload == payload(record.sequence) { Ok(()) } else { Err("another payload".into()) }
    })
    .unwrap()
}

fn begin(directory: &Path, settings: &Settings) -> (u64, Journal, UnboundedReceiver<JournalEvent>) {
    let recovery = read(directory, settings);
    let (last, generation) = (recovery.summary().last_sequence, recovery.summary().generation);
    let (sender, receiver) = unbounded_channel();
    (last, start(recovery, generation + 1, settings, sender).unwrap(), receiver)
}

fn on_memory(disk: &MemoryDisk) -> (Journal, UnboundedReceiver<JournalEvent>) {
    let recovery = holdfast_shared::journal::recover(disk.clone(), CLUSTER, &mut |_| Ok(())).unwrap();
    let (sender, receiver) = unbounded_channel();
    (start(recovery, 1, &Settings::default(), sender).unwrap(), receiver)
}

/// What the journal tells next, waited for.
pub(crate) fn next(events: &mut UnboundedReceiver<JournalEvent>) -> JournalEvent {
    let until = Instant::now() + PATIENCE;
    loop {
        match events.try_recv() {
            Ok(event) => return event,
            Err(_) if Instant::now() < until => std::thread::sleep(Duration::from_micros(100)),
            Err(error) => panic!("no event comes: {error}"),
        }
    }
}

fn wait_for(
    events: &mut UnboundedReceiver<JournalEvent>,
    wanted: impl Fn(&JournalEvent) -> bool,
) -> JournalEvent {
    loop {
        let event = next(events);
        if wanted(&event) {
            return event;
        }
    }
}

#[test]
fn what_was_queued_at_a_stop_is_there_at_the_next_start() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("journal");
    for sync in [true, false] {
        let settings = Settings { sync, ..Settings::default() };
        let (last, journal, mut events) = begin(&path, &settings);
        for sequence in last + 1..=last + 500 {
            journal.append(sequence, payload(sequence), Kind::Ordinary).unwrap();
        }
        journal.stop();
        assert_eq!(read(&path, &settings).summary().last_sequence, last + 500);
        assert_eq!(
            wait_for(&mut events, |e| *e == JournalEvent::Persisted(last + 500)),
            JournalEvent::Persisted(last + 500)
        );
    }
}

/// A disk whose syncs wait until they are let through.
struct Gated {
    disk: MemoryDisk,
    gate: Arc<(Mutex<u32>, Condvar)>,
}

impl Disk for Gated {
    type File = u64;
    fn list(&self) -> Result<Vec<String>, DiskError> {
        self.disk.list()
    }
    fn create(&self, name: &str) -> Result<u64, DiskError> {
        self.disk.create(name)
    }
    fn open(&self, name: &str) -> Result<u64, DiskError> {
        self.disk.open(name)
    }
    fn length(&self, file: &u64) -> Result<u64, DiskError> {
        self.disk.length(file)
    }
    fn read_at(&self, file: &u64, offset: u64, into: &mut [u8]) -> Result<usize, DiskError> {
        self.disk.read_at(file, offset, into)
    }
    fn write_at(&self, file: &u64, offset: u64, bytes: &[u8]) -> Result<(), DiskError> {
        self.disk.write_at(file, offset, bytes)
    }
    fn allocate(&self, file: &u64, offset: u64, length: u64) -> Result<(), DiskError> {
        self.disk.allocate(file, offset, length)
    }
    fn truncate(&self, file: &u64, length: u64) -> Result<(), DiskError> {
        self.disk.truncate(file, length)
    }
    fn sync_data(&self, file: &u64) -> Result<(), DiskError> {
        let mut open = self.gate.0.lock().unwrap();
        while *open == 0 {
            open = self.gate.1.wait(open).unwrap();
        }
        *open -= 1;
        drop(open);
        self.disk.sync_data(file)
    }
    fn sync_directory(&self) -> Result<(), DiskError> {
        self.disk.sync_directory()
    }
    fn remove(&self, name: &str) -> Result<(), DiskError> {
        self.disk.remove(name)
    }
}

#[test]
fn one_sync_serves_all_that_came_while_the_last_was_under_way_and_the_queue_has_an_end() {
    let disk = MemoryDisk::new(1);
    let gate = Arc::new((Mutex::new(1), Condvar::new()));
    let gated = Gated { disk: disk.clone(), gate: gate.clone() };
    let recovery = holdfast_shared::journal::recover(gated, CLUSTER, &mut |_| Ok(())).unwrap();
    let (sender, mut events) = unbounded_channel();
    let journal = start(recovery, 1, &Settings::default(), sender).unwrap();
    let before = disk.syncs();
    let through = |syncs| {
        *gate.0.lock().unwrap() = syncs;
        gate.1.notify_all();
    };
    journal.append(1, payload(1), Kind::Ordinary).unwrap();
    // The thread has written the first and waits for its sync; what comes now waits for the next.
    while disk.bytes("journal-0000000000000001.log").unwrap()[64] == 0 {
        std::thread::sleep(Duration::from_millis(1));
    }
    let mut next = 2;
    let end = loop {
        match journal.append(next, vec![1; 1000], Kind::Ordinary) {
            Ok(()) => next += 1,
            Err(error) => break error,
        }
    };
    assert_eq!(end, AppendError::Busy);
    assert!((900..1100).contains(&next), "{next}");
    journal.append(next, vec![1; 1000], Kind::Releasing).unwrap();
    assert!(events.try_recv().is_err(), "nothing is durable yet");
    through(1);
    wait_for(&mut events, |e| *e == JournalEvent::Persisted(1));
    assert!(events.try_recv().is_err());
    through(1);
    wait_for(&mut events, |e| *e == JournalEvent::Persisted(next));
    assert_eq!(disk.syncs(), before + 2);
    through(9);
    journal.append(next + 1, vec![1; 1000], Kind::Ordinary).unwrap();
    wait_for(&mut events, |e| *e == JournalEvent::Persisted(next + 1));
}

#[test]
fn a_failed_disk_is_told_once_and_takes_nothing_more() {
    let disk = MemoryDisk::new(1);
    let (journal, mut events) = on_memory(&disk);
    journal.append(1, payload(1), Kind::Ordinary).unwrap();
    wait_for(&mut events, |e| *e == JournalEvent::Persisted(1));
    disk.fault_at(disk.operations() + 2, Fault::Failed);
    journal.append(2, payload(2), Kind::Ordinary).unwrap();
    let failed = wait_for(&mut events, |e| matches!(e, JournalEvent::Failed(_)));
    assert!(matches!(failed, JournalEvent::Failed(words) if words.contains("input/output error")));
    assert_eq!(journal.append(3, payload(3), Kind::Releasing), Err(AppendError::Failed));
    journal.stop();
    assert!(events.try_recv().is_err());
}

#[test]
fn a_checkpoint_begins_when_asked_for_or_due_and_older_files_go_at_its_end() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("journal");
    let settings = Settings { checkpoint_mib: 1, ..Settings::default() };
    let (mut last, journal, mut events) = begin(&path, &settings);
    for due in [false, true] {
        if due {
            for sequence in last + 1..last + 4000 {
                while journal.append(sequence, payload(sequence), Kind::Ordinary) == Err(AppendError::Busy) {
                    std::thread::sleep(Duration::from_millis(1));
                }
            }
            last += 3999;
        } else {
            journal.begin_checkpoint();
        }
        wait_for(&mut events, |e| *e == JournalEvent::CheckpointBegun);
        assert_eq!(std::fs::read_dir(&path).unwrap().count(), 2);
        last += 1;
        journal.append(last, payload(last), Kind::Ordinary).unwrap();
        journal.end_checkpoint();
        wait_for(&mut events, |e| *e == JournalEvent::CheckpointDone);
        assert_eq!(std::fs::read_dir(&path).unwrap().count(), 1);
    }
    // An end without a beginning is a mistake of ours, and harms nothing.
    journal.end_checkpoint();
    journal.append(last + 1, payload(last + 1), Kind::Ordinary).unwrap();
    wait_for(&mut events, |e| *e == JournalEvent::Persisted(last + 1));
    journal.stop();
    assert_eq!(read(&path, &settings).summary().last_sequence, last + 1);
}

/// Fills the disk to the point where ordinary records are refused, releases, makes space, and goes on.
fn full_and_back(
    journal: &Journal,
    events: &mut UnboundedReceiver<JournalEvent>,
    make_space: impl FnOnce(),
) -> u64 {
    let mut next = 1;
    let mut append = |kind| {
        let until = Instant::now() + Duration::from_secs(20);
        loop {
            match journal.append(next, payload(next), kind) {
                Err(AppendError::Busy) if Instant::now() < until => {
                    std::thread::sleep(Duration::from_millis(1))
                }
                Ok(()) => {
                    next += 1;
                    return Ok(next - 1);
                }
                Err(error) => return Err(error),
            }
        }
    };
    while append(Kind::Ordinary).is_ok() {}
    assert_eq!(append(Kind::Ordinary), Err(AppendError::Full));
    wait_for(events, |e| *e == JournalEvent::Room(false));
    // Everything that was taken becomes durable, and 200 KiB of releases after it.
    let mut last = 0;
    for _ in 0..600 {
        last = append(Kind::Releasing).unwrap();
    }
    wait_for(events, |e| *e == JournalEvent::Persisted(last));
    assert_eq!(append(Kind::Ordinary), Err(AppendError::Full));
    make_space();
    wait_for(events, |e| *e == JournalEvent::Room(true));
    last = append(Kind::Ordinary).unwrap();
    wait_for(events, |e| *e == JournalEvent::Persisted(last));
    last
}

#[test]
fn crs_12_full_in_memory_refuses_ordinary_records_takes_releases_and_recovers() {
    let disk = MemoryDisk::new(1);
    let (journal, mut events) = on_memory(&disk);
    disk.set_capacity(disk.used() + 100_000);
    let last = full_and_back(&journal, &mut events, || disk.set_capacity(u64::MAX));
    journal.stop();
    disk.power_on();
    let recovery = holdfast_shared::journal::recover(disk, CLUSTER, &mut |_| Ok(())).unwrap();
    assert_eq!(recovery.summary().last_sequence, last);
}

/// Records that found the reserve used up wait, and are written once there is space.
#[test]
fn crs_12_a_releasing_record_beyond_the_reserve_waits_and_is_not_lost() {
    let disk = MemoryDisk::new(1);
    let (journal, mut events) = on_memory(&disk);
    disk.set_capacity(disk.used());
    let mut next = 1;
    let mut refusals = 0;
    let until = Instant::now() + Duration::from_secs(20);
    // At last the thread waits for space, and the queue behind it is full too.
    while refusals < 50 && Instant::now() < until {
        match journal.append(next, vec![7; 20_000], Kind::Releasing) {
            Ok(()) => (next, refusals) = (next + 1, 0),
            Err(error) => {
                assert_eq!(error, AppendError::Busy);
                refusals += 1;
                std::thread::sleep(Duration::from_millis(2));
            }
        }
    }
    assert_eq!(refusals, 50);
    disk.set_capacity(u64::MAX);
    wait_for(&mut events, |e| *e == JournalEvent::Persisted(next - 1));
    journal.stop();
}

/// A tmpfs of its own; unmounted when dropped.
struct Mounted(tempfile::TempDir);

impl Mounted {
    fn new(options: &str) -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let mut mount = Command::new("mount");
        let mount = mount.args(["-t", "tmpfs", "-o", options, "tmpfs"]).arg(dir.path()).stderr(Stdio::null());
        mount.status().is_ok_and(|status| status.success()).then_some(Self(dir))
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.0.path()).status();
    }
}

#[test]
fn crs_12_full_on_a_real_file_system() {
    let Some(mounted) = Mounted::new("size=8m") else {
        eprintln!("\n*** SKIPPED: this user may not mount a tmpfs; the same runs on a disk in memory ***\n");
        return;
    };
    let path = mounted.0.path().join("journal");
    let (_, journal, mut events) = begin(&path, &Settings::default());
    // Somebody else takes what is left.
    let filler = mounted.0.path().join("filler");
    let mut file = std::fs::File::create(&filler).unwrap();
    while file.write_all(&[1; 4096]).is_ok() {}
    let last = full_and_back(&journal, &mut events, || {
        drop(file);
        std::fs::remove_file(&filler).unwrap();
    });
    journal.stop();
    assert_eq!(read(&path, &Settings::default()).summary().last_sequence, last);
}

/// Not a test by itself: the process that `crs_06_kill_9` kills. It prints the number of every record that it was told
/// is persisted.
#[test]
#[ignore = "run by crs_06_kill_9_loses_nothing_that_was_reported"]
fn child_appends_until_killed() {
    let Some(directory) = std::env::var_os(CHILD) else { return };
    let settings = Settings { checkpoint_mib: 0, ..Settings::default() };
    let (last, journal, mut events) = begin(Path::new(&directory), &settings);
    let mut next = last + 1;
    let mut fed = None;
    loop {
        match journal.append(next, payload(next), Kind::Ordinary) {
            Ok(()) => next += 1,
            Err(AppendError::Busy) => std::thread::sleep(Duration::from_millis(1)),
            Err(error) => panic!("{error}"),
        }
        while let Ok(event) = events.try_recv() {
            match event {
                JournalEvent::Persisted(through) => {
                    let mut out = std::io::stdout().lock();
                    writeln!(out, "persisted {through}").and_then(|()| out.flush()).unwrap();
                }
                JournalEvent::CheckpointBegun => fed = Some(next + 200),
                _ => {}
            }
        }
        if fed.is_some_and(|end| next >= end) {
            journal.end_checkpoint();
            fed = None;
        }
    }
}

#[test]
fn crs_06_kill_9_loses_nothing_that_was_reported() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("journal");
    let settings = Settings::default();
    let mut total = 0;
    for round in 0..20_u64 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--ignored", "--exact", "journal::tests::child_appends_until_killed", "--nocapture"])
            .env(CHILD, &path)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap());
        let mut reported = 0;
        let mut line = String::new();
        let mut left = 3 + round * 7;
        loop {
            line.clear();
            if lines.read_line(&mut line).unwrap() == 0 {
                break;
            }
            // A last line without its end was cut by the kill.
            let number = line.strip_suffix('\n').and_then(|line| line.split("persisted ").nth(1));
            if let Some(number) = number {
                reported = number.parse().unwrap();
                left = left.saturating_sub(1);
                if left == 0 {
                    child.kill().unwrap();
                }
            }
        }
        child.wait().unwrap();
        let last = read(&path, &settings).summary().last_sequence;
        assert!(last >= reported, "round {round}: {reported} was reported, {last} is there");
        assert!(reported > total, "round {round} got on");
        total = reported;
    }
}
