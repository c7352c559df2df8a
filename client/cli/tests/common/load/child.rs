//! The load itself, in its own process.

use super::block::{BLOCK, Dice, Stamp};
use super::{COUNTERS, PLAN, Plan, RANGES, check_stamp};
use holdfast_client::{
    Binding, Config, Disposition, Error, Event, LockItem, LockKind, LockOptions, LockRange, Open,
    OpenOptions, Place, Region, ResumeOptions, Session, ShareMode, Status, Transport, Verdict,
};
use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::time::{Duration, Instant};

/// Blocks of the longest write and read.
const RUN: u64 = 16;
const RUN_BYTES: usize = 16 * BLOCK;
/// Reads of a block that is just being written.
const MIXED_MAX: u32 = 500;
/// Longest wait for a lock of another load, which may have been killed with it.
const LOCK_WAIT: Duration = Duration::from_secs(50);
/// How long the server may be away when the load starts.
const AWAY_MAX: Duration = Duration::from_secs(30);

/// Time, ns: the same for all processes of a host, and told wherever the kernel has no vDSO, too.
pub fn now() -> u64 {
    u64::try_from(std::time::UNIX_EPOCH.elapsed().unwrap().as_nanos()).unwrap()
}

/// One line to the test, whole and at once. A test that is gone has ended us.
macro_rules! tell {
    ($($word:tt)*) => {{
        let line = format!("{}\n", format_args!($($word)*));
        if std::io::stdout().lock().write_all(line.as_bytes()).is_err() {
            std::process::exit(3);
        }
    }};
}

/// Repeats what a change of the file, or a write of unknown fate, has refused: the load knows what it wrote.
macro_rules! retry {
    ($open:expr, $request:expr) => {
        loop {
            match $request.await {
                Ok(done) => break Ok(done),
                Err(Error::Changed) => {
                    $open.accept_change();
                    tell!("n changed");
                }
                Err(Error::WriteFateUnknown) => tell!("n fate unknown"),
                Err(error) => break Err(text(error)),
            }
        }
    };
}

/// Runs the load if this process was started as one.
pub fn run_if_asked() {
    let Ok(plan) = std::env::var(PLAN) else { return };
    // The test harness has begun a line.
    tell!("");
    let plan: Plan = serde_json::from_str(&plan).unwrap();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    match runtime.block_on(load(plan)) {
        Ok(()) => tell!("done"),
        Err(error) => {
            tell!("e the load ended: {error}");
            std::process::exit(1);
        }
    }
}

type Outcome<T> = Result<T, String>;

/// What all tasks share.
struct World {
    plan: Plan,
    data: Open,
    acked: Vec<AtomicU64>,
    issued: Vec<AtomicU64>,
    sequence: AtomicU64,
    stop: AtomicBool,
}

async fn load(plan: Plan) -> Outcome<()> {
    let config = Config::load(&plan.config).map_err(text)?;
    let transport: Transport = plan.transport.parse()?;
    let session = connect(&config).await?;
    let data = open(&session, &plan, &plan.file(), ShareMode::READ).await?;
    let counters = open(&session, &plan, COUNTERS, ShareMode::ALL).await?;
    let channel = data.connect(transport).await.map_err(text)?;
    let writing = data.bind(&channel).await.map_err(text)?;
    let reading = data.bind_with_access(&channel, holdfast_client::Access::READ).await.map_err(text)?;
    let counting = counters.bind(&channel).await.map_err(text)?;
    let all = usize::try_from(plan.writers * plan.blocks).unwrap();
    let kept =
        |values: &[u64]| (0..all).map(|n| AtomicU64::new(values.get(n).copied().unwrap_or(0))).collect();
    let world = Arc::new(World {
        acked: kept(&plan.acked),
        issued: kept(&plan.issued),
        sequence: AtomicU64::new(plan.issued.iter().max().copied().unwrap_or(0)),
        stop: AtomicBool::new(false),
        data: data.clone(),
        plan: plan.clone(),
    });
    // What an earlier process had under way has landed by now, or never will.
    settle(&world, &reading).await?;
    unlock_all(&world, &counters).await?;
    tell!("ready");

    let mut tasks = tokio::task::JoinSet::new();
    for writer in 0..plan.writers {
        tasks.spawn(write(Arc::clone(&world), writing.clone(), writer));
    }
    for reader in 0..plan.readers {
        tasks.spawn(read(Arc::clone(&world), reading.clone(), reader));
    }
    for owner in 0..plan.lockers {
        tasks.spawn(count(Arc::clone(&world), counters.clone(), counting.clone(), owner));
    }
    let stopping = Arc::clone(&world);
    std::thread::spawn(move || {
        let _ = std::io::stdin().read_line(&mut String::new());
        stopping.stop.store(true, SeqCst);
    });
    while let Some(ended) = tasks.join_next().await {
        ended.map_err(|e| e.to_string())??;
    }
    settle(&world, &reading).await?;
    retry!(world.data, writing.flush())?;
    data.close().await.map_err(text)?;
    counters.close().await.map_err(text)?;
    session.logoff().await.map_err(text)
}

