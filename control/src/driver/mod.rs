//! The one owner of the authority: takes events one at a time, performs what the authority wants done.
//!
//! It never blocks: file system work runs on blocking threads and comes back as events, records go to the journal's thread,
//! answers and link messages go into queues whose length is bounded by what may be under way.
//!
//! ```text
//!   sessions, link ──Event──►┐                      ┌─► answers (one queue a session)
//!   journal ──JournalEvent──►├─► Authority ─Effect─►├─► packets (link)
//!   blocking threads ─Done──►┘                      ├─► records (journal)
//!                                                   └─► blocking threads
//! ```

mod dataplane;
mod files;
mod operator;
mod records;
#[cfg(test)]
mod records_tests;
mod shrink;
#[cfg(test)]
mod tests;

use crate::errno::refusal;
use crate::gauges::Gauges;
use crate::journal::{Journal, JournalEvent, Kind};
use crate::link::{LinkPacket, Peer, Registration};
use crate::notify::Store;
use crate::volume::Volume;
use dataplane::{Link, Silent};
use files::Done;
use holdfast_shared::state::{Authority, Effect, FileId, Fresh, Input, Inspected, OperationId, SessionBegan};
use holdfast_shared::types::{OpenId, SessionId, Status, Timestamp, VolumeId};
use holdfast_shared::wire::control::{Refusal, ReplyMessage, Request};
use holdfast_shared::wire::link::{Gauge, RedeemResult, Redeemed, ToControl, ToDataplane};
use records::Records;
use shrink::Shrinking;
use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant, SystemTime};
use tokio::sync::{mpsc, oneshot};

pub use files::{HeldFile, OpenFile};

/// Exit code when the journal's disk has failed: no promise can be kept any more, and a supervisor starts us anew.
pub const EXIT_JOURNAL: i32 = 74;

/// Records that may wait for the journal while nobody is let in yet.
const RECORDS_WAITING_MAX: usize = 16_384;

/// What sessions, link and admin bring.
pub enum Event {
    /// A session begins, from that address; its answers go there.
    Begin(Box<SessionBegan>, SocketAddr, mpsc::Sender<Answer>),
    /// A session asks.
    Request(SessionId, u64, Box<Request>),
    /// A session's connection is gone.
    Lost(SessionId),
    /// A dataplane registers, on the link connection of that number.
    LinkBegin(u64, Box<Registration>, mpsc::UnboundedSender<LinkPacket>),
    /// It says something.
    LinkMessage(u64, ToControl),
    /// That connection has closed. The process behind it may live.
    LinkEnd(u64, Peer),
    /// No dataplane of an earlier control lives any more.
    EarlierDataplaneDead,
    /// Somebody wants dataplane's gauges.
    Gauges(oneshot::Sender<Vec<Gauge>>),
    /// The operator wants to see opens behind the one given, at most that many; and the next page's beginning.
    Opens(Option<OpenId>, usize, oneshot::Sender<serde_json::Value>),
    /// The same of sessions.
    Sessions(Option<SessionId>, usize, oneshot::Sender<serde_json::Value>),
    /// The operator ends an open. Whether it was there.
    ForceClose(OpenId, oneshot::Sender<bool>),
    /// Stop; nothing is closed. Tell when all that was promised is durable.
    Stop(oneshot::Sender<()>),
}

/// What a session's connection is to do.
pub enum Answer {
    /// Send this.
    Reply(Box<ReplyMessage>),
    /// Send what is queued, then end.
    End,
}

/// What was recovered before the driver runs.
pub struct Recovered {
    /// With every recorded open in it.
    pub authority: Authority,
    /// How each recorded file was found again.
    pub reopened: Vec<(OpenId, Result<Inspected, String>)>,
    /// The files, under the names that the authority gave them.
    pub files: HashMap<FileId, HeldFile>,
    /// The registration of the dataplane that lives, on the link connection of that number.
    pub registered: Option<(u64, Box<Registration>, mpsc::UnboundedSender<LinkPacket>)>,
}

/// What the driver works with.
pub struct Hands {
    /// The volumes.
    pub volumes: HashMap<VolumeId, Arc<Volume>>,
    /// Counters.
    pub gauges: Arc<Gauges>,
    /// The supervisor, if it keeps descriptors for us.
    pub store: Option<Store>,
    /// The journal, and the number of the last record in it.
    pub journal: (Journal, u64),
    /// What it has told already.
    pub journal_early: Vec<JournalEvent>,
    /// What it tells.
    pub journal_events: mpsc::UnboundedReceiver<JournalEvent>,
}

