//! A control in memory.

use holdfast_dataplane::engine::{ControlPort, Engine, Redemption, Ticket};
use holdfast_shared::auth::{BindAnswer, BindSecret, BindTranscript, MacPolicy, Secret};
use holdfast_shared::types::{Access, HandleId, IoRule, OpenId, Status, VolumeId};
use holdfast_shared::wire::link::{Fence, Grant, LinkBinding, Redeem, RedeemResult, Restricted};
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, Weak};

/// An open that control knows.
#[derive(Clone)]
pub struct Open {
    pub key: Vec<u8>,
    pub secret: BindSecret,
    pub challenge: [u8; 32],
    pub volume: VolumeId,
    pub id: OpenId,
    pub access: Access,
    pub policy: MacPolicy,
    pub file: Arc<File>,
}

impl Open {
    /// When the file was last changed, as the kernel says: nanoseconds since 1970.
    pub fn changed_ns(&self) -> u64 {
        use std::os::unix::fs::MetadataExt;
        let meta = self.file.metadata().unwrap();
        u64::try_from(meta.ctime() * 1_000_000_000 + meta.ctime_nsec()).unwrap()
    }

    /// What both sides of a bind have seen, if its proof is right.
    pub fn proven(&self, redeem: &Redeem) -> Option<[u8; 32]> {
        let transcript = BindTranscript {
            channel: &redeem.channel,
            server_nonce: &redeem.server_nonce,
            open_challenge: &self.challenge,
            client_challenge: &redeem.client_challenge,
            resume_key: &redeem.resume_key,
            volume: self.volume,
            access: redeem.access,
            policy: redeem.policy,
        }
        .digest();
        self.secret.client_proof_is_right(&transcript, &redeem.proof).then_some(transcript)
    }

    /// What control grants for a proven bind, without any rules.
    pub fn grant(
        &self,
        redeem: &Redeem,
        transcript: [u8; 32],
        binding: LinkBinding,
        handle: HandleId,
        epoch: u64,
    ) -> Grant {
        let (access, policy) = (redeem.access, self.policy);
        let answer = BindAnswer { handle, epoch, access, policy }.digest(&transcript);
        Grant {
            binding,
            open: self.id,
            handle,
            epoch,
            access,
            policy,
            proof: self.secret.server_proof(&answer),
            keys: self.secret.channel_keys(&answer),
            rules: Vec::new(),
            rules_version: 0,
            transcript,
            descriptor: access == Access::READ,
            direct: false,
        }
    }

    pub fn content(&self) -> Vec<u8> {
        use std::os::unix::fs::FileExt;
        let mut data = vec![0; usize::try_from(self.file.metadata().unwrap().len()).unwrap()];
        self.file.read_exact_at(&mut data, 0).unwrap();
        data
    }
}

/// What the engine told control.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Told {
    Fenced(Fence),
    Released(LinkBinding),
    Restricted(Restricted),
    Withdrawn(u64),
}

/// Another description of the same file, for direct I/O; `None` where the file system has none.
pub fn past_the_page_cache(file: &OwnedFd) -> Option<OwnedFd> {
    use std::os::unix::fs::OpenOptionsExt;
    let flags = i32::try_from(rustix::fs::OFlags::DIRECT.bits()).unwrap();
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    Some(File::options().read(true).write(true).custom_flags(flags).open(path).ok()?.into())
}

pub struct FakeControl {
    /// The volume is one of direct I/O.
    pub direct: AtomicBool,
    engine: OnceLock<Weak<Engine>>,
    opens: Mutex<Vec<Open>>,
    told: Mutex<Vec<Told>>,
    granted: Mutex<Vec<LinkBinding>>,
    next: AtomicU64,
    /// What grants say of rules, and their version.
    pub rules: Mutex<(u64, Vec<IoRule>)>,
    /// Answers are kept back, for [`FakeControl::kept`].
    pub keeping: AtomicBool,
    kept: Mutex<Vec<Redemption>>,
    pub away: AtomicBool,
    /// Binds are left unanswered.
    pub silent: AtomicBool,
}

