//! Counters and gauges, for the operator. Written from anywhere, read by the admin socket.

use holdfast_shared::journal::record::Record;
use holdfast_shared::state::Counts;
use holdfast_shared::types::{GoneReason, Status, Verdict};
use holdfast_shared::wire::control::{Reply, Request};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

macro_rules! kinds {
    ($($variant:ident $pattern:tt => $name:literal),* $(,)?) => {
        const KINDS: &[&str] = &[$($name),*];

        fn kind(request: &Request) -> usize {
            let name = match request { $(kinds!(@pattern $variant $pattern) => $name,)* };
            KINDS.iter().position(|kind| *kind == name).unwrap_or(0)
        }
    };
    (@pattern $variant:ident (..)) => { Request::$variant(..) };
    (@pattern $variant:ident ()) => { Request::$variant };
}

kinds! {
    Hello(..) => "hello", Open(..) => "open", QueryKey(..) => "query_key", Close(..) => "close",
    GetAttributes(..) => "get_attributes", SetAttributes(..) => "set_attributes", List(..) => "list",
    MakeDirectory(..) => "make_directory", Remove(..) => "remove", Rename(..) => "rename",
    VolumeStatus(..) => "volume_status", Volumes() => "volumes", MakeSymlink(..) => "make_symlink",
    ReadSymlink(..) => "read_symlink", Ping() => "ping", Resume(..) => "resume", Lock(..) => "lock",
    Unlock(..) => "unlock", CancelLock(..) => "cancel_lock", Logoff() => "logoff",
}

/// What a resume was told.
const RESUMES: &[&str] = &["unchanged", "expired_unchanged", "changed", "gone"];

