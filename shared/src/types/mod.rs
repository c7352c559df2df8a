//! The nouns of Holdfast: ids, access and share modes, ranges, locks, region descriptors, status.

mod access;
mod hold;
mod ids;
mod limits;
mod lock;
mod path;
mod range;
mod region;
mod status;
mod time;

pub use access::{Access, Disposition, ShareMode, conflicts};
pub use hold::{Evidence, GoneReason, HoldClass, Verdict};
pub use ids::{BindingId, ClusterId, CreateId, HandleId, OpenId, ProcessId, SessionId, VolumeId};
pub use limits::*;
pub use lock::{IoRule, LockItem, LockKind, LockRange, LockRangeError, io_conflict, io_rules_ordered};
pub use path::{PathError, VolumePath};
pub use range::{ByteRange, RangeError};
pub use region::RegionDescriptor;
pub use status::Status;
pub use time::{FileTime, Timestamp};
