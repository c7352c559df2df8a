//! The driver with a real journal and real files, without sockets and without a dataplane.

use super::*;
use crate::journal::{self, FileDisk, Settings};
use holdfast_shared::auth::{Keyring, MacPolicy, Secret, SessionKey};
use holdfast_shared::journal::{self as engine, PAYLOAD_BYTES_MAX};
use holdfast_shared::state::{Limits, LockMode, OpenState, Recovery, Right, VolumeRules};
use holdfast_shared::types::{
    Access, ClusterId, CreateId, Disposition, HoldClass, LockItem, LockKind, LockRange, ProcessId, ShareMode,
};
use holdfast_shared::wire::control::{Lock, Open, Opened, Place, Reply, Resume, Unlock};
use holdfast_shared::wire::from_cbor;
use std::path::Path;

const CLUSTER: ClusterId = ClusterId([3; 16]);
const VOLUME: VolumeId = VolumeId([1; 16]);
const PATIENCE: Duration = Duration::from_secs(20);

/// Reads a journal as a start does; its records must follow one another.
fn read(directory: &Path, settings: &Settings, generation: u64) -> (Recovery, engine::Recovery<FileDisk>) {
    let rules = VolumeRules {
        id: VOLUME,
        name: "data".into(),
        policy: MacPolicy::Header,
        grants: [("u".to_owned(), Right::ReadWrite)].into(),
        lock_mode: LockMode::Mandatory,
        hold_default_ms: 60_000,
        hold_max_ms: 600_000,
        local_descriptors: false,
        direct: false,
    };
    let keyring = Keyring::new(CLUSTER, 1, &Secret::new([4; 32]));
    let mut recovery = Recovery::new(Limits::default(), vec![rules], keyring, generation);
    let read = journal::recover(directory, CLUSTER, settings, &mut |record| {
        let decoded = from_cbor(record.payload, PAYLOAD_BYTES_MAX).map_err(|error| error.to_string())?;
        recovery.apply(decoded, record.in_checkpoint).map_err(|error| error.to_string())
    });
    (recovery, read.unwrap())
}

/// A running driver.
struct Running {
    events: mpsc::Sender<Event>,
    task: tokio::task::JoinHandle<anyhow::Result<()>>,
    gauges: Arc<Gauges>,
}

impl Running {
    /// On the journal and the volume in `directory`; the journal has told `early` before the driver begins.
    async fn start(directory: &Path, settings: &Settings, generation: u64, early: Vec<JournalEvent>) -> Self {
        let data = directory.join("data");
        std::fs::create_dir_all(&data).unwrap();
        let volume = Arc::new(Volume::open(&data).unwrap());
        let (recovery, read) = read(&directory.join("journal"), settings, generation);
        let last = read.summary().last_sequence;
        let (teller, journal_events) = mpsc::unbounded_channel();
        let journal = journal::start(read, generation, settings, teller).unwrap();
        let (authority, reopens) = recovery.finish(last);
        let gauges = Arc::new(Gauges::default());
        let hands = Hands {
            volumes: [(VOLUME, volume)].into(),
            gauges: gauges.clone(),
            store: None,
            journal: (journal, last),
            journal_early: early,
            journal_events,
        };
        let driver = tokio::task::spawn_blocking(move || {
            let sources = crate::boot::Sources {
                volumes: &hands.volumes,
                held: HashMap::new(),
                inherited: Vec::new(),
                store: None,
                descriptors_max: 1000,
                gauges: &hands.gauges,
            };
            let found = crate::boot::reopen(reopens, sources).unwrap();
            let (reopened, files) = (found.reopened, found.files);
            Driver::new(Recovered { authority, reopened, files, registered: None }, hands)
        });
        let driver = driver.await.unwrap();
        let (events, queue) = mpsc::channel(1024);
        Self { events, task: tokio::spawn(driver.run(queue)), gauges }
    }

    async fn session(&self, number: u8) -> Session {
        let mut session = self.begin(number.into()).await;
        assert!(matches!(session.answer().await, (0, Reply::Welcome(_))));
        session
    }

