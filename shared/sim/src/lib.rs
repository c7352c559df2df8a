//! A seeded, deterministic simulator: the authority and the journal that ship, in a world that crashes, loses, delays and
//! reorders; and an oracle that knows what was promised. Nothing depends on it, and it is never shipped.
//!
//! ```text
//!  seed ─► setting, world ─► steps with faults ─► peace ─► everything is empty
//!                                │ each step
//!                                └► oracle: was a promise broken?  ─► seed, step, the last events
//! ```
//!
//! * [`run`]: one seed. `ci/sim` runs many, or shows one.
//! * [`Setting`]: what goes wrong, and which rule is broken on purpose to see that the oracle bites.
//! * [`races`], [`explore`]: two that race, over many seeds; and all orders of a small world.

mod client;
pub mod explore;
mod files;
mod net;
mod oracle;
mod plane;
pub mod races;
mod rng;
mod run;
mod setting;
mod shell;
mod trace;
mod world;

pub use run::{Done, Failure, run, run_with, trace};
pub use setting::{Broken, Setting};
