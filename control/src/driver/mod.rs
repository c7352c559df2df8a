//! The one owner of the authority: takes events one at a time, performs what the authority wants done.
//!
//! It never blocks: file system work runs on blocking threads and comes back as events, answers and link messages go into
//! queues whose length is bounded by what may be under way.
//!
//! ```text
//!   sessions, link ──Event──►┐                      ┌─► answers (one queue a session)
//!                            ├─► Authority ─Effect─►├─► packets (link)
//!   blocking threads ─Done──►┘                      └─► blocking threads
//! ```

mod dataplane;
mod files;

use crate::errno::refusal;
use crate::gauges::Gauges;
use crate::link::{LinkPacket, Peer};
use crate::volume::Volume;
use dataplane::{Link, Silent};
use files::{Done, HeldFile};
use holdfast_shared::state::{Authority, Effect, FileId, Fresh, Input, SessionBegan};
use holdfast_shared::types::{SessionId, Status, Timestamp, VolumeId};
use holdfast_shared::wire::control::{Refusal, ReplyMessage, Request};
use holdfast_shared::wire::link::{Gauge, RedeemResult, Redeemed, Register, ToControl, ToDataplane};
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant, SystemTime};
use tokio::sync::{mpsc, oneshot};

/// What sessions, link and admin bring.
pub enum Event {
    /// A session begins; its answers go there.
    Begin(Box<SessionBegan>, mpsc::Sender<Answer>),
    /// A session asks.
    Request(SessionId, u64, Box<Request>),
    /// A session's connection is gone.
    Lost(SessionId),
    /// A dataplane registers, on the link connection of that number.
    LinkBegin(u64, Register, mpsc::UnboundedSender<LinkPacket>),
    /// It says something.
    LinkMessage(u64, ToControl),
    /// That connection has closed. The process behind it may live.
    LinkEnd(u64, Peer),
    /// No dataplane of an earlier control lives any more.
    EarlierDataplaneDead,
    /// Somebody wants dataplane's gauges.
    Gauges(oneshot::Sender<Vec<Gauge>>),
    /// Close everything; tell when it is done.
    Stop(oneshot::Sender<()>),
}

/// What a session's connection is to do.
pub enum Answer {
    /// Send this.
    Reply(Box<ReplyMessage>),
    /// Send what is queued, then end.
    End,
}

/// The driver.
pub struct Driver {
    authority: Authority,
    volumes: HashMap<VolumeId, Arc<Volume>>,
    gauges: Arc<Gauges>,
    start: Instant,
    sessions: HashMap<SessionId, mpsc::Sender<Answer>>,
    files: HashMap<FileId, HeldFile>,
    link: Option<Link>,
    /// The dataplane whose link has closed, while it may live.
    silent: Option<Silent>,
    /// A dataplane of an earlier control may live, and has not registered with us.
    earlier: bool,
    done: mpsc::UnboundedSender<Done>,
    effects: Vec<Effect>,
    stopping: Option<oneshot::Sender<()>>,
}