    /// A session that was not welcomed yet.
    async fn begin(&self, number: u64) -> Session {
        let (sender, answers) = mpsc::channel(10_000);
        let began = SessionBegan {
            session: SessionId::from_random(u128::from(number + 1).to_le_bytes()),
            request: 0,
            principal: "u".into(),
            key: SessionKey::new(Secret::new([7; 32])),
            process: ProcessId(7),
        };
        let session = Session { id: began.session, events: self.events.clone(), answers, last: 0 };
        let address = SocketAddr::from(([127, 0, 0, 1], 1));
        self.tell(Event::Begin(Box::new(began), address, sender)).await;
        session
    }

    async fn tell(&self, event: Event) {
        assert!(self.events.send(event).await.is_ok(), "the driver has ended");
    }

    async fn stop(self) {
        let (stopped, all_durable) = oneshot::channel();
        self.tell(Event::Stop(stopped)).await;
        tokio::time::timeout(PATIENCE, all_durable).await.unwrap().unwrap();
        self.task.await.unwrap().unwrap();
    }
}

/// A session, as its connection's task sees it.
struct Session {
    id: SessionId,
    events: mpsc::Sender<Event>,
    answers: mpsc::Receiver<Answer>,
    last: u64,
}

impl Session {
    async fn send(&mut self, request: Request) -> u64 {
        self.last += 1;
        let event = Event::Request(self.id, self.last, Box::new(request));
        assert!(self.events.send(event).await.is_ok(), "the driver has ended");
        self.last
    }

    async fn answer(&mut self) -> (u64, Reply) {
        match tokio::time::timeout(PATIENCE, self.answers.recv()).await.expect("an answer in time") {
            Some(Answer::Reply(reply)) => (reply.id, reply.reply),
            Some(Answer::End) | None => panic!("the session was ended"),
        }
    }

    async fn ask(&mut self, request: Request) -> Reply {
        let id = self.send(request).await;
        let (answered, reply) = self.answer().await;
        assert_eq!(answered, id);
        reply
    }

    async fn open(&mut self, number: u8) -> Opened {
        let open = Open {
            create_id: CreateId([number; 16]),
            place: Place { volume: "data".into(), path: format!("file{number}") },
            access: Access::READ | Access::WRITE,
            share: ShareMode::ALL,
            disposition: Disposition::OpenOrCreate,
            mode: 0o600,
            hold_ms: Some(60_000),
            class: HoldClass::Hold,
            wait_ms: None,
            delete_on_close: false,
            process: None,
        };
        match self.ask(Request::Open(open)).await {
            Reply::Opened(opened) => opened,
            other => panic!("not opened: {other:?}"),
        }
    }

    /// Resumes; `None` if there is no space for that.
    async fn resume(&mut self, opened: &Opened) -> Option<Opened> {
        self.send(resume(opened)).await;
        self.resumed(opened).await
    }

    /// The resume was asked for; it is again while the old session's end goes on.
    async fn resumed(&mut self, opened: &Opened) -> Option<Opened> {
        loop {
            match self.answer().await.1 {
                Reply::Resumed(resumed) => return Some(resumed.opened),
                Reply::Refused(refusal) if refusal.status == Status::NoSpace => return None,
                Reply::Refused(refusal) if refusal.status == Status::Busy => {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                    self.send(resume(opened)).await;
                }
                other => panic!("not resumed: {other:?}"),
            }
        }
    }
}

fn resume(opened: &Opened) -> Request {
    let resume_key = opened.key.resume_key.clone();
    Request::Resume(Resume { resume_key, supersede: None, keep: Vec::new() })
}

fn range(round: u64) -> LockRange {
    LockRange::new(round * 10, 10).unwrap()
}

