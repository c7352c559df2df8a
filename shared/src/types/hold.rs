//! How long a detached open is kept, and what its client is told when it comes back.

use minicbor::{Decode, Encode};

/// What protects a detached open against others.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default, Encode, Decode)]
#[cbor(index_only)]
pub enum HoldClass {
    /// Nobody gets in its way before the hold time is over; after that it is kept until somebody wants the file.
    #[default]
    #[n(0)]
    Hold,
    /// Kept until somebody wants the file, from the first moment.
    #[n(1)]
    Yield,
}

/// What a resume reports about an open that was kept.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Encode, Decode)]
#[cbor(index_only)]
pub enum Verdict {
    /// Within the hold time, and nobody else has changed the file since the open was detached. A guarantee.
    #[n(0)]
    Unchanged,
    /// The hold time was over, but nobody came, and nobody else has changed the file.
    #[n(1)]
    ExpiredUnchanged,
    /// The file was changed by somebody else, or it can't be known that it was not. The open and its locks were kept.
    #[n(2)]
    Changed,
}

/// Why an open is gone.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Encode, Decode)]
#[cbor(index_only)]
pub enum GoneReason {
    /// Its hold time was over (or its class was yield) and another client's request needed the file.
    #[n(0)]
    Evicted,
    /// The operator closed it.
    #[n(1)]
    ForceClosed,
    /// Its file could not be found again after a restart.
    #[n(2)]
    FileLost,
}

/// What a file looks like from outside, to see whether somebody changed it: equal evidence means that nothing was
/// written, as far as the file system's clock can tell (its tick is the one gap; see SEMANTICS).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default, Encode, Decode)]
pub struct Evidence {
    /// Time of the last change of anything (ctime), nanoseconds since 1970.
    #[n(0)]
    pub changed_ns: i64,
    /// Time of the last change of content (mtime), nanoseconds since 1970.
    #[n(1)]
    pub modified_ns: i64,
    /// Size, bytes.
    #[n(2)]
    pub size: u64,
}
