//! The authority with a shell of paper: file system and dataplane are what the test says.

use crate::auth::{BindTranscript, ChannelIdentity, Keyring, MacPolicy, Secret, SessionKey};
use crate::journal::record::Record;
use crate::state::rules::{LockMode, Right, VolumeRules};
use crate::state::{
    Authority, Effect, FileIdentity, FileOpened, Fresh, Input, Inspected, Limits, OperationId, Recovery,
    Reopen, SessionBegan, Work,
};
use crate::types::{
    Access, ClusterId, CreateId, Disposition, Evidence, FileTime, HoldClass, LockItem, LockKind, LockRange,
    OpenId, ProcessId, SessionId, ShareMode, Status, Timestamp, VolumeId,
};
use crate::wire::control::{
    Attributes, FileKind, Lock, Open, Opened, Place, Reply, Request, Resume, Resumed, Unlock,
};
use crate::wire::link::{Fence, Grant, LinkBinding, Redeem};
use crate::wire::service::TransportKind;
use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

pub(super) const RW: Access = Access::READ.union(Access::WRITE);

pub(super) struct World {
    pub(super) authority: Authority,
    pub(super) now: Timestamp,
    pub(super) effects: Vec<Effect>,
    setup: (Limits, u8, LockMode),
    generation: u64,
    /// What the journal has.
    pub(super) journal: Vec<Record>,
    /// The disk is slow: records become durable when the test says so.
    pub(super) holds_journal: bool,
    /// How long files are.
    pub(super) size: u64,
    /// How files look; those that nobody changed look like nothing.
    pub(super) evidence: BTreeMap<u64, Evidence>,
    random: u64,
    pub(super) last_request: u64,
}

pub(super) fn volume(name: &str, id: u8, grants: &[(&str, Right)]) -> VolumeRules {
    let grants = grants.iter().map(|(principal, right)| ((*principal).to_owned(), *right)).collect();
    VolumeRules {
        id: VolumeId([id; 16]),
        name: name.into(),
        policy: MacPolicy::Header,
        grants,
        lock_mode: LockMode::Mandatory,
        hold_default_ms: 60_000,
        hold_max_ms: 600_000,
        local_descriptors: false,
        direct: false,
    }
}

pub(super) fn identity(inode: u64) -> FileIdentity {
    FileIdentity { device: 1, inode, generation: 0 }
}

pub(super) fn attributes(inode: u64) -> Attributes {
    let zero = FileTime { seconds: 0, nanos: 0 };
    Attributes {
        kind: FileKind::File,
        size: 0,
        allocated: 0,
        mode: 0o600,
        inode,
        links: 1,
        accessed: zero,
        modified: zero,
        changed: zero,
        uid: 0,
        gid: 0,
    }
}

pub(super) fn place(path: &str) -> Place {
    Place { volume: "data".into(), path: path.into() }
}

pub(super) fn open(create: u8, access: Access, share: ShareMode) -> Open {
    Open {
        create_id: CreateId([create; 16]),
        place: place("file"),
        access,
        share,
        disposition: Disposition::Open,
        mode: 0,
        hold_ms: Some(0),
        class: HoldClass::Hold,
        wait_ms: None,
        delete_on_close: false,
        process: None,
    }
}

pub(super) fn session_key(n: u8) -> SessionKey {
    SessionKey::new(Secret::new([n; 32]))
}

fn keyring(cluster: u8) -> Keyring {
    Keyring::new(ClusterId([cluster; 16]), 1, &Secret::new([cluster; 32]))
}

fn volumes(mode: LockMode) -> Vec<VolumeRules> {
    let data = volume("data", 1, &[("u1", Right::ReadWrite), ("u2", Right::ReadWrite), ("r", Right::Read)]);
    vec![VolumeRules { lock_mode: mode, ..data }, volume("other", 2, &[("u1", Right::ReadWrite)])]
}

impl World {
    pub(super) fn recovery(&self) -> Recovery {
        let (limits, cluster, mode) = self.setup;
        Recovery::new(limits, volumes(mode), keyring(cluster), self.generation + 1)
    }

