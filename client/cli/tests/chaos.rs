//! Rounds of faults under a load that checks everything it sees: nothing acknowledged is lost, no block is torn, no lock is
//! granted twice, no verdict is wrong, and in the end nothing is left.
//!
//! | variable | meaning |
//! |---|---|
//! | `HOLDFAST_CHAOS_SEED` | repeats a run: the same faults in the same order |
//! | `HOLDFAST_CHAOS_ROUNDS` | how many faults |
//! | `HOLDFAST_CHAOS_MINUTES` | go on for so long instead |
//! | `HOLDFAST_CHAOS_TRANSPORT` | `tcp`, `local` or `verbs` alone |
//!
//! `ci/soak` runs the long form.

#![allow(clippy::unwrap_used)] // helpers of tests stand outside of #[test] functions

mod common;

use common::load::{BLOCK, COUNTERS, Dice, Load, Plan, RANGES, Stamp};
use common::{DEADLINE, Deployment, Wish, cut, transports};
use std::collections::{BTreeMap, HashSet};
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

/// Rounds for one transport where nobody says otherwise.
const ROUNDS: u64 = 60;
/// Requests that must be completed after a fault before the next.
const GO_ON: u64 = 60;

/// Not a test: the load, in a process of its own.
#[test]
#[ignore = "it is the load that the other tests start"]
fn load_process() {
    common::load::run_if_asked();
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Fault {
    KillControl,
    KillDataplane,
    KillBoth,
    KillClient,
    KillClientAndControl,
    CutControl,
    CutData,
    CutAll,
    WriteBeside,
}

const FAULTS: [Fault; 9] = [
    Fault::KillControl,
    Fault::KillDataplane,
    Fault::KillBoth,
    Fault::KillClient,
    Fault::KillClientAndControl,
    Fault::CutControl,
    Fault::CutData,
    Fault::CutAll,
    Fault::WriteBeside,
];

/// What the rounds saw.
#[derive(Default)]
struct Tally {
    faults: BTreeMap<Fault, u64>,
    /// Longest gap between two completions of a load, by fault, ms.
    gaps: BTreeMap<Fault, u64>,
    /// Gap of undisturbed loads, ms.
    calm: u64,
}

struct Run {
    server: Deployment,
    loads: Vec<Load>,
    dice: Dice,
    tally: Tally,
    transport: &'static str,
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().and_then(|text| text.parse().ok())
}

#[test]
fn crs_13_rounds_of_kills_and_cuts_lose_nothing() {
    let random = || std::time::UNIX_EPOCH.elapsed().unwrap().subsec_nanos().into();
    let seed = number("HOLDFAST_CHAOS_SEED").unwrap_or_else(random);
    let only = std::env::var("HOLDFAST_CHAOS_TRANSPORT").ok();
    for transport in transports() {
        if only.as_deref().is_none_or(|only| only == transport) {
            println!("chaos over {transport}: HOLDFAST_CHAOS_SEED={seed}");
            run(transport, seed);
        }
    }
}

fn run(transport: &'static str, seed: u64) {
    // The fast ways are switched on: what they must not do is lose or tear anything.
    let settings: &[(&str, &str)] = match transport {
        "local" => &[("file_io", "\"direct\"")],
        _ => &[],
    };
    let dataplane = if transport == "verbs" { "\n[map]\nenabled = true\n" } else { "" };
    let server = Deployment::with(&Wish { settings, dataplane, ..Wish::default() });
    server.until("the data plane is linked", |g| g["control.link_up"] == 1);
    let baseline = gauges_that_return(&server);
    let loads =
        (1..=2).map(|n| Load::start(Plan::new(&server, transport, n, seed.wrapping_add(n)))).collect();
    let mut run = Run { server, loads, dice: Dice::new(seed), tally: Tally::default(), transport };
    run.all_go_on();
    run.look(None);

    let minutes = number("HOLDFAST_CHAOS_MINUTES").map(|m| Duration::from_secs(60 * m));
    let rounds = number("HOLDFAST_CHAOS_ROUNDS").unwrap_or(ROUNDS);
    let start = Instant::now();
    let mut round = 0;
    while minutes.map_or(round < rounds, |minutes| start.elapsed() < minutes) {
        let fault = FAULTS[usize::try_from(run.dice.below(FAULTS.len() as u64)).unwrap()];
        run.round(round, fault);
        round += 1;
    }
    run.end(round, start.elapsed(), &baseline);
}

impl Run {
    fn round(&mut self, round: u64, fault: Fault) {
        // Each fault at another moment of what the loads are doing.
        std::thread::sleep(Duration::from_millis(self.dice.below(150)));
        self.look(None);
        println!("round {round}: {fault:?}");
        let victim = usize::try_from(self.dice.below(self.loads.len() as u64)).unwrap();
        *self.tally.faults.entry(fault).or_default() += 1;
        let (control, data) = (self.server.port(), self.server.port() + 1);
        let pid = self.loads[victim].pid();
        match fault {
            Fault::KillControl => self.server.kill_control(),
            Fault::KillDataplane => self.server.kill_dataplane(),
            Fault::KillBoth => self.server.kill_both(),
            Fault::KillClient | Fault::KillClientAndControl => {
                self.loads[victim].kill();
                if fault == Fault::KillClientAndControl {
                    self.server.kill_control();
                }
                std::thread::sleep(Duration::from_millis(self.dice.below(200)));
                self.loads[victim].go_on();
            }
            Fault::CutControl => drop(cut(pid, control)),
            Fault::CutData => drop(cut(pid, data)),
            Fault::CutAll => drop((cut(pid, control), cut(pid, data))),
            Fault::WriteBeside => self.write_beside(victim),
        }
        self.server.await_planes();
        self.all_go_on();
        self.look(Some(fault));
        let may_change = fault == Fault::WriteBeside;
        self.check_verdicts(may_change, victim);
    }

    /// The client is stopped and its connections cut; when the server has given up on both, somebody writes to the file
    /// beside the server. Then the client must be told. Over verbs its queue pair lives on, whoever is stopped, and with it the
    /// open's bindings, until their linger time is over.
    fn write_beside(&mut self, victim: usize) {
        let load = &self.loads[victim];
        let file = load.plan.file();
        let detached = |server: &Deployment| {
            let opens: serde_json::Value = serde_json::from_str(&server.ok(&["opens", "--json"])).unwrap();
            let opens = opens.as_array().unwrap();
            let one = opens.iter().find(|o| o["path"].as_str().is_some_and(|p| p.trim_matches('/') == file));
            one.is_some_and(|o| o["state"] == "detached" && o["bindings"] == 0)
        };
        load.freeze();
        cut(load.pid(), self.server.port());
        cut(load.pid(), self.server.port() + 1);
        let start = Instant::now();
        while !detached(&self.server) {
            assert!(start.elapsed() < DEADLINE, "never detached: {}", self.server.ok(&["opens"]));
            std::thread::sleep(Duration::from_millis(20));
        }
        // Its baseline is taken after that; and a file system's clock has ticks.
        std::thread::sleep(Duration::from_millis(200));
        let beside = std::fs::File::options().write(true).open(self.server.volume().join(&file)).unwrap();
        let behind = load.ledger().acked.len() * BLOCK;
        beside.write_all_at(b"somebody else was here", behind as u64).unwrap();
        load.thaw();
        let told = |ledger: &common::load::Ledger| {
            ledger.fresh.iter().any(|(open, verdict, _)| *open == file && verdict == "Changed")
        };
        self.loads[victim].wait("the client is told that its file was changed", told);
    }

    /// Nobody else writes to a load's file: `Changed` would be a lie there, unless we did.
    fn check_verdicts(&mut self, may_change: bool, victim: usize) {
        for (n, load) in self.loads.iter().enumerate() {
            let fresh = std::mem::take(&mut load.ledger().fresh);
            for (open, verdict, locks_kept) in fresh {
                assert!(
                    locks_kept,
                    "load {n}: {open} was resumed ({verdict}) in time, and its locks are gone"
                );
                let expected = open == COUNTERS
                    || verdict == "Unchanged"
                    || (may_change && n == victim && verdict == "Changed");
                assert!(expected, "load {n}: {open} is said to be {verdict}, and that is wrong");
            }
        }
    }

    fn all_go_on(&mut self) {
        for load in &mut self.loads {
            load.goes_on(GO_ON);
        }
    }

    /// Ends a phase of every load.
    fn look(&mut self, fault: Option<Fault>) {
        for load in &self.loads {
            let phase = load.ledger().phase();
            let gap = phase.gap.max(phase.latency) / 1_000_000;
            let longest = match fault {
                Some(fault) => self.tally.gaps.entry(fault).or_default(),
                None => &mut self.tally.calm,
            };
            *longest = gap.max(*longest);
        }
    }

    fn end(mut self, rounds: u64, took: Duration, baseline: &BTreeMap<String, u64>) {
        for load in &mut self.loads {
            load.stop();
            load.check_file(&self.server);
        }
        self.check_verdicts(true, usize::MAX);
        self.check_counters();
        self.server.until(&format!("back to the baseline {baseline:#?}"), |gauges| {
            baseline.iter().all(|(name, value)| gauges.get(name) == Some(value))
        });
        // What the journal still knew of would come back now.
        self.server.kill_both();
        self.server.await_planes();
        let gauges = self.server.gauges();
        assert_eq!((gauges["control.recovered_opens"], gauges["control.recovered_lost"]), (0, 0));
        self.report(rounds, took);
        assert!(self.server.stop().success(), "{}", self.server.log());
    }

    /// No value was reached twice, and what was reached last is there.
    fn check_counters(&self) {
        let bytes = std::fs::read(self.server.volume().join(COUNTERS)).unwrap();
        for range in 0..RANGES {
            let at = usize::try_from(range).unwrap() * BLOCK;
            let last =
                bytes.get(at..at + BLOCK).map_or(0, |b| Stamp::of(b).unwrap().map_or(0, |s| s.sequence));
            let mut seen = HashSet::new();
            for load in &self.loads {
                for value in load.ledger().counters.get(&range).into_iter().flatten() {
                    assert!(seen.insert(*value), "counter {range} was raised to {value} twice");
                }
            }
            let highest = seen.iter().max().copied().unwrap_or(0);
            assert!(highest <= last, "counter {range} is {last}, but {highest} was reached");
        }
    }

    /// For people, and for `ci/soak`.
    fn report(&self, rounds: u64, took: Duration) {
        let sum =
            |of: fn(&common::load::Ledger) -> u64| self.loads.iter().map(|l| of(&l.ledger())).sum::<u64>();
        println!("---- chaos over {}: {rounds} rounds in {:.1} s", self.transport, took.as_secs_f64());
        println!(
            "requests    {} writes, {} reads, {} flushes, {} counters raised under locks",
            sum(|l| l.writes),
            sum(|l| l.reads),
            sum(|l| l.flushes),
            sum(|l| l.raised)
        );
        println!("calm        longest gap {} ms", self.tally.calm);
        for (fault, times) in &self.tally.faults {
            println!(
                "{:<22} {times:>4} times, longest gap {} ms",
                format!("{fault:?}"),
                self.tally.gaps[fault]
            );
        }
        for load in &self.loads {
            let ledger = load.ledger();
            println!("load {}      verdicts {:?}, notes {:?}", load.plan.load, ledger.verdicts, ledger.notes);
        }
        println!("gauges      at the baseline");
    }
}

/// What must be as before when nobody is connected.
fn gauges_that_return(server: &Deployment) -> BTreeMap<String, u64> {
    const NAMES: [&str; 14] = [
        "control.sessions",
        "control.opens",
        "control.open_files",
        "control.bindings",
        "dataplane.channels",
        "dataplane.bindings",
        "dataplane.requests_in_flight",
        "dataplane.buffers_free",
        "dataplane.message_buffers_free",
        "dataplane.mrs",
        "dataplane.pinned_bytes",
        "dataplane.qps",
        "dataplane.cqs",
        "dataplane.open_fds",
    ];
    let gauges = server.gauges();
    NAMES.iter().map(|name| ((*name).to_owned(), gauges[*name])).collect()
}
