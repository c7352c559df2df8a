//! A verifying load: a process of its own that writes, reads and locks, checks all it sees, and tells all it did.
//!
//! ```text
//!   test ──plan (environment)──► load process ── client library ──► server
//!    ▲                               │ writers: blocks of their own, stamped and numbered
//!    └──── ledger (pipe) ◄───────────┘ readers: any block; never older than what was acknowledged before
//!                                      lockers: a counter under an exclusive lock, raised in three steps
//! ```
//!
//! The ledger is what counts: it stays with the test when the load is killed, and the next load goes on from it.

mod block;
mod child;
mod ledger;

pub use block::{BLOCK, Dice, Stamp};
pub use child::{now, run_if_asked};
pub use ledger::{Ledger, Phase};

use super::{DEADLINE, Deployment, finish, signal};
use rustix::event::{PollFd, PollFlags, poll};
use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// Where a load finds its plan.
const PLAN: &str = "HOLDFAST_LOAD";
/// The file whose blocks are counters, shared by all loads.
pub const COUNTERS: &str = "counters";
/// Ranges in it.
pub const RANGES: u64 = 4;

/// What a load does.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
pub struct Plan {
    pub config: std::path::PathBuf,
    pub transport: String,
    /// Its number: writers of other loads have other ones.
    pub load: u64,
    pub writers: u64,
    pub readers: u64,
    pub lockers: u64,
    /// Blocks of each writer.
    pub blocks: u64,
    pub seed: u64,
    /// Rest between two requests of one task.
    pub rest_us: u64,
    pub hold_ms: u64,
    /// From the ledger: where an earlier process of this load was.
    pub acked: Vec<u64>,
    pub issued: Vec<u64>,
    pub keys: BTreeMap<String, String>,
}

impl Plan {
    /// A load of a few tasks of each kind.
    pub fn new(server: &Deployment, transport: &str, load: u64, seed: u64) -> Self {
        Self {
            config: server.config(),
            transport: transport.into(),
            load,
            writers: 3,
            readers: 2,
            lockers: 2,
            blocks: 64,
            seed,
            rest_us: 300,
            hold_ms: 120_000,
            acked: Vec::new(),
            issued: Vec::new(),
            keys: BTreeMap::new(),
        }
    }

    /// The data file's name.
    pub fn file(&self) -> String {
        format!("load-{}", self.load)
    }

    fn all_blocks(&self) -> usize {
        usize::try_from(self.writers * self.blocks).unwrap()
    }

    /// The writer of a block.
    pub fn writer_of(&self, block: u64) -> u64 {
        self.load * 1000 + block / self.blocks
    }
}

/// A load process, and what it has told so far.
pub struct Load {
    pub plan: Plan,
    child: Option<Child>,
    stdin: Option<ChildStdin>,
    told: Told,
    /// A second descriptor of the pipe, to see whether it is empty.
    pipe: Option<OwnedFd>,
    reader: Option<std::thread::JoinHandle<()>>,
}

type Told = Arc<(Mutex<Ledger>, Condvar)>;

/// Takes in what a load tells, until it ends. The ledger is locked from before something leaves the pipe until it is written
/// down: who has the lock and finds the pipe empty knows all that was told.
fn take_in(mut pipe: ChildStdout, told: &Told) {
    let mut bytes = Vec::new();
    loop {
        let mut ready = [PollFd::new(&pipe, PollFlags::IN)];
        match poll(&mut ready, None) {
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => continue,
            Err(error) => panic!("cannot wait for a load's words: {error}"),
        }
        let mut ledger = told.0.lock().unwrap();
        let mut chunk = [0; 16 << 10];
        let read = pipe.read(&mut chunk).unwrap();
        if read == 0 {
            return;
        }
        bytes.extend_from_slice(&chunk[..read]);
        while let Some(end) = bytes.iter().position(|&byte| byte == b'\n') {
            let line: Vec<u8> = bytes.drain(..=end).collect();
            ledger.line(&String::from_utf8_lossy(&line[..end]));
        }
        drop(ledger);
        told.1.notify_all();
    }
}

impl Load {
    /// Starts a load, and waits until its opens are there.
    pub fn start(plan: Plan) -> Self {
        let ledger = Ledger::new(plan.all_blocks());
        let told = Arc::new((Mutex::new(ledger), Condvar::new()));
        let mut load = Self { plan, child: None, stdin: None, told, pipe: None, reader: None };
        load.spawn();
        load.wait("the load is ready", |ledger| ledger.ready);
        load
    }