macro_rules! gauges {
    ($($(#[$doc:meta])* $name:ident),* $(,)?) => {
        /// All of them.
        #[derive(Debug)]
        pub struct Gauges {
            $($(#[$doc])* pub $name: AtomicU64,)*
            requests: [AtomicU64; KINDS.len()],
            resumes: [AtomicU64; RESUMES.len()],
            refused: [AtomicU64; Status::ALL.len()],
        }

        impl Default for Gauges {
            fn default() -> Self {
                Self {
                    $($name: AtomicU64::new(0),)*
                    requests: [const { AtomicU64::new(0) }; KINDS.len()],
                    resumes: [const { AtomicU64::new(0) }; RESUMES.len()],
                    refused: [const { AtomicU64::new(0) }; Status::ALL.len()],
                }
            }
        }

        impl Gauges {
            /// Every gauge by its name. Requests and refusals that never occurred are left out.
            pub fn snapshot(&self) -> BTreeMap<String, u64> {
                let mut all = BTreeMap::new();
                $(all.insert(stringify!($name).to_owned(), self.$name.load(Relaxed));)*
                let requests = KINDS.iter().map(|kind| (*kind).to_owned()).zip(&self.requests);
                let refused = Status::ALL.iter().map(|s| format!("{s:?}")).zip(&self.refused);
                let resumes = RESUMES.iter().map(|how| (*how).to_owned()).zip(&self.resumes);
                for (prefix, name, count) in requests.map(|(n, c)| ("requests_total", n, c))
                    .chain(resumes.map(|(n, c)| ("resumes_total", n, c)))
                    .chain(refused.map(|(n, c)| ("refused_total", n, c)))
                {
                    let count = count.load(Relaxed);
                    if count > 0 {
                        all.insert(format!("{prefix}.{name}"), count);
                    }
                }
                all
            }
        }
    };
}

gauges! {
    /// Sessions.
    sessions,
    /// Opens, closing ones included.
    opens,
    /// Bindings that dataplane holds.
    bindings,
    /// Bindings being fenced.
    fences,
    /// Operations under way in the file system.
    operations,
    /// Files with a claim on access.
    claimed_files,
    /// Opens whose session is lost, expired ones included.
    detached_opens,
    /// Opens that are gone and of which a late resume is still told.
    tombstones,
    /// Locks.
    locks,
    /// Requests that wait for locks.
    lock_waiters,
    /// Requests that wait for a file that is held.
    waiting_opens,
    /// Changes of locks that wait until I/O under way has ended.
    lock_barriers,
    /// Answers and actions that wait for the journal.
    waiting_for_journal,
    /// Descriptors of volumes' files that this process holds.
    open_files,
    /// Connections whose handshake is not finished.
    half_open_handshakes,
    /// Control connections, half-open ones included.
    connections,
    /// 1 while a dataplane is linked.
    link_up,
    /// Handshakes that failed or took too long.
    handshakes_failed_total,
    /// Connections closed at once because their address has too many half-open ones.
    connections_dropped_total,
    /// Half-open connections closed to make room for newer ones.
    half_open_evicted_total,
    /// Fences that were confirmed late, or not yet.
    fences_overdue_total,
    /// 1 while the server recovers and lets nobody in.
    recovering,
    /// Opens found again at the start.
    recovered_opens,
    /// Opens whose file was not found again at the start.
    recovered_lost,
    /// Opens found again that are kept by their file's handle, for want of descriptors.
    recovered_by_name,
    /// How long the start took, from the state directory to the first accept, milliseconds.
    recovery_ms,
    /// 1 while the journal's disk is full.
    journal_full,
    /// Bytes of the journal.
    journal_bytes,
    /// Files of the journal.
    journal_segments,
    /// Records written.
    journal_records_total,
    /// Times the disk was waited for; each covers all records that had gathered.
    journal_commits_total,
    /// How long the oldest record of each of these waited, in all, microseconds.
    journal_wait_us_total,
    /// Checkpoints finished.
    journal_checkpoints_total,
    /// Opens that ended because somebody else wanted the file and their time was over.
    evictions_total,
    /// Opens that the operator ended.
    force_closes_total,
    /// Binds granted.
    binds_granted_total,
    /// Binds refused.
    binds_refused_total,
}

impl Gauges {
    /// Counts a request.
    pub fn request(&self, request: &Request) {
        self.requests[kind(request)].fetch_add(1, Relaxed);
    }

    /// Counts refusals and resumes among the answers.
    pub fn answer(&self, reply: &Reply) {
        let resumed = match reply {
            Reply::Refused(refusal) => return self.refused(refusal.status),
            Reply::Resumed(resumed) => match resumed.verdict {
                Verdict::Unchanged => 0,
                Verdict::ExpiredUnchanged => 1,
                Verdict::Changed => 2,
            },
            Reply::Gone(_) => 3,
            _ => return,
        };
        self.resumes[resumed].fetch_add(1, Relaxed);
    }

    /// Counts what a record says has ended.
    pub fn record(&self, record: &Record) {
        let Record::Tombstone(tombstone) = record else { return };
        match tombstone.reason {
            GoneReason::Evicted => self.evictions_total.fetch_add(1, Relaxed),
            GoneReason::ForceClosed => self.force_closes_total.fetch_add(1, Relaxed),
            GoneReason::FileLost => return,
        };
    }

    /// Counts a refusal.
    pub fn refused(&self, status: Status) {
        if let Some(count) = self.refused.get(usize::from(status.number())) {
            count.fetch_add(1, Relaxed);
        }
    }

    /// Shows what the authority has.
    pub fn show(&self, counts: Counts) {
        for (gauge, count) in [
            (&self.sessions, counts.sessions),
            (&self.opens, counts.opens),
            (&self.bindings, counts.bindings),
            (&self.fences, counts.fences),
            (&self.operations, counts.operations),
            (&self.claimed_files, counts.claimed_files),
            (&self.detached_opens, counts.detached),
            (&self.tombstones, counts.tombstones),
            (&self.locks, counts.locks),
            (&self.lock_waiters, counts.lock_waiters),
            (&self.waiting_opens, counts.contenders),
            (&self.lock_barriers, counts.barriers),
            (&self.waiting_for_journal, counts.held_effects),
        ] {
            gauge.store(count as u64, Relaxed);
        }
    }
}

/// Picks one gauge.
type Which = fn(&Gauges) -> &AtomicU64;

/// Counts one up for as long as it lives.
pub struct Held(Arc<Gauges>, Which);

impl Held {
    /// Counts one up.
    pub fn new(gauges: &Arc<Gauges>, which: Which) -> Self {
        which(gauges).fetch_add(1, Relaxed);
        Self(gauges.clone(), which)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        (self.1)(&self.0).fetch_sub(1, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_counted_is_shown() {
        let gauges = std::sync::Arc::new(Gauges::default());
        gauges.request(&Request::Ping);
        gauges.refused(Status::BadKey);
        let held = Held::new(&gauges, |g| &g.open_files);
        let shown = gauges.snapshot();
        assert_eq!((shown["requests_total.ping"], shown["refused_total.BadKey"]), (1, 1));
        assert_eq!(shown["open_files"], 1);
        drop(held);
        assert_eq!(gauges.snapshot()["open_files"], 0);
    }
}