impl FakeControl {
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            engine: OnceLock::new(),
            opens: Mutex::default(),
            told: Mutex::default(),
            granted: Mutex::default(),
            next: AtomicU64::new(1),
            rules: Mutex::default(),
            keeping: AtomicBool::new(false),
            kept: Mutex::default(),
            away: AtomicBool::new(false),
            direct: AtomicBool::new(false),
            silent: AtomicBool::new(false),
        })
    }

    pub fn attach(&self, engine: &Arc<Engine>) {
        self.engine.set(Arc::downgrade(engine)).unwrap();
    }

    pub fn open(&self, content: &[u8], access: Access, policy: MacPolicy) -> Open {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(content).unwrap();
        self.open_file(file, access, policy)
    }

    pub fn open_file(&self, file: File, access: Access, policy: MacPolicy) -> Open {
        let n = self.next.fetch_add(1, Ordering::Relaxed);
        let mark = u8::try_from(n).unwrap();
        let open = Open {
            key: format!("resume key {n}").into_bytes(),
            secret: BindSecret::new(Secret::new([mark; 32])),
            challenge: [mark ^ 0xff; 32],
            volume: VolumeId([1; 16]),
            id: OpenId([mark; 16]),
            access,
            policy,
            file: Arc::new(file),
        };
        self.opens.lock().unwrap().push(open.clone());
        open
    }

    /// The newest binding granted.
    pub fn last(&self) -> LinkBinding {
        *self.granted.lock().unwrap().last().unwrap()
    }

    pub fn told(&self) -> Vec<Told> {
        self.told.lock().unwrap().clone()
    }

    /// Answers that were kept back.
    pub fn kept(&self) -> Vec<Redemption> {
        std::mem::take(&mut *self.kept.lock().unwrap())
    }

    /// Every binding granted was given back, once.
    pub fn all_released(&self) -> bool {
        let mut back: Vec<_> = self
            .told()
            .iter()
            .filter_map(|told| match told {
                Told::Fenced(fence) => Some(fence.binding),
                Told::Released(binding) => Some(*binding),
                Told::Restricted(_) | Told::Withdrawn(_) => None,
            })
            .collect();
        let mut granted = self.granted.lock().unwrap().clone();
        back.sort_unstable();
        granted.sort_unstable();
        back == granted
    }

    fn judge(&self, redeem: &Redeem) -> (RedeemResult, Option<OwnedFd>) {
        let opens = self.opens.lock().unwrap();
        let refused = |status| (RedeemResult::Refused(status), None);
        let Some(open) = opens.iter().find(|open| open.key == redeem.resume_key) else {
            return refused(Status::BadKey);
        };
        let Some(transcript) = open.proven(redeem).filter(|_| redeem.policy == open.policy) else {
            return refused(Status::BadKey);
        };
        if !open.access.contains(redeem.access) {
            return refused(Status::AccessDenied);
        }
        let n = self.next.fetch_add(1, Ordering::Relaxed);
        let handle = HandleId([u8::try_from(n & 0xff).unwrap(); 16]);
        let binding = LinkBinding(n);
        self.granted.lock().unwrap().push(binding);
        let (rules_version, rules) = self.rules.lock().unwrap().clone();
        let grant = Grant { rules_version, rules, ..open.grant(redeem, transcript, binding, handle, 5) };
        (RedeemResult::Granted(Box::new(grant)), Some(open.file.try_clone().unwrap().into()))
    }
}

impl ControlPort for FakeControl {
    fn redeem(&self, ticket: Ticket, redeem: Redeem) -> Result<(), Status> {
        if self.away.load(Ordering::SeqCst) {
            return Err(Status::Unavailable);
        }
        if self.silent.load(Ordering::SeqCst) {
            return Ok(());
        }
        let (mut result, fd) = self.judge(&redeem);
        let mut direct = None;
        if let (RedeemResult::Granted(grant), true) = (&mut result, self.direct.load(Ordering::SeqCst)) {
            grant.direct = true;
            direct = fd.as_ref().and_then(past_the_page_cache);
        }
        let redemption = Redemption { ticket, result, fd, direct };
        if self.keeping.load(Ordering::SeqCst) {
            self.kept.lock().unwrap().push(redemption);
        } else if let Some(engine) = self.engine.get().and_then(Weak::upgrade) {
            engine.redeemed(redemption);
        }
        Ok(())
    }

    fn fenced(&self, fence: Fence) {
        self.told.lock().unwrap().push(Told::Fenced(fence));
    }

    fn released(&self, binding: LinkBinding) {
        self.told.lock().unwrap().push(Told::Released(binding));
    }

    fn restricted(&self, restricted: Restricted) {
        self.told.lock().unwrap().push(Told::Restricted(restricted));
    }

    fn withdrawn(&self, id: u64) {
        self.told.lock().unwrap().push(Told::Withdrawn(id));
    }
}
