//! The control plane process: authenticates, opens files, issues resume keys, decides every conflict.
//!
//! It never sees a read or a write: there is no such request.
//!
//! ```text
//!  clients ─TLS─► accept ─► session ─┐            ┌─► volume   file system, on blocking threads
//!                                    ├─► driver ──┤
//!  dataplane ─Unix─► link ───────────┤  (owns the └─► link     grants with descriptors, fences
//!  operator ─Unix─► admin ───────────┘  Authority)└─► journal  what must outlive us, on its own thread
//! ```
//!
//! Before the first client is let in, [`boot`] brings back what the [`journal`] knows.
//!
//! One task, [`driver`], owns the authority and everything it decides about; all others bring it events and
//! perform what it wants done. Data flows one way round, and no lock guards any state.

#![forbid(unsafe_code)]

pub mod accept;
pub mod admin;
pub mod boot;
pub mod config;
mod direct;
pub mod driver;
mod errno;
pub mod gauges;
pub mod generation;
mod half_open;
pub mod journal;
pub mod link;
pub mod notify;
pub mod secrets;
pub mod server;
pub mod session;
mod throttle;
pub mod tls;
pub mod volume;

pub use errno::status_of;