    /// Both processes die, and control comes back with these records; what is to be opened again.
    pub(super) fn restart_from(&self, records: &[Record]) -> (Self, Vec<Reopen>) {
        let mut recovery = self.recovery();
        for record in records {
            recovery.apply(record.clone(), false).unwrap();
        }
        let (authority, reopens) = recovery.finish(records.len() as u64);
        let world = Self {
            authority,
            effects: Vec::new(),
            journal: records.to_vec(),
            holds_journal: false,
            evidence: self.evidence.clone(),
            generation: self.generation + 1,
            ..*self
        };
        (world, reopens)
    }

    pub(super) fn restart(&self) -> (Self, Vec<Reopen>) {
        self.restart_from(&self.journal)
    }

    fn reopen((mut world, reopens): (Self, Vec<Reopen>)) -> Self {
        for reopen in reopens {
            let evidence = world.evidence_of(reopen.identity.inode);
            let seen = Inspected { attributes: attributes(reopen.identity.inode), evidence };
            world.give(Input::Reopened { open: reopen.open, result: Ok(seen) });
        }
        world
    }

    /// Control dies and comes back, and has opened its files again.
    pub(super) fn crash(&self) -> Self {
        Self::reopen(self.restart())
    }

    /// The same, and no dataplane lives.
    pub(super) fn recover(&self) -> Self {
        self.recover_from(&self.journal)
    }

    pub(super) fn recover_from(&self, records: &[Record]) -> Self {
        let mut world = Self::reopen(self.restart_from(records));
        world.give(Input::LinkLost);
        world
    }

    pub(super) fn new() -> Self {
        Self::with(Limits::default(), 1)
    }

    pub(super) fn with(limits: Limits, cluster: u8) -> Self {
        Self::with_all(limits, cluster, LockMode::Mandatory)
    }

    pub(super) fn with_mode(mode: LockMode) -> Self {
        Self::with_all(Limits::default(), 1, mode)
    }

    fn with_all(limits: Limits, cluster: u8, mode: LockMode) -> Self {
        Self {
            authority: Authority::new(limits, volumes(mode), keyring(cluster)),
            setup: (limits, cluster, mode),
            generation: 0,
            now: Timestamp::default(),
            effects: Vec::new(),
            journal: Vec::new(),
            holds_journal: false,
            size: 0,
            evidence: BTreeMap::new(),
            random: 0,
            last_request: 0,
        }
    }

    pub(super) fn fresh(&mut self) -> Box<Fresh> {
        self.random += 1;
        let mut open = [0; 16];
        open[..8].copy_from_slice(&self.random.to_le_bytes());
        let mut challenge = [0x55; 32];
        challenge[..8].copy_from_slice(&self.random.to_le_bytes());
        let nonce = [0; 12];
        Box::new(Fresh { open, handle: open, challenge, nonce, secret_nonce: nonce, wall_ms: 1 })
    }

    pub(super) fn give(&mut self, input: Input) -> Vec<Effect> {
        let mut effects = std::mem::take(&mut self.effects);
        self.authority.handle(self.now, input, &mut effects);
        self.authority.check_invariants();
        self.write(effects)
    }

    /// Lets time pass, and everything be done that is due.
    pub(super) fn pass(&mut self, wait: Duration) -> Vec<Effect> {
        self.now = self.now.saturating_add(wait);
        let mut effects = Vec::new();
        while self.authority.poll_timeout().is_some_and(|due| due <= self.now) {
            self.authority.handle_timeout(self.now, &mut effects);
            self.authority.check_invariants();
        }
        self.write(effects)
    }

    /// Appends to the journal what is to be there, and says so unless the disk is slow.
    fn write(&mut self, effects: Vec<Effect>) -> Vec<Effect> {
        let (persist, mut effects): (Vec<Effect>, Vec<Effect>) =
            effects.into_iter().partition(|effect| matches!(effect, Effect::Persist { .. }));
        for effect in persist {
            let Effect::Persist { sequence, record, .. } = effect else { continue };
            assert_eq!(sequence, self.journal.len() as u64 + 1, "one after another");
            self.journal.push(*record);
        }
        if !self.holds_journal {
            effects.extend(self.sync());
        }
        effects
    }

    /// All that was written is durable.
    pub(super) fn sync(&mut self) -> Vec<Effect> {
        let mut effects = Vec::new();
        let durable = self.journal.len() as u64;
        self.authority.handle(self.now, Input::Persisted(durable), &mut effects);
        self.authority.check_invariants();
        effects
    }

