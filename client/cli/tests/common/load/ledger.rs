//! What a load has told: kept by the test, so that it outlives a load that is killed.
//!
//! | line | says |
//! |---|---|
//! | `i BLOCK COUNT SEQUENCE` | a write is about to be made |
//! | `w BLOCK COUNT SEQUENCE START END` | it was acknowledged (times: since 1970, ns) |
//! | `r START END`, `f START END` | a read was verified; a flush was acknowledged |
//! | `m` | what was read was being written, and mixed: it is read again until it is whole |
//! | `l RANGE VALUE START END` | a counter was raised to this value under its lock, and read back |
//! | `v OPEN VERDICT LOCKS_KEPT` | what the client library was told of an open |
//! | `k OPEN KEY` | the open's resume key |
//! | `a OPEN` | a change was accepted |
//! | `n …` | something of note that is no fault |
//! | `e …` | a fault: what was promised was not kept |
//! | `ready`, `done` | all opens are there; everything was checked and closed |

use std::collections::{BTreeMap, HashSet};

/// Completions since the last look.
#[derive(Clone, Copy, Default, Debug)]
pub struct Phase {
    pub completions: u64,
    /// The longest time in which nothing was completed, ns.
    pub gap: u64,
    /// The longest time one request took, ns.
    pub latency: u64,
    last: u64,
}

/// What is known of one load, over all the processes that were it.
#[derive(Default, Debug)]
pub struct Ledger {
    /// Per block, the last sequence acknowledged, and the last one issued.
    pub acked: Vec<u64>,
    pub issued: Vec<u64>,
    pub writes: u64,
    /// When the latest of the acknowledged writes was begun, ns.
    pub write_begun: u64,
    pub reads: u64,
    pub flushes: u64,
    pub raised: u64,
    pub mixed: u64,
    /// Counter values seen, per range.
    pub counters: BTreeMap<u64, HashSet<u64>>,
    /// Resume keys by open.
    pub keys: BTreeMap<String, String>,
    /// Verdicts by open and name, and those that came since the last look.
    pub verdicts: BTreeMap<String, u64>,
    pub fresh: Vec<(String, String, bool)>,
    pub notes: BTreeMap<String, u64>,
    pub faults: Vec<String>,
    /// Lines taken in.
    pub lines: u64,
    pub ready: bool,
    pub done: bool,
    pub phase: Phase,
    /// When each request was completed, ns; kept only if asked for.
    pub timeline: Option<Vec<u64>>,
}

impl Ledger {
    pub fn new(blocks: usize) -> Self {
        Self { acked: vec![0; blocks], issued: vec![0; blocks], ..Self::default() }
    }

    /// Takes one line in.
    pub fn line(&mut self, line: &str) {
        self.lines += 1;
        let words: Vec<&str> = line.split(' ').collect();
        let number = |n: usize| words.get(n).and_then(|w| w.parse::<u64>().ok()).unwrap_or(0);
        let blocks = || (number(1)..number(1) + number(2)).map(|b| usize::try_from(b).unwrap());
        match words[0] {
            "i" => blocks().for_each(|b| self.issued[b] = number(3)),
            "w" => {
                blocks().for_each(|b| self.acked[b] = number(3));
                self.writes += 1;
                self.write_begun = self.write_begun.max(number(4));
                self.completed(number(4), number(5));
            }
            "r" => {
                self.reads += 1;
                self.completed(number(1), number(2));
            }
            "f" => {
                self.flushes += 1;
                self.completed(number(1), number(2));
            }
            "l" => {
                self.raised += 1;
                self.counters.entry(number(1)).or_default().insert(number(2));
            }
            "v" if words.len() == 4 => {
                *self.verdicts.entry(format!("{} {}", words[1], words[2])).or_default() += 1;
                self.fresh.push((words[1].into(), words[2].into(), words[3] == "true"));
            }
            "k" if words.len() == 3 => {
                self.keys.insert(words[1].into(), words[2].into());
            }
            "m" => self.mixed += 1,
            "a" => {}
            "n" => *self.notes.entry(line[2..].to_owned()).or_default() += 1,
            "e" => self.faults.push(line[2..].to_owned()),
            "ready" => self.ready = true,
            "done" => self.done = true,
            _ => {}
        }
    }

    fn completed(&mut self, start: u64, end: u64) {
        let phase = &mut self.phase;
        phase.completions += 1;
        if phase.last != 0 {
            phase.gap = phase.gap.max(end.saturating_sub(phase.last));
        }
        phase.last = phase.last.max(end);
        phase.latency = phase.latency.max(end.saturating_sub(start));
        if let Some(timeline) = &mut self.timeline {
            timeline.push(end);
        }
    }

    /// Ends a phase, and gives it; the next one begins.
    pub fn phase(&mut self) -> Phase {
        let ended = self.phase;
        self.phase = Phase { last: ended.last, ..Phase::default() };
        ended
    }
}
