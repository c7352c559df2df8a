//! The thread that writes, and the handle by which the driver feeds it.
//!
//! ```text
//!  append ─► queue ─► taken as a whole ─► append each ─► commit ─► room? Persisted(n), checkpoint due?
//!                                            │ disk full
//!                                            └► Room(false); what waits, waits until there is space
//! ```
//!
//! Numbers must not be missing, so a record that is in the queue is never dropped: it waits. What must be refused is
//! refused before it has a number, by [`Journal::append`].

use holdfast_shared::journal::{self as engine, Disk, Room, WriteError, framed_bytes};
use parking_lot::{Condvar, Mutex};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::mpsc::UnboundedSender;

/// Bytes of ordinary records that may be appended and not yet durable. Releasing records may take as much again.
pub const QUEUE_BYTES_MAX: usize = 1 << 20;
/// Bytes that are kept on the disk for records of an open that its client or its end makes: that it is detached, how its file
/// looked, that somebody else may have changed it, that it is closed, and the frames around them.
pub const RELEASE_BYTES_PER_OPEN: u64 = 256;
/// How often a full disk is asked whether it still is.
const RETRY: Duration = Duration::from_millis(100);
/// How long after a checkpoint that found no space the next is tried.
const CHECKPOINT_RETRY: Duration = Duration::from_secs(5);

/// What the journal tells the driver, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum JournalEvent {
    /// Every record up to this number is durable: what depends on them may be answered.
    Persisted(u64),
    /// Whether ordinary records are taken. It begins as true.
    Room(bool),
    /// A new file was begun. Append the whole state now, in between whatever else happens, and then call
    /// [`Journal::end_checkpoint`].
    CheckpointBegun,
    /// The checkpoint is durable, and older files are gone.
    CheckpointDone,
    /// The disk failed; in words. What was not reported as persisted may be lost, and nothing more is taken: the server
    /// must stop, since it can keep no promise.
    Failed(String),
}

/// What a record does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// It grants or begins something: refused when the disk is full.
    Ordinary,
    /// It gives something up, so it is taken out of the reserve when the disk is full.
    Releasing,
}

/// Why a record was not taken. Its number is still free.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AppendError {
    /// The disk is full; [`JournalEvent::Room`] tells when it no longer is.
    #[error("the journal's disk is full")]
    Full,
    /// Too much waits for the disk; the next [`JournalEvent::Persisted`] makes room.
    #[error("the journal's queue is full")]
    Busy,
    /// It is longer than a record may be.
    #[error("the record is too long")]
    TooLong,
    /// The disk failed before, as [`JournalEvent::Failed`] said.
    #[error("the journal has failed")]
    Failed,
}

enum Command {
    Append(u64, Vec<u8>),
    BeginCheckpoint,
    EndCheckpoint,
}

#[derive(Default)]
struct Queue {
    commands: Vec<Command>,
    /// Bytes of records that are appended and not durable.
    bytes: usize,
    /// See [`Journal::reserve_for`].
    opens: usize,
    full: bool,
    failed: bool,
    stop: bool,
}

#[derive(Default)]
struct Shared {
    queue: Mutex<Queue>,
    wake: Condvar,
}

/// The journal as the driver sees it. Dropped, it writes what is queued and stops.
pub struct Journal {
    shared: Arc<Shared>,
    /// See [`QUEUE_BYTES_MAX`].
    queue_bytes_max: usize,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl std::fmt::Debug for Journal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Journal").field("bytes", &self.shared.queue.lock().bytes).finish_non_exhaustive()
    }
}

impl Journal {
    pub(super) fn start<D>(
        engine: engine::Journal<D>,
        events: UnboundedSender<JournalEvent>,
        queue_bytes_max: usize,
    ) -> std::io::Result<Self>
    where
        D: Disk + Send + 'static,
        D::File: Send,
    {
        let shared = Arc::new(Shared::default());
        let reported = engine.committed();
        let mut writer = Writer {
            engine,
            shared: shared.clone(),
            events,
            reported,
            appended: 0,
            last_refused: None,
            wanted: false,
        };
        let thread = std::thread::Builder::new().name("journal".into()).spawn(move || writer.run())?;
        Ok(Self { shared, queue_bytes_max, thread: Some(thread) })
    }