/// A session's connection.
struct Connection {
    answers: mpsc::Sender<Answer>,
    address: SocketAddr,
}

/// The driver.
pub struct Driver {
    authority: Authority,
    volumes: HashMap<VolumeId, Arc<Volume>>,
    gauges: Arc<Gauges>,
    store: Option<Store>,
    records: Records,
    start: Instant,
    sessions: HashMap<SessionId, Connection>,
    files: HashMap<FileId, HeldFile>,
    link: Option<Link>,
    /// The dataplane whose link has closed, while it may live.
    silent: Option<Silent>,
    /// Changes that take bytes away from files which may be mapped.
    shrinking: BTreeMap<OperationId, Shrinking>,
    last_withdraw: u64,
    done: mpsc::UnboundedSender<Done>,
    results: mpsc::UnboundedReceiver<Done>,
    journal_events: mpsc::UnboundedReceiver<JournalEvent>,
    effects: Vec<Effect>,
    stopping: Option<oneshot::Sender<()>>,
}

impl Driver {
    /// Tells the authority how the recorded files were found, and what the dataplane that lives has. Hold times count from
    /// now. Blocks while the journal has more to write than it should hold in memory.
    pub fn new(recovered: Recovered, hands: Hands) -> Self {
        let (done, results) = mpsc::unbounded_channel();
        let mut driver = Self {
            authority: recovered.authority,
            volumes: hands.volumes,
            gauges: hands.gauges,
            store: hands.store,
            records: Records::new(hands.journal.0, hands.journal.1),
            start: Instant::now(),
            sessions: HashMap::new(),
            files: recovered.files,
            link: None,
            silent: None,
            shrinking: BTreeMap::new(),
            last_withdraw: 0,
            done,
            results,
            journal_events: hands.journal_events,
            effects: Vec::new(),
            stopping: None,
        };
        // Until it is known which bindings live, the authority hears of nothing but files and what is durable: what else it
        // hears would settle what was recovered.
        driver.show_counts();
        let mut early = hands.journal_early;
        for (open, result) in recovered.reopened {
            driver.input(Input::Reopened { open, result });
            driver.perform_effects();
            driver.await_journal(Some(&mut early));
        }
        match recovered.registered {
            Some((id, registration, packets)) => driver.begin_link(id, *registration, packets),
            // None lives, so nothing of before is under way.
            None => driver.input(Input::LinkLost),
        }
        for event in early {
            driver.journal_event(event);
        }
        driver.perform_effects();
        driver.await_journal(None);
        driver.show_counts();
        driver
    }

    /// Waits until the journal has taken most of what is to be written. What else it tells is put into `early`, if given.
    fn await_journal(&mut self, mut early: Option<&mut Vec<JournalEvent>>) {
        while self.records.waiting() > RECORDS_WAITING_MAX {
            match (self.journal_events.blocking_recv(), &mut early) {
                (Some(event @ JournalEvent::Room(_)), Some(early)) => early.push(event),
                (Some(event), _) => self.journal_event(event),
                (None, _) => return,
            }
            self.perform_effects();
        }
    }

    /// Runs until it is stopped, or the events end.
    ///
    /// # Errors
    /// If the random number generator fails: then nothing may go on.
    pub async fn run(mut self, mut events: mpsc::Receiver<Event>) -> anyhow::Result<()> {
        loop {
            let due = self.authority.poll_timeout();
            let start = self.start;
            let alarm = async {
                match due {
                    Some(due) => {
                        tokio::time::sleep_until((start + Duration::from_nanos(due.as_nanos())).into()).await;
                    }
                    None => std::future::pending().await,
                }
            };
            let chunk = self.records.wants_chunk();
            tokio::select! {
                // What is under way ends before anything new begins.
                biased;
                Some(done) = self.results.recv() => self.finished(done),
                Some(event) = self.journal_events.recv() => self.journal_event(event),
                () = alarm => {
                    let now = self.now();
                    self.authority.handle_timeout(now, &mut self.effects);
                }
                event = events.recv() => match event {
                    Some(event) => self.event(event)?,
                    None => break,
                },
                // A checkpoint goes on behind each event, and while there is none.
                () = std::future::ready(()), if chunk => {}
            }
            self.perform_effects();
            // Behind the records of what has just happened: a chunk tells how things stand after that.
            if chunk {
                self.records.chunk(&self.authority, &self.gauges);
            }
            self.show_counts();
            if self.stopping.is_some() && self.records.idle() {
                break;
            }
        }
        let Self { records, stopping, .. } = self;
        // It joins its thread, which may be at a sync.
        let _ = tokio::task::spawn_blocking(move || drop(records)).await;
        if let Some(stopping) = stopping {
            let _ = stopping.send(());
        }
        Ok(())
    }

