//! The journal: what must outlive the server, as numbered records in files that never change but at their end.
//!
//! ```text
//!  append(seq, bytes) ... append ─► commit ─► one write, one sync ─► durable through seq
//!                                                │
//!      checkpoint: a new file, the whole state, an end mark; then the older files go
//!                                                │
//!  recover ◄── newest finished checkpoint and all after it, up to the last whole record
//! ```
//!
//! * [`layout`]: the bytes of the files. `segment`, `write`: the way out. `read`, `find`, `recover`: the way
//!   back.
//! * [`Disk`]: what it needs from a disk. With the feature `simulation`, [`sim`] is one that crashes, tears, forgets,
//!   flips bits and fills up.
//! * [`record`]: what the records say.
//!
//! Rules: a record that was committed is found again, or the start is refused and says which byte is wrong. What was
//! not committed is found again only as an unbroken run behind what was.

mod disk;
mod find;
pub mod layout;
mod read;
pub mod record;
mod recover;
mod segment;
#[cfg(any(test, feature = "simulation"))]
pub mod sim;
#[cfg(test)]
mod tests;
mod write;

pub use disk::{Disk, DiskError};
pub use find::RecoverError;
pub use layout::{PAYLOAD_BYTES_MAX, framed_bytes};
pub use recover::{Cut, Recovered, Recovery, Summary, recover};
pub use segment::{Options, RELEASE_RESERVE_BYTES};
pub use write::{Committed, Journal, PENDING_BYTES_MAX, Room, WriteError};
