//! What a run is like: how many clients, what they do, and what goes wrong.

/// A rule that the world breaks on purpose, to see that the oracle finds it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Broken {
    /// The data plane confirms a fence while I/O is in flight.
    FenceEarly,
    /// The data plane confirms rules while I/O begun before is in flight.
    BarrierEarly,
    /// The data plane lets I/O through that rules forbid.
    RulesIgnored,
    /// The shell says that a record is durable before it is.
    PersistedEarly,
    /// The disk keeps only the beginning of what was synced.
    SyncForgets,
    /// The shell looks at a file and tells how it looked when it was opened.
    StaleEvidence,
    /// A reply is sent twice.
    ReplyTwice,
    /// The clock that the authority sees runs ten times too fast.
    FastClock,
    /// A flush is answered and does nothing.
    FlushNothing,
}

/// What a run is like.
#[derive(Clone, Debug)]
pub struct Setting {
    /// Clients.
    pub clients: usize,
    /// Names of files that they use.
    pub files: usize,
    /// One fault in how many steps; 0 for none.
    pub fault_every: u64,
    /// Whether control may die.
    pub crash_control: bool,
    /// Whether the data plane may die.
    pub crash_plane: bool,
    /// Whether the machine may lose its power.
    pub power_cut: bool,
    /// Whether somebody writes beside the server.
    pub outside: bool,
    /// Whether the journal's disk fills up now and then.
    pub full_disk: bool,
    /// Whether time jumps ahead.
    pub jumps: bool,
    /// Whether operators close opens.
    pub force_close: bool,
    /// Whether names are removed and renamed, and content replaced.
    pub names: bool,
    /// Whether a power cut may keep new content with old times.
    pub torn_times: bool,
    /// Granularity of files' times, nanoseconds.
    pub tick_ns: u64,
    /// Opens of one principal.
    pub opens_per_principal: usize,
    /// What is broken on purpose.
    pub broken: Option<Broken>,
}

impl Default for Setting {
    fn default() -> Self {
        Self {
            clients: 3,
            files: 2,
            fault_every: 40,
            crash_control: true,
            crash_plane: true,
            power_cut: true,
            outside: true,
            full_disk: true,
            jumps: true,
            force_close: true,
            names: true,
            torn_times: false,
            tick_ns: 1,
            opens_per_principal: 64,
            broken: None,
        }
    }
}

impl Setting {
    /// One of the many that seeds go through: each seed has its own emphasis, as faults that are always all on hide
    /// what happens between them.
    pub fn of_seed(seed: u64) -> Self {
        let mut rng = crate::rng::Rng::new(seed ^ 0xa5a5);
        let tick_ns = match rng.below(3) {
            0 => 4_000_000,
            1 => 1_000_000,
            _ => 1,
        };
        let opens_per_principal = if rng.once_in(4) { 3 } else { 64 };
        Self {
            clients: rng.index(5) + 2,
            files: rng.index(2) + 1,
            fault_every: [0, 15, 40, 100][rng.index(4)],
            crash_control: !rng.once_in(3),
            crash_plane: !rng.once_in(3),
            power_cut: rng.once_in(2),
            outside: rng.once_in(2),
            full_disk: rng.once_in(4),
            jumps: rng.once_in(2),
            force_close: rng.once_in(3),
            names: rng.once_in(2),
            torn_times: false,
            tick_ns,
            opens_per_principal,
            broken: None,
        }
    }
}
