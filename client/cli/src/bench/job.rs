//! One job: a thread and data channels of its own, and as many lanes as requests are to be in flight.
//!
//! ```text
//!   job thread ── lane 0: blocks 0, depth, 2*depth …   one request after the other, each timed
//!              ├─ lane 1: blocks 1, depth+1 …          (random reads: any block of the file)
//!              └─ lane …
//! ```
//!
//! No two lanes ever write the same block, so it is known which write each block must be of.

use super::histogram::Histogram;
use super::pattern;
use crate::args::Pattern;
use anyhow::{Context, bail};
use holdfast_client::stream::Target;
use holdfast_client::{Access, DataChannel, Open, Region, Stripes, Transport};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

/// What a job does.
#[derive(Clone)]
pub(super) struct Job {
    pub(super) open: Open,
    pub(super) transport: Transport,
    /// Channels of its own.
    pub(super) channels: usize,
    pub(super) pattern: Pattern,
    pub(super) verify: bool,
    /// Every block holds what [`pattern`] says, of generation 0.
    pub(super) filled: bool,
    /// Bytes.
    pub(super) block: usize,
    /// Blocks of the file.
    pub(super) all: u64,
    /// The job's own.
    pub(super) own: Range<u64>,
    pub(super) depth: usize,
    /// Completed so far, by all jobs.
    pub(super) completed: Arc<AtomicU64>,
    /// Set: to be ended now.
    pub(super) stop: Arc<AtomicBool>,
}

/// What a job, or a lane of it, has seen.
#[derive(Default)]
pub(super) struct Seen {
    pub(super) latencies: Histogram,
    /// Blocks that were checked.
    pub(super) verified: u64,
    /// When the last request was completed.
    pub(super) ended: Option<Instant>,
    /// How long it took until what was written was on the disk.
    pub(super) flush: Option<Duration>,
    /// What carried it, and why it was not verbs if that was wanted.
    pub(super) transport: &'static str,
    pub(super) fallback: Option<String>,
}

impl Seen {
    pub(super) fn merge(&mut self, other: &Self) {
        self.latencies.merge(&other.latencies);
        self.verified += other.verified;
        self.ended = self.ended.max(other.ended);
        self.flush = self.flush.max(other.flush);
        if self.transport.is_empty() {
            self.transport = other.transport;
            self.fallback.clone_from(&other.fallback);
        }
    }
}

/// Says that it is ready, waits for the time until which to go on, and goes on until then.
///
/// # Errors
/// What a request ended with, or what is wrong with a block.
pub(super) fn run(
    job: Job,
    ready: &mpsc::Sender<()>,
    start: watch::Receiver<Option<Instant>>,
) -> anyhow::Result<Seen> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(all_lanes(job, ready, start))
}

async fn all_lanes(
    job: Job,
    ready: &mpsc::Sender<()>,
    mut start: watch::Receiver<Option<Instant>>,
) -> anyhow::Result<Seen> {
    let (channel, target) = connect(&job).await?;
    let mut lanes = Vec::new();
    for number in 0..job.depth {
        lanes.push(Lane::new(&job, &target, number).await?);
    }
    ready.send(()).await?;
    let Ok(until) = start.wait_for(Option::is_some).await.map(|until| *until) else {
        return Ok(Seen::default());
    };
    let until = until.context("no time was told")?;
    let mut lanes = together(lanes, async move |lane: &mut Lane| lane.measure(until).await).await?;
    let mut seen = Seen {
        transport: channel.transport().name(),
        fallback: channel.fallback_reason().map(str::to_owned),
        ..Seen::default()
    };
    if job.pattern.writes() {
        let begin = Instant::now();
        target.flush().await?;
        seen.flush = Some(begin.elapsed());
        if job.verify {
            lanes = together(lanes, async |lane: &mut Lane| lane.read_back().await).await?;
        }
    }
    lanes.iter().for_each(|lane| seen.merge(&lane.seen));
    drop(lanes);
    target.unbind().await?;
    Ok(seen)
}

/// One of its channels, and all of them bound.
async fn connect(job: &Job) -> anyhow::Result<(DataChannel, Target)> {
    let access = if job.pattern.writes() { Access::READ | Access::WRITE } else { Access::READ };
    if job.channels == 1 {
        let channel = job.open.connect(job.transport).await?;
        let binding = job.open.bind_with_access(&channel, access).await?;
        return Ok((channel, binding.into()));
    }
    let stripes = Stripes::with_access(&job.open, access)?;
    let first = stripes.connect(job.transport).await?;
    for _ in 1..job.channels {
        stripes.connect(job.transport).await?;
    }
    Ok((first, stripes.into()))
}

/// Has every lane do its work at the same time, and gives them back.
async fn together<W>(lanes: Vec<Lane>, work: W) -> anyhow::Result<Vec<Lane>>
where
    W: AsyncFn(&mut Lane) -> anyhow::Result<()> + Copy + 'static,
{
    let local = tokio::task::LocalSet::new();
    let mut tasks = JoinSet::new();
    for mut lane in lanes {
        let task = async move {
            work(&mut lane).await?;
            anyhow::Ok(lane)
        };
        tasks.spawn_local_on(task, &local);
    }
    local
        .run_until(async {
            let mut done = Vec::new();
            while let Some(lane) = tasks.join_next().await {
                done.push(lane??);
            }
            Ok(done)
        })
        .await
}