    fn spawn(&mut self) {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["load_process", "--exact", "--ignored", "--nocapture"])
            .env(PLAN, serde_json::to_string(&self.plan).unwrap())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        self.stdin = child.stdin.take();
        let pipe = child.stdout.take().unwrap();
        self.pipe = Some(rustix::io::dup(&pipe).unwrap());
        let told = Arc::clone(&self.told);
        self.reader = Some(std::thread::spawn(move || take_in(pipe, &told)));
        self.child = Some(child);
    }

    /// What it has told.
    pub fn ledger(&self) -> MutexGuard<'_, Ledger> {
        self.told.0.lock().unwrap()
    }

    /// The newest resume key of one of its opens.
    pub fn key(&self, open: &str) -> Vec<u8> {
        child::unhex(&self.ledger().keys[open])
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.as_ref().expect("running").id()
    }

    /// Waits until `condition` holds of the ledger; a fault in it ends the wait at once.
    pub fn wait(&mut self, what: &str, condition: impl Fn(&Ledger) -> bool) {
        let start = Instant::now();
        let mut ledger = self.told.0.lock().unwrap();
        while !condition(&ledger) {
            let faults = std::mem::take(&mut ledger.faults);
            assert!(faults.is_empty(), "load {}, while waiting until {what}: {faults:#?}", self.plan.load);
            let ended = self.child.as_mut().is_some_and(|child| child.try_wait().unwrap().is_some());
            assert!(!ended || condition(&ledger), "load {} ended before: {what}\n{ledger:?}", self.plan.load);
            assert!(start.elapsed() < DEADLINE, "load {}, never: {what}\n{ledger:?}", self.plan.load);
            ledger = self.told.1.wait_timeout(ledger, Duration::from_millis(100)).unwrap().0;
        }
    }

    /// Waits until so many more requests are completed, and a write that was begun after this call: what is written through is
    /// bound again.
    pub fn goes_on(&mut self, more: u64) {
        let (before, start) = ({ self.ledger().phase.completions }, now());
        let writes = self.plan.writers > 0;
        self.wait("it goes on", |ledger| {
            ledger.phase.completions >= before + more && (!writes || ledger.write_begun > start)
        });
    }

    /// Kills the process, and takes in what it had told.
    pub fn kill(&mut self) {
        let child = self.child.take().expect("running");
        signal(child.id(), rustix::process::Signal::KILL);
        self.stdin = None;
        finish(child);
        self.reader.take().unwrap().join().unwrap();
    }

    /// Starts the next process of a load that was killed: it resumes the opens, and goes on.
    pub fn go_on(&mut self) {
        {
            let mut ledger = self.told.0.lock().unwrap();
            self.plan.acked.clone_from(&ledger.acked);
            self.plan.issued.clone_from(&ledger.issued);
            self.plan.keys.clone_from(&ledger.keys);
            ledger.ready = false;
        }
        self.plan.seed = self.plan.seed.wrapping_add(1);
        self.spawn();
        self.wait("the load is ready again", |ledger| ledger.ready);
    }

    /// Asks it to end: it reads everything back, flushes, and closes.
    pub fn stop(&mut self) {
        drop(self.stdin.take().map(|mut pipe| pipe.write_all(b"stop\n")));
        self.wait("everything was checked and closed", |ledger| ledger.done);
        let status = finish(self.child.take().expect("running")).status;
        self.reader.take().unwrap().join().unwrap();
        let ledger = self.ledger();
        assert!(ledger.faults.is_empty(), "load {}: {:#?}", self.plan.load, ledger.faults);
        assert!(status.success(), "load {}: {status}", self.plan.load);
    }

    /// Stops the process where it is, and takes in all that it has told; [`Load::thaw`] lets it go on.
    pub fn freeze(&self) {
        super::freeze(self.pid());
        let start = Instant::now();
        while !self.has_told_all() {
            assert!(start.elapsed() < DEADLINE, "a stopped load goes on telling");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    pub fn thaw(&self) {
        signal(self.pid(), rustix::process::Signal::CONT);
    }

    /// True if nothing that was told is still on its way here.
    fn has_told_all(&self) -> bool {
        let _ledger = self.ledger();
        let pipe = self.pipe.as_ref().expect("running");
        rustix::io::ioctl_fionread(pipe).unwrap() == 0
    }

    /// Checks the file beside the server: every block is whole, and as new as the ledger says.
    pub fn check_file(&self, server: &Deployment) {
        let bytes = std::fs::read(server.volume().join(self.plan.file())).unwrap();
        let ledger = self.ledger();
        for (n, (&acked, &issued)) in ledger.acked.iter().zip(&ledger.issued).enumerate() {
            let here = bytes.get(n * BLOCK..(n + 1) * BLOCK).unwrap_or_default();
            let stamp = Stamp::of(here).unwrap_or_else(|e| panic!("block {n}: {e}"));
            check_stamp(&self.plan, stamp, n as u64, acked, issued)
                .unwrap_or_else(|e| panic!("on disk: {e}"));
        }
    }
}

/// Checks what was found in a block of the data file: of its writer, and no older than `least`, no newer than `most`.
fn check_stamp(plan: &Plan, found: Option<Stamp>, block: u64, least: u64, most: u64) -> Result<(), String> {
    match found {
        None if least == 0 => Ok(()),
        None => Err(format!("block {block} is empty; {least} was acknowledged: a lost write")),
        Some(stamp) if (stamp.block, stamp.writer) != (block, plan.writer_of(block)) => {
            Err(format!("block {block} holds {stamp:?}, of somewhere else"))
        }
        Some(stamp) if stamp.sequence < least => {
            Err(format!("block {block} holds {stamp:?}, but {least} was acknowledged: a lost write"))
        }
        Some(stamp) if stamp.sequence > most => {
            Err(format!("block {block} holds {stamp:?}, but only {most} was issued"))
        }
        Some(_) => Ok(()),
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        if let Some(child) = self.child.take() {
            signal(child.id(), rustix::process::Signal::CONT);
            signal(child.id(), rustix::process::Signal::KILL);
            self.stdin = None;
            finish(child);
        }
    }
}
