//! One run: some steps with faults, then peace, then everything must be gone.

use crate::oracle::MS;
use crate::setting::Setting;
use crate::world::World;
use holdfast_shared::state::Counts;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Why a run ended badly.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Failure {
    /// The seed that repeats it.
    pub seed: u64,
    /// With how many events before peace.
    pub steps: u64,
    /// After how many events.
    pub step: u64,
    /// What was broken.
    pub words: String,
    /// The last events.
    pub trace: String,
}

impl Failure {
    /// The command that shows it again.
    pub fn again(&self) -> String {
        format!("ci/sim --seed {} --steps {} --trace", self.seed, self.steps)
    }
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { seed, step, words, trace, .. } = self;
        write!(f, "{trace}\nseed {seed} step {step}: {words}\nrepeat it with: {}", self.again())
    }
}

/// What a run did, to see that it does something.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Done {
    /// Events.
    pub steps: u64,
    /// Resumes that succeeded.
    pub resumed: u64,
    /// Verdicts told: unchanged, expired unchanged, changed, gone.
    pub verdicts: [u64; 4],
    /// A digest of everything that happened.
    pub digest: u64,
}

/// Runs one seed with the setting that the seed has.
///
/// # Errors
/// The promise that was broken.
pub fn run(seed: u64, steps: u64) -> Result<Done, Box<Failure>> {
    run_with(seed, steps, &Setting::of_seed(seed))
}

/// Runs one seed.
///
/// # Errors
/// The promise that was broken, with the last events.
pub fn run_with(seed: u64, steps: u64, setting: &Setting) -> Result<Done, Box<Failure>> {
    attempt(seed, steps, setting, false).map_err(|failure| {
        // Once more, with words: the same seed gives the same run.
        match attempt(seed, steps, setting, true) {
            Err(told) if told.words == failure.words => Box::new(told),
            other => {
                let words =
                    format!("NOT REPEATED ({:?}): {}", other.err().map(|other| other.words), failure.words);
                Box::new(Failure { words, ..failure })
            }
        }
    })
}

/// Like [`run`], and gives the last events also of a run that ends well.
///
/// # Errors
/// As [`run`].
pub fn trace(seed: u64, steps: u64) -> Result<String, Box<Failure>> {
    let mut world = World::new(seed, Setting::of_seed(seed), true);
    drive(&mut world, steps).map_err(|words| failure(&world, seed, steps, words))?;
    Ok(world.trace.text())
}

fn failure(world: &World, seed: u64, steps: u64, words: String) -> Box<Failure> {
    Box::new(Failure { seed, steps, step: world.step, words, trace: world.trace.text() })
}

fn attempt(seed: u64, steps: u64, setting: &Setting, traced: bool) -> Result<Done, Failure> {
    let mut world = World::new(seed, setting.clone(), traced);
    let outcome = catch_unwind(AssertUnwindSafe(|| drive(&mut world, steps)));
    let words = match outcome {
        Ok(Ok(())) => {
            return Ok(Done {
                steps: world.step,
                resumed: world.oracle.resumed,
                verdicts: world.oracle.verdicts,
                digest: world.rng.number() ^ world.now,
            });
        }
        Ok(Err(words)) => words,
        Err(panic) => {
            let words = panic.downcast_ref::<String>().cloned();
            let words = words.or_else(|| panic.downcast_ref::<&str>().map(|words| (*words).to_owned()));
            format!("panic: {}", words.unwrap_or_default())
        }
    };
    Err(*failure(&world, seed, steps, words))
}

fn broken(world: &World) -> Result<(), String> {
    world.oracle.broken().map_or(Ok(()), |words| Err(words.to_owned()))
}

fn drive(world: &mut World, steps: u64) -> Result<(), String> {
    for _ in 0..steps {
        if !world.step() {
            break;
        }
    }
    broken(world)?;
    settle(world)
}

/// Faults are over: every client gets through, and what no client knows any more the operator closes.
pub(crate) fn settle(world: &mut World) -> Result<(), String> {
    world.trace.note(world.now, || "---- peace".to_owned());
    world.heal();
    let patience = world.now + 600_000 * MS;
    while !world.clients.iter().all(crate::client::Client::is_done) {
        if !world.step() || world.now > patience {
            broken(world)?;
            let left: Vec<String> = world
                .clients
                .iter()
                .filter(|client| !client.is_done())
                .map(crate::client::Client::left)
                .collect();
            return Err(format!("no progress in peace: {left:?}"));
        }
    }
    let patience = world.now + 60_000 * MS;
    loop {
        let counts = world.counts();
        // Tombstones stay for those who come late.
        let baseline =
            Counts { tombstones: counts.map_or(0, |counts| counts.tombstones), ..Counts::default() };
        let quiet = counts == Some(baseline);
        if quiet && world.plane.as_ref().is_some_and(|plane| plane.bindings.is_empty()) {
            return broken(world);
        }
        for open in world.listed() {
            if !world.was_forced(open) {
                world.force_close(open);
            }
        }
        if !world.step() || world.now > patience {
            broken(world)?;
            return Err(format!("something is left at the end: {counts:?}"));
        }
    }
}