    /// Queues a record; never blocks. Numbers rise by one, from one more than the last that was read back.
    ///
    /// # Errors
    /// See [`AppendError`].
    pub fn append(&self, sequence: u64, payload: Vec<u8>, kind: Kind) -> Result<(), AppendError> {
        if payload.len() > engine::PAYLOAD_BYTES_MAX {
            return Err(AppendError::TooLong);
        }
        let framed = framed_bytes(payload.len());
        let mut queue = self.shared.queue.lock();
        let limit = match kind {
            _ if queue.failed => return Err(AppendError::Failed),
            Kind::Ordinary if queue.full => return Err(AppendError::Full),
            Kind::Ordinary => self.queue_bytes_max,
            Kind::Releasing => 2 * self.queue_bytes_max,
        };
        if queue.bytes + framed > limit {
            return Err(AppendError::Busy);
        }
        queue.bytes += framed;
        self.push(queue, Command::Append(sequence, payload));
        Ok(())
    }

    /// Says how many opens there are: from the next write on, [`RELEASE_BYTES_PER_OPEN`] are kept for the end of each.
    pub fn reserve_for(&self, opens: usize) {
        self.shared.queue.lock().opens = opens;
    }

    /// Asks for a checkpoint now; one that is due begins by itself. [`JournalEvent::CheckpointBegun`] follows.
    pub fn begin_checkpoint(&self) {
        self.push(self.shared.queue.lock(), Command::BeginCheckpoint);
    }

    /// The whole state was appended since [`JournalEvent::CheckpointBegun`].
    pub fn end_checkpoint(&self) {
        self.push(self.shared.queue.lock(), Command::EndCheckpoint);
    }

    fn push(&self, mut queue: parking_lot::MutexGuard<'_, Queue>, command: Command) {
        queue.commands.push(command);
        drop(queue);
        self.shared.wake.notify_one();
    }

    /// Writes what is queued, and returns when it is durable or has failed. Blocks.
    pub fn stop(self) {
        drop(self);
    }
}

impl Drop for Journal {
    fn drop(&mut self) {
        self.shared.queue.lock().stop = true;
        self.shared.wake.notify_one();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the journal's thread has panicked");
        }
    }
}

struct Writer<D: Disk> {
    engine: engine::Journal<D>,
    shared: Arc<Shared>,
    events: UnboundedSender<JournalEvent>,
    /// The number of the last record that was reported as persisted.
    reported: u64,
    /// Bytes of records that the engine has and that are not durable.
    appended: usize,
    /// When a checkpoint found no space.
    last_refused: Option<Instant>,
    /// Somebody asked for a checkpoint.
    wanted: bool,
}

impl<D: Disk> Writer<D> {
    fn run(&mut self) {
        if let Err(error) = self.serve() {
            self.shared.queue.lock().failed = true;
            self.tell(JournalEvent::Failed(error.to_string()));
        }
    }

    /// The receiver may be gone while the server stops.
    fn tell(&self, event: JournalEvent) {
        let _ = self.events.send(event);
    }

    fn serve(&mut self) -> Result<(), WriteError> {
        self.settle()?;
        self.checkpoint_if_due()?;
        while let Some(commands) = self.next() {
            for command in commands {
                match command {
                    Command::Append(sequence, payload) => {
                        self.persevere(|engine| engine.append(sequence, &payload))?;
                        self.appended += framed_bytes(payload.len());
                    }
                    Command::BeginCheckpoint => self.wanted = true,
                    Command::EndCheckpoint => match self.persevere(engine::Journal::end_checkpoint) {
                        Err(WriteError::Checkpoint(state)) => {
                            tracing::error!("the end of a checkpoint was announced, but one is {state}");
                        }
                        done => done?,
                    },
                }
            }
            self.commit()?;
            self.checkpoint_if_due()?;
        }
        Ok(())
    }