/// The first connection is the program's own affair (every later one is the library's): the server may just be away.
async fn connect(config: &Config) -> Outcome<Session> {
    let start = Instant::now();
    loop {
        match Session::connect(config).await {
            Ok(session) => return Ok(session),
            Err(Error::Io { .. }) if start.elapsed() < AWAY_MAX => {
                tell!("n the server was away at the start");
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            Err(error) => return Err(text(error)),
        }
    }
}

fn text(error: Error) -> String {
    format!("{error} ({error:?})").replace('\n', " ")
}

/// Opens a file, or resumes the open that an earlier process of this load had; tells what becomes of it.
async fn open(session: &Session, plan: &Plan, name: &str, share: ShareMode) -> Outcome<Open> {
    let place = Place { volume: "data".into(), path: name.into() };
    let open = match plan.keys.get(name) {
        None => {
            let options = OpenOptions::read_write()
                .disposition(Disposition::OpenOrCreate, 0o644)
                .share(share)
                .hold(Duration::from_millis(plan.hold_ms));
            session.open(&place, &options).await.map_err(text)?
        }
        Some(key) => {
            let resumed = resume(session, &unhex(key)).await?;
            tell!("v {name} {:?} {}", resumed.verdict, resumed.locks_kept);
            if resumed.verdict == Verdict::Changed {
                resumed.open.accept_change();
            }
            resumed.open
        }
    };
    tell!("k {name} {}", hex(&open.resume_key()));
    let (mut events, watched, name) = (open.events(), open.clone(), name.to_owned());
    tokio::spawn(async move {
        while let Some(event) = events.next().await {
            match event {
                Event::Resumed { verdict, locks_kept } => {
                    tell!("v {name} {verdict:?} {locks_kept}");
                    tell!("k {name} {}", hex(&watched.resume_key()));
                }
                other => tell!("e {name}: {other:?}"),
            }
        }
    });
    Ok(open)
}

/// Resumes an open. The server may not know yet that the process which had it is gone.
async fn resume(session: &Session, key: &[u8]) -> Outcome<holdfast_client::Resumed> {
    loop {
        match session.resume(key, &ResumeOptions::default()).await {
            Ok(resumed) => return Ok(resumed),
            Err(error) if error.status() == Some(Status::Busy) => {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            Err(error) => return Err(format!("cannot resume: {}", text(error))),
        }
    }
}

impl World {
    async fn rest(&self) {
        if self.plan.rest_us > 0 {
            tokio::time::sleep(Duration::from_micros(self.plan.rest_us)).await;
        }
    }

    fn stopped(&self) -> bool {
        self.stop.load(SeqCst)
    }

    /// Reads blocks and checks each one. A block that is read while it is written may be a mixture (as with any file); then
    /// it is read again: it must become whole.
    async fn verified(&self, binding: &Binding, region: &Region, first: u64, count: u64) -> Outcome<()> {
        let index = |n: usize| usize::try_from(first).unwrap() + n;
        let length = usize::try_from(count).unwrap() * BLOCK;
        let mut bytes = vec![0; length];
        let mut again = 0;
        loop {
            let load = |all: &[AtomicU64]| -> Vec<u64> {
                (0..length / BLOCK).map(|n| all[index(n)].load(SeqCst)).collect()
            };
            let (least, start) = (load(&self.acked), now());
            let read = retry!(self.data, binding.read_at(region, 0..length, first * BLOCK as u64))?;
            let (most, end) = (load(&self.issued), now());
            bytes.fill(0);
            region.copy_out(0, &mut bytes[..read]).map_err(text)?;
            let mut mixed = false;
            for (n, block) in bytes.chunks(BLOCK).enumerate() {
                let (number, least, most) = (index(n) as u64, least[n], most[n]);
                let fault = match Stamp::of(block) {
                    Err(_) if most > least && again < MIXED_MAX => {
                        mixed = true;
                        continue;
                    }
                    Err(torn) => torn,
                    Ok(stamp) => match check_stamp(&self.plan, stamp, number, least, most) {
                        Ok(()) => continue,
                        Err(fault) => fault,
                    },
                };
                tell!("e {fault} (block {number}, acknowledged {least}, issued {most})");
            }
            tell!("r {start} {end}");
            if !mixed {
                return Ok(());
            }
            again += 1;
            tell!("m");
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
}

/// Reads every block once.
async fn settle(world: &World, binding: &Binding) -> Outcome<()> {
    let region = Region::allocate(RUN_BYTES).map_err(text)?;
    let all = world.plan.writers * world.plan.blocks;
    let mut first = 0;
    while first < all {
        let count = RUN.min(all - first);
        world.verified(binding, &region, first, count).await?;
        first += count;
    }
    Ok(())
}

async fn write(world: Arc<World>, binding: Binding, writer: u64) -> Outcome<()> {
    let plan = &world.plan;
    let mut dice = Dice::new(plan.seed ^ (writer << 32) ^ 1);
    let region = Region::allocate(RUN_BYTES).map_err(text)?;
    let mut block = vec![0; BLOCK];
    while !world.stopped() {
        let count = if dice.below(4) == 0 { 1 + dice.below(RUN.min(plan.blocks)) } else { 1 };
        let first = writer * plan.blocks + dice.below(plan.blocks - count + 1);
        let sequence = world.sequence.fetch_add(1, SeqCst) + 1;
        for n in 0..count {
            let stamp = Stamp { writer: plan.writer_of(first + n), block: first + n, sequence };
            stamp.fill(&mut block);
            region.copy_in(usize::try_from(n).unwrap() * BLOCK, &block).map_err(text)?;
        }
        let blocks = || (first..first + count).map(|n| usize::try_from(n).unwrap());
        blocks().for_each(|n| world.issued[n].store(sequence, SeqCst));
        tell!("i {first} {count} {sequence}");
        let (length, at, start) = (usize::try_from(count).unwrap() * BLOCK, first * BLOCK as u64, now());
        retry!(world.data, binding.write_all(&region, 0..length, at))?;
        tell!("w {first} {count} {sequence} {start} {}", now());
        blocks().for_each(|n| world.acked[n].store(sequence, SeqCst));
        if dice.below(32) == 0 {
            let start = now();
            retry!(world.data, binding.flush())?;
            tell!("f {start} {}", now());
        }
        world.rest().await;
    }
    Ok(())
}

async fn read(world: Arc<World>, binding: Binding, reader: u64) -> Outcome<()> {
    let mut dice = Dice::new(world.plan.seed ^ (reader << 32) ^ 2);
    let region = Region::allocate(RUN_BYTES).map_err(text)?;
    let all = world.plan.writers * world.plan.blocks;
    while !world.stopped() {
        let count = 1 + dice.below(4);
        world.verified(&binding, &region, dice.below(all - count + 1), count).await?;
        world.rest().await;
    }
    Ok(())
}

/// The bytes of a counter.
fn range(number: u64) -> LockRange {
    LockRange::new(number * BLOCK as u64, BLOCK as u64).unwrap()
}

/// An earlier process of this load may have been killed with locks.
async fn unlock_all(world: &World, open: &Open) -> Outcome<()> {
    if !world.plan.keys.contains_key(COUNTERS) {
        return Ok(());
    }
    for (owner, number) in (0..world.plan.lockers).flat_map(|o| (0..RANGES).map(move |n| (o, n))) {
        match open.unlock(owner, &[range(number)]).await {
            Err(error) if error.status() == Some(Status::NotLocked) => {}
            other => other.map_err(text)?,
        }
    }
    Ok(())
}

/// Raises counters under their locks, in three steps that nobody may come between.
async fn count(world: Arc<World>, open: Open, binding: Binding, owner: u64) -> Outcome<()> {
    let mut dice = Dice::new(world.plan.seed ^ (owner << 32) ^ 3);
    let region = Region::allocate(BLOCK).map_err(text)?;
    let mut bytes = vec![0; BLOCK];
    while !world.stopped() {
        let number = dice.below(RANGES);
        let start = now();
        let wanted = [LockItem { range: range(number), kind: LockKind::Exclusive }];
        let options = LockOptions { owner, wait: Some(LOCK_WAIT) };
        retry!(open, open.lock(&wanted, options))?;
        let at = number * BLOCK as u64;
        let value = async |bytes: &mut [u8]| -> Outcome<u64> {
            bytes.fill(0);
            let read = retry!(open, binding.read_at(&region, 0..BLOCK, at))?;
            region.copy_out(0, &mut bytes[..read]).map_err(text)?;
            Ok(Stamp::of(bytes)?.map_or(0, |stamp| stamp.sequence))
        };
        let next = value(&mut bytes).await? + 1;
        Stamp { writer: world.plan.load, block: number, sequence: next }.fill(&mut bytes);
        region.copy_in(0, &bytes).map_err(text)?;
        retry!(open, binding.write_all(&region, 0..BLOCK, at))?;
        let found = value(&mut bytes).await?;
        if found != next || Stamp::of(&bytes)?.is_some_and(|stamp| stamp.writer != world.plan.load) {
            tell!(
                "e counter {number} is {found} after {next} was written under its lock: it was granted twice"
            );
        }
        tell!("l {number} {next} {start} {}", now());
        retry!(open, open.unlock(owner, &[range(number)]))?;
        world.rest().await;
    }
    Ok(())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

pub fn unhex(text: &str) -> Vec<u8> {
    let digits: Vec<char> = text.chars().collect();
    let byte = |pair: &[char]| u8::from_str_radix(&pair.iter().collect::<String>(), 16).unwrap();
    digits.chunks(2).map(byte).collect()
}