    pub(super) fn opened(&self, inode: u64, created: bool) -> FileOpened {
        FileOpened {
            identity: identity(inode),
            attributes: Attributes { size: self.size, ..attributes(inode) },
            created,
            file_handle: vec![1, 2, 3],
            evidence: self.evidence_of(inode),
        }
    }

    pub(super) fn evidence_of(&self, inode: u64) -> Evidence {
        self.evidence.get(&inode).copied().unwrap_or_default()
    }

    /// Somebody changes a file.
    pub(super) fn touch(&mut self, inode: u64) {
        let evidence = self.evidence.entry(inode).or_default();
        evidence.changed_ns += 1;
    }

    /// Answers what is asked about files, as they are, until nothing more is asked; the other effects.
    pub(super) fn look(&mut self, effects: Vec<Effect>, inode: u64) -> Vec<Effect> {
        let mut others = Vec::new();
        let mut left = VecDeque::from(effects);
        while let Some(effect) = left.pop_front() {
            if let Effect::Inspect { operation, .. } | Effect::InspectLost { operation, .. } = effect {
                let evidence = self.evidence_of(inode);
                let seen = Inspected { attributes: attributes(inode), evidence };
                left.extend(self.give(Input::Inspected { operation, result: Ok(Some(seen)) }));
            } else {
                others.push(effect);
            }
        }
        others
    }

    /// A session is lost, and what is to be looked at is looked at.
    pub(super) fn lose(&mut self, session: SessionId, inode: u64) -> Vec<Effect> {
        let effects = self.give(Input::SessionLost(session));
        self.look(effects, inode)
    }

    pub(super) fn resume(&mut self, session: SessionId, opened: &Opened, inode: u64) -> Vec<Effect> {
        let effects = self.ask(session, resume(opened, None));
        self.look(effects, inode)
    }

    /// Session number `n` of a principal; its key is `session_key(n)`.
    pub(super) fn begin(&mut self, n: u8, principal: &str) -> SessionId {
        let session = SessionId([n; 16]);
        let effects = self.give(Input::SessionBegan(Box::new(SessionBegan {
            session,
            request: 0,
            principal: principal.into(),
            key: session_key(n),
            process: ProcessId(n.into()),
        })));
        assert!(matches!(&effects[..], [Effect::Reply { reply: Reply::Welcome(_), .. }]), "{effects:?}");
        session
    }

    pub(super) fn ask(&mut self, session: SessionId, request: Request) -> Vec<Effect> {
        self.last_request += 1;
        let (id, fresh) = (self.last_request, self.fresh());
        self.give(Input::Request { session, id, request, fresh })
    }

    /// The status a request is refused with at once.
    pub(super) fn refused(&mut self, session: SessionId, request: Request) -> Status {
        refusal(&self.ask(session, request))
    }

    /// Asks for an open and has the shell find the file `inode`.
    pub(super) fn try_open(&mut self, session: SessionId, request: Open, inode: u64) -> Vec<Effect> {
        let effects = self.ask(session, Request::Open(request));
        let [Effect::OpenFile { operation, .. }] = &effects[..] else { return effects };
        self.found(*operation, inode, false)
    }

    pub(super) fn found(&mut self, operation: OperationId, inode: u64, created: bool) -> Vec<Effect> {
        let opened = self.opened(inode, created);
        let mut effects = self.give(Input::FileOpened { operation, result: Ok(opened) });
        if let [Effect::Perform { operation, work: Work::SetAttributes(..) }] = &effects[..] {
            effects = self.performed(*operation, inode);
        }
        effects
    }

    pub(super) fn performed(&mut self, operation: OperationId, inode: u64) -> Vec<Effect> {
        self.give(Input::Performed { operation, result: Ok(Reply::Attributes(attributes(inode))) })
    }

    pub(super) fn open(&mut self, session: SessionId, request: Open, inode: u64) -> Opened {
        opened(&self.try_open(session, request, inode))
    }

    pub(super) fn redeem(&mut self, redeem: Redeem) -> Result<Grant, Status> {
        let fresh = self.fresh();
        let effects = self.give(Input::Redeem { redeem: Box::new(redeem), fresh });
        match &effects[..] {
            [Effect::Grant { grant, .. }] => Ok((**grant).clone()),
            [Effect::RefuseBind { status, .. }] => Err(*status),
            other => panic!("no answer to redeem: {other:?}"),
        }
    }

