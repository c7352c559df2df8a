//! [`OpenOptions`]: what is asked when a file is opened.

use holdfast_shared::types::{Access, CreateId, Disposition, HoldClass, ProcessId, ShareMode};
use holdfast_shared::wire::control::{self, Place};
use std::time::Duration;

/// How to open a file.
///
/// ```
/// use holdfast_client::{HoldClass, OpenOptions, ShareMode};
/// use std::time::Duration;
/// let options = OpenOptions::create_new(0o640).share(ShareMode::READ).hold(Duration::from_secs(120));
/// let polite = OpenOptions::read().class(HoldClass::Yield).wait(Duration::from_secs(5));
/// # let _ = (options, polite);
/// ```
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct OpenOptions {
    access: Access,
    share: ShareMode,
    disposition: Disposition,
    mode: u32,
    hold: Option<Duration>,
    class: HoldClass,
    wait: Option<Duration>,
    delete_on_close: bool,
    process: Option<ProcessId>,
    create_id: Option<CreateId>,
}

impl OpenOptions {
    fn new(access: Access, disposition: Disposition, mode: u32) -> Self {
        Self {
            access,
            share: ShareMode::ALL,
            disposition,
            mode,
            hold: None,
            class: HoldClass::Hold,
            wait: None,
            delete_on_close: false,
            process: None,
            create_id: None,
        }
    }

    /// An existing file, to be read.
    pub fn read() -> Self {
        Self::new(Access::READ, Disposition::Open, 0)
    }

    /// An existing file, to be read and written.
    pub fn read_write() -> Self {
        Self::new(Access::READ | Access::WRITE, Disposition::Open, 0)
    }

    /// A file that must not exist yet, with these permission bits, to be read and written.
    pub fn create_new(mode: u32) -> Self {
        Self::new(Access::READ | Access::WRITE, Disposition::CreateNew, mode)
    }

    /// With this access instead.
    #[must_use]
    pub fn access(mut self, access: Access) -> Self {
        self.access = access;
        self
    }

    /// Lets others have only these rights while the open lives; the default denies nothing.
    #[must_use]
    pub fn share(mut self, share: ShareMode) -> Self {
        self.share = share;
        self
    }

    /// With this disposition instead; `mode` counts where a file is created.
    #[must_use]
    pub fn disposition(mut self, disposition: Disposition, mode: u32) -> Self {
        self.disposition = disposition;
        self.mode = mode;
        self
    }

    /// Asks for this hold time instead of the volume's default: for so long the open is kept against others when the
    /// client is away. Zero: the server closes it at once. The granted time is [`crate::Open::hold`].
    #[must_use]
    pub fn hold(mut self, hold: Duration) -> Self {
        self.hold = Some(hold);
        self
    }

    /// Keeps the open, while it is detached, against others (the default), or lets them have the file at once.
    #[must_use]
    pub fn class(mut self, class: HoldClass) -> Self {
        self.class = class;
        self
    }

    /// Waits so long for a detached open of another client that is in the way, instead of being refused as
    /// [`crate::Status::Busy`].
    #[must_use]
    pub fn wait(mut self, wait: Duration) -> Self {
        self.wait = Some(wait);
        self
    }

    /// Removes the name when the last open of the file is closed. Needs [`Access::DELETE`].
    #[must_use]
    pub fn delete_on_close(mut self, yes: bool) -> Self {
        self.delete_on_close = yes;
        self
    }

    /// Opens for this process of an application that serves several, instead of the one that runs: its locks are of this
    /// owner.
    #[must_use]
    pub fn process(mut self, process: ProcessId) -> Self {
        self.process = Some(process);
        self
    }

    /// Opens under this create id, instead of one of this request's own. For a program that stored it before it asked, and was
    /// ended before it stored the resume key: the same request under the same id gives the same open, and never a second
    /// one; it is taken from the session that has it, as by a superseding resume, but without a verdict. Other
    /// parameters are refused as [`crate::Status::DuplicateCreate`].
    #[must_use]
    pub fn create_id(mut self, id: CreateId) -> Self {
        self.create_id = Some(id);
        self
    }

    /// The id asked for.
    pub(super) fn wanted_create_id(&self) -> Option<CreateId> {
        self.create_id
    }

    /// How much longer than usual an answer may take.
    pub(super) fn longer(&self) -> Duration {
        self.wait.unwrap_or_default()
    }

    /// The request. One create id for one open, however often it is asked for.
    pub(super) fn request(&self, create_id: CreateId, place: &Place) -> control::Open {
        control::Open {
            create_id,
            place: place.clone(),
            access: self.access,
            share: self.share,
            disposition: self.disposition,
            mode: self.mode & 0o7777,
            hold_ms: self.hold.map(millis),
            class: self.class,
            wait_ms: self.wait.map(millis),
            delete_on_close: self.delete_on_close,
            process: self.process,
        }
    }
}

/// As it travels.
pub(super) fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
