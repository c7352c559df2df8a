//! What was measured, for people and for scripts.

use super::job::Seen;
use crate::args::Pattern;
use crate::output::{line, shown, size};
use clap::ValueEnum;
use serde_json::{Value, json};
use std::time::Duration;

pub(super) struct Report {
    pub(super) file: String,
    pub(super) pattern: Pattern,
    pub(super) transport: &'static str,
    /// Why it is not verbs, if that was wanted.
    pub(super) fallback: Option<String>,
    pub(super) block: usize,
    pub(super) depth: usize,
    pub(super) jobs: usize,
    /// Of each job.
    pub(super) channels: usize,
    /// Bytes of the file that were used.
    pub(super) size: u64,
    pub(super) elapsed: Duration,
    /// Of this process, user and system.
    pub(super) cpu: Duration,
    /// Operations of each job.
    pub(super) shares: Vec<u64>,
    pub(super) seen: Seen,
}

/// The least, the mean and the most of what the jobs did: how evenly they were served.
fn fairness(shares: &[u64]) -> (u64, f64, u64) {
    let mean = shares.iter().sum::<u64>() as f64 / shares.len().max(1) as f64;
    (shares.iter().min().copied().unwrap_or(0), mean, shares.iter().max().copied().unwrap_or(0))
}

/// So many in that time are how many in a second.
pub(super) fn per_second(count: u64, time: Duration) -> u64 {
    let rate = u128::from(count) * 1_000_000_000 / time.as_nanos().max(1);
    u64::try_from(rate).unwrap_or(u64::MAX)
}

/// One tick of the times in /proc (USER_HZ, the same on every Linux that we run on).
const TICK: Duration = Duration::from_millis(10);

/// CPU time that this process has used so far, user and system, to a tick; zero if the kernel does not tell.
///
/// From /proc, as the clock behind the vDSO is not to be had everywhere (User-Mode Linux).
pub(super) fn cpu_time() -> Duration {
    std::fs::read_to_string("/proc/self/stat").map_or(Duration::ZERO, |stat| cpu_of(&stat))
}

/// Fields 14 and 15 of proc_pid_stat(5); the name before them may hold anything.
fn cpu_of(stat: &str) -> Duration {
    let behind = stat.rsplit_once(')').map_or("", |(_, behind)| behind);
    let ticks =
        behind.split_ascii_whitespace().skip(11).take(2).filter_map(|ticks| ticks.parse::<u32>().ok());
    ticks.map(|ticks| TICK * ticks).sum()
}

impl Report {
    fn rate(&self) -> f64 {
        let seconds = self.elapsed.as_secs_f64();
        if seconds > 0.0 { self.seen.latencies.total() as f64 / seconds } else { 0.0 }
    }

    fn cpu_each(&self) -> u64 {
        let ns = self.cpu.as_nanos() / u128::from(self.seen.latencies.total().max(1));
        u64::try_from(ns).unwrap_or(u64::MAX)
    }

    fn pattern(&self) -> String {
        self.pattern.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
    }

    fn json(&self) -> Value {
        let latencies = &self.seen.latencies;
        let (least, most) = latencies.bounds();
        let (fewest, mean, largest) = fairness(&self.shares);
        json!({
            "file": self.file,
            "rw": self.pattern(),
            "transport": self.transport,
            "fallback": self.fallback,
            "block_bytes": self.block,
            "depth": self.depth,
            "jobs": self.jobs,
            "channels": self.channels,
            "size_bytes": self.size,
            "seconds": self.elapsed.as_secs_f64(),
            "operations": latencies.total(),
            "jobs_operations": { "min": fewest, "mean": mean, "max": largest },
            "iops": self.rate(),
            "bytes_per_second": self.rate() * self.block as f64,
            "latency_ns": {
                "min": least,
                "mean": latencies.mean(),
                "p50": latencies.per_mille(500),
                "p90": latencies.per_mille(900),
                "p99": latencies.per_mille(990),
                "p99_9": latencies.per_mille(999),
                "max": most,
            },
            "client_cpu_ns_per_operation": self.cpu_each(),
            "flush_seconds": self.seen.flush.map(|flush| flush.as_secs_f64()),
            "blocks_verified": self.seen.verified,
        })
    }