    fn show_counts(&self) {
        let counts = self.authority.counts();
        self.gauges.show(counts);
        self.records.reserve_for(counts.opens);
    }

    fn now(&self) -> Timestamp {
        Timestamp::from_nanos(u64::try_from(self.start.elapsed().as_nanos()).unwrap_or(u64::MAX))
    }

    fn input(&mut self, input: Input) {
        let now = self.now();
        self.authority.handle(now, input, &mut self.effects);
        // In debug builds every state is checked, as in tests and simulation, while that is quick.
        #[cfg(debug_assertions)]
        if self.authority.counts().opens <= 256 {
            self.authority.check_invariants();
        }
    }

    fn event(&mut self, event: Event) -> anyhow::Result<()> {
        if self.stopping.is_some() {
            // Nothing is begun any more. To clients it is as if we were gone already.
            return Ok(());
        }
        match event {
            Event::Begin(began, address, answers) => {
                self.sessions.insert(began.session, Connection { answers, address });
                self.input(Input::SessionBegan(began));
            }
            Event::Request(session, id, request) => {
                self.gauges.request(&request);
                self.input(Input::Request { session, id, request: *request, fresh: fresh()? });
            }
            Event::Lost(session) => {
                self.sessions.remove(&session);
                self.input(Input::SessionLost(session));
            }
            Event::LinkBegin(id, registration, packets) => self.begin_link(id, *registration, packets),
            Event::LinkMessage(id, message) => {
                if self.link.as_ref().is_some_and(|link| link.id == id) {
                    self.link_message(message)?;
                }
            }
            Event::LinkEnd(id, peer) => self.end_link(id, peer),
            // Whoever waited for that has seen it before we ran.
            Event::EarlierDataplaneDead => {}
            Event::Gauges(answer) => self.ask_gauges(answer),
            Event::Opens(after, max, answer) => drop(answer.send(self.show_opens(after, max))),
            Event::Sessions(after, max, answer) => drop(answer.send(self.show_sessions(after, max))),
            Event::ForceClose(open, answer) => {
                let there = self.find_open(open).is_some();
                if there {
                    tracing::warn!(%open, "the operator closes an open by force");
                    self.input(Input::ForceClose(open));
                }
                let _ = answer.send(there);
            }
            Event::Stop(stopped) => {
                self.stopping = Some(stopped);
                let sessions: Vec<SessionId> = self.sessions.keys().copied().collect();
                for session in sessions {
                    self.end_session(session);
                }
            }
        }
        Ok(())
    }

    fn journal_event(&mut self, event: JournalEvent) {
        match event {
            JournalEvent::Persisted(through) => {
                if let Some(sequence) = self.records.persisted(through, &self.gauges) {
                    self.input(Input::Persisted(sequence));
                }
            }
            JournalEvent::Room(room) => {
                if room {
                    tracing::warn!("the journal has room again: opens and locks are granted");
                } else {
                    tracing::error!(
                        "the journal's disk is full: opens and locks are refused until there is room"
                    );
                }
                self.gauges.journal_full.store(u64::from(!room), Relaxed);
                self.input(Input::JournalRoom(room));
            }
            JournalEvent::CheckpointBegun => self.records.checkpoint_begun(),
            JournalEvent::CheckpointDone => self.records.checkpoint_done(&self.gauges),
            JournalEvent::Failed(words) => {
                tracing::error!(
                    "the journal has failed: {words}. Nothing that is promised from now on would outlive a crash, so this \
                     process ends (exit code {EXIT_JOURNAL}); its next start reads what is on the disk"
                );
                std::process::exit(EXIT_JOURNAL);
            }
        }
    }

    fn finished(&mut self, done: Done) {
        match done {
            Done::DataplaneDied(id) => self.dataplane_died(id),
            Done::Input(input) => {
                if let Input::Performed { operation, .. } = &input {
                    self.performed(*operation);
                }
                self.input(input);
            }
            Done::Opened(operation, file, result) => {
                let result = result.map(|(opened, held)| {
                    self.files.insert(file, HeldFile::Open(held));
                    opened
                });
                self.input(Input::FileOpened { operation, result });
            }
            Done::Reopened(operation, file, result) => {
                let result = result.map(|found| {
                    found.map(|(held, inspected)| {
                        // Unless it was closed, or opened, meanwhile.
                        if let Some(place @ HeldFile::Named(_)) = self.files.get_mut(&file) {
                            *place = HeldFile::Open(held);
                        }
                        inspected
                    })
                });
                self.input(Input::Inspected { operation, result });
            }
        }
    }