impl Driver {
    /// Runs until the events end. If a dataplane of an earlier control may live, nothing is opened before it has
    /// registered or [`Event::EarlierDataplaneDead`] has come.
    ///
    /// # Errors
    /// If the random number generator fails: then nothing may go on.
    pub async fn run(
        authority: Authority,
        volumes: HashMap<VolumeId, Arc<Volume>>,
        gauges: Arc<Gauges>,
        dataplane_may_live: bool,
        mut events: mpsc::Receiver<Event>,
    ) -> anyhow::Result<()> {
        let (done, mut results) = mpsc::unbounded_channel();
        let mut driver = Self {
            authority,
            volumes,
            gauges,
            start: Instant::now(),
            sessions: HashMap::new(),
            files: HashMap::new(),
            link: None,
            silent: None,
            earlier: false,
            done,
            effects: Vec::new(),
            stopping: None,
        };
        if dataplane_may_live {
            driver.earlier_dataplane_lives();
        }
        loop {
            let due = driver.authority.poll_timeout();
            let alarm = async {
                match due {
                    Some(due) => {
                        let at = driver.start + Duration::from_nanos(due.as_nanos());
                        tokio::time::sleep_until(at.into()).await;
                    }
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                // What is under way ends before anything new begins.
                biased;
                Some(done) = results.recv() => driver.finished(done),
                () = alarm => {
                    let now = driver.now();
                    driver.authority.handle_timeout(now, &mut driver.effects);
                }
                event = events.recv() => match event {
                    Some(event) => driver.event(event)?,
                    None => return Ok(()),
                },
            }
            driver.perform_effects();
            driver.gauges.show(driver.authority.counts());
            driver.stopped();
        }
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
        match event {
            Event::Begin(began, answers) => {
                self.sessions.insert(began.session, answers);
                if self.stopping.is_some() {
                    self.end_session(began.session);
                } else {
                    self.input(Input::SessionBegan(began));
                }
            }
            Event::Request(session, id, request) => {
                self.gauges.request(&request);
                self.input(Input::Request { session, id, request: *request, fresh: fresh()? });
            }
            Event::Lost(session) => {
                self.sessions.remove(&session);
                self.input(Input::SessionLost(session));
            }
            Event::LinkBegin(id, register, packets) => self.begin_link(id, register, packets),
            Event::LinkMessage(id, message) => {
                if self.link.as_ref().is_some_and(|link| link.id == id) {
                    self.link_message(message)?;
                }
            }
            Event::LinkEnd(id, peer) => self.end_link(id, peer),
            Event::EarlierDataplaneDead => self.earlier_dataplane_dead(),
            Event::Gauges(answer) => self.ask_gauges(answer),
            Event::Stop(stopped) => {
                self.stopping = Some(stopped);
                let sessions: Vec<SessionId> = self.sessions.keys().copied().collect();
                for session in sessions {
                    self.end_session(session);
                    self.input(Input::SessionLost(session));
                }
            }
        }
        Ok(())
    }

    /// When stopping: tells that nothing is left.
    fn stopped(&mut self) {
        let counts = self.authority.counts();
        if counts.opens == 0 && counts.operations == 0 {
            if let Some(stopping) = self.stopping.take() {
                let _ = stopping.send(());
            }
        }
    }

    fn finished(&mut self, done: Done) {
        match done {
            Done::DataplaneDied(id) => self.dataplane_died(id),
            Done::Input(input) => self.input(input),
            Done::Opened(operation, file, result) => {
                let result = result.map(|(opened, held)| {
                    self.files.insert(file, held);
                    opened
                });
                self.input(Input::FileOpened { operation, result });
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
            Effect::Perform { operation, work } => self.work(operation, work),
            Effect::Grant { id, file, grant } => {
                let fd = self.files.get(&file).map(|held| held.fd.clone());
                match fd {
                    Some(fd) => {
                        tracing::debug!(open = %grant.open, handle = %grant.handle, "bind granted");
                        self.gauges.binds_granted_total.fetch_add(1, Relaxed);
                        let result = RedeemResult::Granted(grant);
                        self.to_dataplane(ToDataplane::Redeemed(Redeemed { id, result }), Some(fd));
                    }
                    None => {
                        tracing::error!(open = %grant.open, "an open without a descriptor");
                        self.refuse_bind(id, Status::Internal);
                        self.input(Input::Released(grant.binding));
                    }
                }
            }
            Effect::RefuseBind { id, status } => self.refuse_bind(id, status),
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
        let Some(answers) = self.sessions.get(&session) else { return };
        // The queue holds one place for each request that may be under way, and one for the end.
        if answers.try_send(answer).is_err() {
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
    let mut fresh = Fresh { open: [0; 16], handle: [0; 16], challenge: [0; 32], nonce: [0; 12], wall_ms: 0 };
    let parts: [&mut [u8]; 4] = [&mut fresh.open, &mut fresh.handle, &mut fresh.challenge, &mut fresh.nonce];
    for part in parts {
        random(part)?;
    }
    let since_1970 = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    fresh.wall_ms = u64::try_from(since_1970.as_millis()).unwrap_or(u64::MAX);
    Ok(Box::new(fresh))
}

/// Fills with randomness.
///
/// # Errors
/// If the generator fails.
pub(crate) fn random(bytes: &mut [u8]) -> anyhow::Result<()> {
    aws_lc_rs::rand::fill(bytes).map_err(|_| anyhow::anyhow!("the random number generator failed"))
}
