//! Two channels joined in memory, for tests: everything a device would do happens under one lock.
//!
//! ```text
//!   MemoryChannel ──submit──► Side.queue ──┐             ┌──► other side's posted Recv
//!                                          ├── Wire ─────┼──► other side's registered regions
//!   MemoryChannel ◄──poll──── Side.ready ◄─┘ (wire.rs)   └──► event descriptor of who has news
//! ```
//!
//! As with a device, the peer's processor has no part in Place and Fetch, and a Send waits until a Recv is posted.
//! [`Faults`] makes either side see what seldom happens by itself.

mod channel;
mod wire;

pub use channel::{MemoryChannel, pair};
pub use wire::Faults;