    fn perform_effects(&mut self) {
        // Performing may bring inputs, and they more effects.
        while !self.effects.is_empty() {
            for effect in std::mem::take(&mut self.effects) {
                self.effect(effect);
            }
        }
    }

    fn effect(&mut self, effect: Effect) {
        match effect {
            Effect::Reply { session, id, reply } => {
                self.gauges.answer(&reply);
                self.answer(session, Answer::Reply(Box::new(ReplyMessage { id, reply })));
            }
            Effect::Disconnect(session) => self.end_session(session),
            Effect::OpenFile { operation, file, at, access, disposition, mode, follow } => {
                self.open_file(operation, file, at, move |volume, path| {
                    volume.open_file(path, access, disposition, mode, follow)
                });
            }
            Effect::CloseFile(file) => {
                // The last close of a removed file frees its blocks, which may take its time.
                if let Some(held) = self.files.remove(&file) {
                    tokio::task::spawn_blocking(move || drop(held));
                }
            }
            Effect::Resolve { operation, names } => self.resolve(operation, names),
            Effect::Perform { operation, work } => self.perform(operation, work),
            Effect::Grant { id, file, grant } => match self.fd(file) {
                Ok(fd) => {
                    tracing::debug!(open = %grant.open, handle = %grant.handle, "bind granted");
                    self.gauges.binds_granted_total.fetch_add(1, Relaxed);
                    let result = RedeemResult::Granted(grant);
                    self.to_dataplane(ToDataplane::Redeemed(Redeemed { id, result }), Some(fd));
                }
                Err(refusal) => {
                    tracing::error!(open = %grant.open, why = refusal.detail, "an open without a descriptor");
                    self.refuse_bind(id, refusal.status);
                    self.input(Input::Released(grant.binding));
                }
            },
            Effect::RefuseBind { id, status } => self.refuse_bind(id, status),
            Effect::Persist { sequence, record, releasing } => {
                let kind = if releasing { Kind::Releasing } else { Kind::Ordinary };
                self.gauges.record(&record);
                self.records.persist(sequence, &record, kind, &self.gauges);
            }
            Effect::Inspect { operation, file } => self.inspect(operation, file),
            Effect::InspectLost { operation, at, file_handle, identity } => {
                self.inspect_lost(operation, at, file_handle, identity);
            }
            Effect::Restrict(restrict) => self.to_dataplane(ToDataplane::Restrict(restrict), None),
            Effect::Fence(fence) => self.to_dataplane(ToDataplane::Fence(fence), None),
            Effect::FenceOverdue(binding) => {
                self.gauges.fences_overdue_total.fetch_add(1, Relaxed);
                tracing::error!(
                    binding = binding.0,
                    "dataplane has not confirmed a fence; its file stays claimed"
                );
            }
        }
    }

    fn answer(&mut self, session: SessionId, answer: Answer) {
        let Some(connection) = self.sessions.get(&session) else { return };
        // The queue holds one place for each request that may be under way, and one for the end.
        if connection.answers.try_send(answer).is_err() {
            self.sessions.remove(&session);
        }
    }

    fn end_session(&mut self, session: SessionId) {
        self.answer(session, Answer::End);
        self.sessions.remove(&session);
    }
}

fn internal() -> Refusal {
    refusal(Status::Internal, "")
}

/// Fresh randomness for one input.
fn fresh() -> anyhow::Result<Box<Fresh>> {
    let mut fresh = Fresh {
        open: [0; 16],
        handle: [0; 16],
        challenge: [0; 32],
        nonce: [0; 12],
        secret_nonce: [0; 12],
        wall_ms: wall_ms(),
    };
    let parts: [&mut [u8]; 5] =
        [&mut fresh.open, &mut fresh.handle, &mut fresh.challenge, &mut fresh.nonce, &mut fresh.secret_nonce];
    for part in parts {
        random(part)?;
    }
    Ok(Box::new(fresh))
}

/// Milliseconds since 1970.
pub(crate) fn wall_ms() -> u64 {
    let since_1970 = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since_1970.as_millis()).unwrap_or(u64::MAX)
}

/// Fills with randomness.
///
/// # Errors
/// If the generator fails.
pub(crate) fn random(bytes: &mut [u8]) -> anyhow::Result<()> {
    aws_lc_rs::rand::fill(bytes).map_err(|_| anyhow::anyhow!("the random number generator failed"))
}