    /// Prints it to standard output.
    pub(super) fn print(&self, as_json: bool) -> anyhow::Result<()> {
        if as_json {
            return line(self.json());
        }
        let latencies = &self.seen.latencies;
        let plural = |count: usize| if count == 1 { "" } else { "s" };
        line(format_args!(
            "{}: {} of {}, {} in flight, {} job{}, {} channel{}, {} of the file, over {}, {:.1} s",
            shown(&self.file),
            self.pattern(),
            size(self.block as u64),
            self.depth,
            self.jobs,
            plural(self.jobs),
            self.jobs * self.channels,
            plural(self.jobs * self.channels),
            size(self.size),
            self.transport,
            self.elapsed.as_secs_f64()
        ))?;
        if let Some(reason) = &self.fallback {
            line(format_args!("  not over verbs: {}", shown(reason)))?;
        }
        line(format_args!("  IOPS        {:.0}", self.rate()))?;
        line(format_args!(
            "  bandwidth   {}/s",
            size(per_second(latencies.total() * self.block as u64, self.elapsed))
        ))?;
        line(format_args!(
            "  latency     mean {}, p50 {}, p90 {}, p99 {}, p99.9 {}, max {}",
            time(latencies.mean()),
            time(latencies.per_mille(500)),
            time(latencies.per_mille(900)),
            time(latencies.per_mille(990)),
            time(latencies.per_mille(999)),
            time(latencies.bounds().1)
        ))?;
        if self.jobs > 1 {
            let (fewest, mean, largest) = fairness(&self.shares);
            let of_mean = |count: u64| count as f64 / mean.max(1.0);
            line(format_args!(
                "  fairness    the least of a job {:.2}, the most {:.2} of the mean",
                of_mean(fewest),
                of_mean(largest)
            ))?;
        }
        line(format_args!("  client CPU  {} per operation", time(self.cpu_each())))?;
        if let Some(flush) = self.seen.flush {
            line(format_args!("  flush       {:.2?} after the last write", flush))?;
        }
        if self.seen.verified > 0 {
            line(format_args!("  verified    {} blocks", self.seen.verified))?;
        }
        Ok(())
    }
}

/// Three digits, or so.
fn time(ns: u64) -> String {
    match ns {
        0..1_000 => format!("{ns} ns"),
        1_000..100_000 => format!("{:.1} µs", ns as f64 / 1e3),
        100_000..1_000_000 => format!("{} µs", ns / 1000),
        1_000_000..1_000_000_000 => format!("{:.1} ms", ns as f64 / 1e6),
        _ => format!("{:.2} s", ns as f64 / 1e9),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_time_is_found_behind_any_name() {
        let stat = "7 (a ) b) S 1 7 7 0 -1 4194560 1 2 3 4 250 50 6 7 20 0 1 0 99";
        assert_eq!(cpu_of(stat), Duration::from_secs(3));
        assert_eq!(cpu_of(""), Duration::ZERO);
        let begin = std::time::Instant::now();
        while cpu_time() == Duration::ZERO && begin.elapsed().as_secs() < 60 {}
        assert!(cpu_time() > Duration::ZERO);
    }

    #[test]
    fn fairness_is_told_by_the_ends_and_the_mean() {
        assert_eq!(fairness(&[30, 10, 20]), (10, 20.0, 30));
        assert_eq!(fairness(&[]), (0, 0.0, 0));
    }

    #[test]
    fn times_are_short() {
        for (ns, text) in
            [(0, "0 ns"), (999, "999 ns"), (1_500, "1.5 µs"), (150_000, "150 µs"), (2_500_000, "2.5 ms")]
        {
            assert_eq!(time(ns), text);
        }
    }
}