    /// A bind that is right in everything.
    pub(super) fn bind(&mut self, key: &SessionKey, opened: &Opened, nonce: u8) -> LinkBinding {
        self.redeem(right(key, opened, nonce, opened.access)).unwrap().binding
    }

    pub(super) fn confirm(&mut self, fence: Fence) -> Vec<Effect> {
        self.give(Input::Fenced(fence))
    }
}

/// What dataplane forwards for a client that does everything right.
pub(super) fn right(key: &SessionKey, opened: &Opened, nonce: u8, access: Access) -> Redeem {
    let channel = ChannelIdentity { transport: TransportKind::Memory, client: [1; 20], server: [2; 20] };
    let mut redeem = Redeem {
        id: 1,
        resume_key: opened.key.resume_key.clone(),
        client_challenge: [9; 32],
        server_nonce: [nonce; 32],
        proof: [0; 32],
        channel,
        access,
        policy: opened.key.policy,
        peer: String::new(),
    };
    prove(key, opened, &mut redeem);
    redeem
}

/// Makes the proof fit what the request says.
pub(super) fn prove(key: &SessionKey, opened: &Opened, redeem: &mut Redeem) {
    let digest = BindTranscript {
        channel: &redeem.channel,
        server_nonce: &redeem.server_nonce,
        open_challenge: &opened.key.challenge,
        client_challenge: &redeem.client_challenge,
        resume_key: &redeem.resume_key,
        volume: opened.key.volume,
        access: redeem.access,
        policy: redeem.policy,
    }
    .digest();
    redeem.proof = key.bind_secret(opened.open).client_proof(&digest);
}

pub(super) fn opened(effects: &[Effect]) -> Opened {
    match effects {
        [Effect::Reply { reply: Reply::Opened(opened), .. }] => opened.clone(),
        other => panic!("not opened: {other:?}"),
    }
}

/// The status of the only refusal among effects.
pub(super) fn refusal(effects: &[Effect]) -> Status {
    let mut refusals = effects.iter().filter_map(|effect| match effect {
        Effect::Reply { reply: Reply::Refused(refusal), .. } => Some(refusal.status),
        _ => None,
    });
    match (refusals.next(), refusals.next()) {
        (Some(status), None) => status,
        _ => panic!("not one refusal: {effects:?}"),
    }
}

pub(super) fn fences(effects: &[Effect]) -> Vec<Fence> {
    let fence = |effect: &Effect| match effect {
        Effect::Fence(fence) => Some(*fence),
        _ => None,
    };
    effects.iter().filter_map(fence).collect()
}

/// True if the effects end in closing the file and then telling that the open is closed.
pub(super) fn closes(effects: &[Effect]) -> bool {
    matches!(effects, [Effect::CloseFile(_), Effect::Reply { reply: Reply::Done, .. }])
}

pub(super) fn resume(opened: &Opened, supersede: Option<SessionId>) -> Request {
    let resume_key = opened.key.resume_key.clone();
    Request::Resume(Resume { resume_key, supersede, keep: Vec::new() })
}

/// An open that is held.
pub(super) fn held(create: u8, access: Access, share: ShareMode, hold_ms: u64) -> Open {
    Open { hold_ms: Some(hold_ms), ..open(create, access, share) }
}

/// An exclusive lock.
pub(super) fn lock(open: OpenId, sequence: u64, offset: u64, length: u64) -> Request {
    let range = LockRange::new(offset, length).unwrap();
    let locks = vec![LockItem { range, kind: LockKind::Exclusive }];
    Request::Lock(Lock { open, sequence, owner: 0, locks, wait_ms: None })
}

pub(super) fn unlock(open: OpenId, sequence: u64, offset: u64, length: u64) -> Request {
    let ranges = vec![LockRange::new(offset, length).unwrap()];
    Request::Unlock(Unlock { open, sequence, owner: 0, ranges })
}

/// True if the effects are that something is done, and nothing else.
pub(super) fn done(effects: &[Effect]) -> bool {
    matches!(effects, [Effect::Reply { reply: Reply::Done, .. }])
}

/// The one answer to a resume.
pub(super) fn resumed(effects: &[Effect]) -> Resumed {
    match effects {
        [Effect::Reply { reply: Reply::Resumed(resumed), .. }] => resumed.clone(),
        other => panic!("not resumed: {other:?}"),
    }
}

pub(super) fn close(open: OpenId) -> Request {
    Request::Close(open)
}