/// One request after the other.
struct Lane {
    job: Job,
    target: Target,
    region: Region,
    /// For blocks that are made or checked.
    bytes: Vec<u8>,
    number: u64,
    /// Per block of its own, the generation of the last write.
    generations: Vec<u64>,
    dice: u64,
    seen: Seen,
}

impl Lane {
    async fn new(job: &Job, target: &Target, number: usize) -> anyhow::Result<Self> {
        let region = Region::allocate(job.block)?;
        let number = number as u64;
        let mut bytes = vec![0; job.block];
        pattern::fill(&mut bytes, number, u64::MAX);
        region.copy_in(0, &bytes)?;
        // Registers the region, outside of what is measured.
        target.read_at(&region, 0..job.block, 0).await?;
        let blocks = (job.own.end - job.own.start).saturating_sub(number).div_ceil(job.depth as u64);
        let generations = if job.verify && job.pattern.writes() { blocks } else { 0 };
        Ok(Self {
            job: job.clone(),
            target: target.clone(),
            region,
            bytes,
            number,
            generations: vec![0; usize::try_from(generations)?],
            dice: (job.own.start << 16) ^ number ^ 0x5eed,
            seen: Seen::default(),
        })
    }

    /// Blocks of its own.
    fn blocks(&self) -> u64 {
        let Range { start, end } = self.job.own;
        (end - start).saturating_sub(self.number).div_ceil(self.job.depth as u64)
    }

    /// The block of the file that is the `nth` of its own.
    fn own(&self, nth: u64) -> u64 {
        self.job.own.start + self.number + nth * self.job.depth as u64
    }

    /// The next number below (xorshift64*).
    fn below(&mut self, bound: u64) -> u64 {
        self.dice ^= self.dice >> 12;
        self.dice ^= self.dice << 25;
        self.dice ^= self.dice >> 27;
        let number = self.dice.wrapping_mul(0x2545_f491_4f6c_dd1d);
        ((u128::from(number) * u128::from(bound)) >> 64) as u64
    }

    /// Reads the clock once for each request: where that is a system call, it is a good part of a small one.
    async fn measure(&mut self, until: Instant) -> anyhow::Result<()> {
        let blocks = self.blocks();
        let mut turn = 0u64;
        let mut now = Instant::now();
        while !self.job.stop.load(Relaxed) && now < until {
            let nth = if self.job.pattern.is_random() { self.below(blocks) } else { turn % blocks };
            turn += 1;
            let (block, begin) = match self.job.pattern {
                Pattern::Randread => (self.below(self.job.all), now),
                Pattern::Read => (self.own(nth), now),
                Pattern::Write | Pattern::Randwrite => (self.own(nth), self.prepare(nth, turn, now)?),
            };
            if self.job.pattern.writes() {
                self.write(block).await?;
            } else {
                self.read(block).await?;
            }
            now = Instant::now();
            self.seen.latencies.add(now - begin);
            self.job.completed.fetch_add(1, Relaxed);
            if self.job.verify {
                if self.job.pattern.writes() {
                    self.remember(nth, turn)?;
                } else {
                    self.check(block)?;
                }
                now = Instant::now();
            }
        }
        self.seen.ended = Some(now);
        Ok(())
    }

    fn at(&self, block: u64) -> u64 {
        block * self.job.block as u64
    }

    async fn read(&mut self, block: u64) -> anyhow::Result<()> {
        let count = self.target.read_at(&self.region, 0..self.job.block, self.at(block)).await?;
        if count < self.job.block {
            bail!("the file ends within block {block}: somebody has cut it meanwhile");
        }
        Ok(())
    }

    /// The generation of the block in the region.
    fn check(&mut self, block: u64) -> anyhow::Result<u64> {
        self.region.copy_out(0, &mut self.bytes)?;
        self.seen.verified += 1;
        pattern::check(&self.bytes, block).map_err(|fault| anyhow::anyhow!("{fault}"))
    }

    /// Makes what the write is to be recognised by, and says when it begins.
    fn prepare(&mut self, nth: u64, generation: u64, now: Instant) -> anyhow::Result<Instant> {
        if !self.job.verify {
            return Ok(now);
        }
        let block = self.own(nth);
        pattern::fill(&mut self.bytes, block, generation);
        self.region.copy_in(0, &self.bytes)?;
        Ok(Instant::now())
    }

    async fn write(&mut self, block: u64) -> anyhow::Result<()> {
        Ok(self.target.write_all(&self.region, 0..self.job.block, self.at(block)).await?)
    }

    /// The last write of a block of its own.
    fn remember(&mut self, nth: u64, generation: u64) -> anyhow::Result<()> {
        if let Some(last) = self.generations.get_mut(usize::try_from(nth)?) {
            *last = generation;
        }
        Ok(())
    }

    /// Every block of its own must be of the last write.
    async fn read_back(&mut self) -> anyhow::Result<()> {
        for nth in 0..self.generations.len() {
            let wanted = self.generations[nth];
            if wanted == 0 && !self.job.filled {
                continue;
            }
            let block = self.own(nth as u64);
            let count = self.target.read_at(&self.region, 0..self.job.block, self.at(block)).await?;
            if count < self.job.block {
                bail!("the file ends within block {block}, which was written");
            }
            let found = self.check(block)?;
            if found != wanted {
                bail!("block {block} is of write {found}, but {wanted} was the last one acknowledged");
            }
        }
        Ok(())
    }
}