    /// All that is queued; empty when it is time to ask a full disk again; none at the end.
    fn next(&self) -> Option<Vec<Command>> {
        let mut queue = self.shared.queue.lock();
        while queue.commands.is_empty() && !queue.stop {
            if queue.full || self.wanted {
                if self.shared.wake.wait_for(&mut queue, RETRY).timed_out() {
                    break;
                }
            } else {
                self.shared.wake.wait(&mut queue);
            }
        }
        let commands = std::mem::take(&mut queue.commands);
        (!commands.is_empty() || !queue.stop).then_some(commands)
    }

    /// Does something to the journal, and waits where the disk is full.
    fn persevere<T>(
        &mut self,
        mut act: impl FnMut(&mut engine::Journal<D>) -> Result<T, WriteError>,
    ) -> Result<T, WriteError> {
        loop {
            match act(&mut self.engine) {
                Err(WriteError::CommitFirst) => self.commit()?,
                Err(WriteError::Full) => {
                    self.room_is(false, 0);
                    // What was taken must not wait for what cannot be.
                    match self.engine.commit() {
                        Ok(committed) => self.committed(committed)?,
                        Err(WriteError::Full) => {}
                        Err(error) => return Err(error),
                    }
                    self.wait_for_space()?;
                }
                done => return done,
            }
        }
    }

    fn wait_for_space(&self) -> Result<(), WriteError> {
        let mut queue = self.shared.queue.lock();
        if queue.stop {
            return Err(WriteError::Full);
        }
        let until = Instant::now() + RETRY;
        while !queue.stop && !self.shared.wake.wait_until(&mut queue, until).timed_out() {}
        Ok(())
    }

    fn commit(&mut self) -> Result<(), WriteError> {
        // A full disk at a write is met by file systems that give new blocks each time; the same bytes are tried again.
        loop {
            match self.engine.commit() {
                Ok(committed) => return self.committed(committed),
                Err(WriteError::Full) => {
                    self.room_is(false, 0);
                    self.wait_for_space()?;
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Everything that the engine had is durable. The queue is lowered before that is told: who found it full waits for just that
    /// event, and tries again at once.
    fn committed(&mut self, committed: engine::Committed) -> Result<(), WriteError> {
        self.settle()?;
        if committed.through > self.reported {
            self.reported = committed.through;
            self.tell(JournalEvent::Persisted(committed.through));
        }
        if committed.checkpoint_done {
            self.tell(JournalEvent::CheckpointDone);
        }
        Ok(())
    }

    /// Takes what is durable out of the queue, and finds out whether there is room for more: in the same breath, so that never
    /// more ordinary records come than the reserve was made for.
    fn settle(&mut self) -> Result<(), WriteError> {
        let opens = u64::try_from(self.shared.queue.lock().opens).unwrap_or(u64::MAX);
        self.engine.set_reserve(super::reserve_bytes(opens));
        let room = self.engine.room()? == Room::Free;
        let durable = std::mem::take(&mut self.appended);
        self.room_is(room, durable);
        Ok(())
    }

    /// Takes note of whether there is room, of `bytes` that are durable, and tells of a change.
    fn room_is(&self, room: bool, bytes: usize) {
        let mut queue = self.shared.queue.lock();
        queue.bytes = queue.bytes.saturating_sub(bytes);
        let changed = queue.full == room;
        queue.full = !room;
        drop(queue);
        if changed {
            self.tell(JournalEvent::Room(room));
        }
    }

    fn checkpoint_if_due(&mut self) -> Result<(), WriteError> {
        let room = !self.shared.queue.lock().full;
        let patient = self.last_refused.is_some_and(|refused| refused.elapsed() < CHECKPOINT_RETRY);
        if room && !patient && (self.wanted || self.engine.should_checkpoint()) {
            match self.engine.begin_checkpoint() {
                Ok(()) => {
                    (self.wanted, self.last_refused) = (false, None);
                    self.tell(JournalEvent::CheckpointBegun);
                }
                Err(WriteError::Full) => self.last_refused = Some(Instant::now()),
                // One is under way: that is what was asked for.
                Err(WriteError::Checkpoint(_)) => self.wanted = false,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}