/// Checkpoints are written all the time, in between locks, unlocks, lost sessions and resumes: what is written reads back, and
/// says what clients were told.
#[tokio::test(flavor = "multi_thread")]
async fn what_happens_during_a_checkpoint_is_told_once() {
    let directory = tempfile::tempdir().unwrap();
    // Due as soon as the journal has twice the length of the last checkpoint.
    let settings = Settings { sync: false, checkpoint_mib: 0 };
    let running = Running::start(directory.path(), &settings, 1, Vec::new()).await;
    let mut opens = Vec::new();
    for number in 0..100 {
        let mut session = running.begin(u64::from(number)).await;
        assert!(matches!(session.answer().await, (0, Reply::Welcome(_))));
        let opened = session.open(number).await;
        opens.push((session, opened));
    }
    const ROUNDS: u64 = 20;
    for round in 1..=ROUNDS {
        // Nothing is waited for, so that always something happens while a chunk is made.
        for (session, opened) in &mut opens {
            let (open, owner) = (opened.open, 1);
            let locks = vec![LockItem { range: range(round), kind: LockKind::Exclusive }];
            let lock = Lock { open, sequence: 2 * round, owner, locks, wait_ms: None };
            session.send(Request::Lock(lock)).await;
            if round > 1 {
                let unlock = Unlock { open, sequence: 2 * round + 1, owner, ranges: vec![range(round - 1)] };
                session.send(Request::Unlock(unlock)).await;
            }
            running.tell(Event::Lost(session.id)).await;
        }
        for (number, (session, opened)) in (round * 100..).zip(&mut opens) {
            *session = running.begin(number).await;
            session.send(resume(opened)).await;
        }
        for (session, opened) in &mut opens {
            assert!(matches!(session.answer().await, (0, Reply::Welcome(_))));
            *opened = session.resumed(opened).await.unwrap();
        }
    }
    let checkpoints = running.gauges.journal_checkpoints_total.load(Relaxed);
    assert!(checkpoints >= 5, "{checkpoints}");
    running.stop().await;

    let (recovery, read) = read(&directory.path().join("journal"), &settings, 2);
    let (authority, reopens) = recovery.finish(read.summary().last_sequence);
    assert_eq!(reopens.len(), opens.len());
    let views = authority.list_opens(Timestamp::default(), None, usize::MAX);
    for (_, opened) in &opens {
        let view = views.iter().find(|view| view.open == opened.open).unwrap();
        assert_eq!((view.state, view.epoch), (OpenState::Active, opened.epoch));
        let held: Vec<_> = view.locks.iter().map(|(owner, lock)| (*owner, lock.range)).collect();
        assert_eq!(held, [(1, range(ROUNDS))]);
    }
}

/// The journal says that its disk is full before it is told how the recorded files look.
#[tokio::test(flavor = "multi_thread")]
async fn crs_12_a_disk_that_is_full_from_the_start_keeps_no_open_from_its_client() {
    let directory = tempfile::tempdir().unwrap();
    let settings = Settings { sync: false, ..Settings::default() };
    let running = Running::start(directory.path(), &settings, 1, Vec::new()).await;
    let mut session = running.session(1).await;
    let (one, two) = (session.open(1).await, session.open(2).await);
    running.stop().await;

    let running = Running::start(directory.path(), &settings, 2, vec![JournalEvent::Room(false)]).await;
    let mut session = running.session(2).await;
    // A hold time runs, and so the opens wait for their client as after any crash.
    assert_eq!(running.gauges.snapshot()["detached_opens"], 2);
    assert_eq!(running.gauges.journal_full.load(Relaxed), 1);
    assert_eq!(session.resume(&one).await, None);
    running.stop().await;

    // And with room they are resumed and closed.
    let running = Running::start(directory.path(), &settings, 3, Vec::new()).await;
    let mut session = running.session(3).await;
    for opened in [&one, &two] {
        let opened = session.resume(opened).await.unwrap();
        assert_eq!(session.ask(Request::Close(opened.open)).await, Reply::Done);
        // What is not the session's is refused, and the session goes on.
        let again = session.ask(Request::Close(opened.open)).await;
        assert!(matches!(again, Reply::Refused(refusal) if refusal.status == Status::Closed));
    }
    assert_eq!(session.ask(Request::Ping).await, Reply::Done);
    running.stop().await;
}
