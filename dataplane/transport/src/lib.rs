//! One small trait over verbs, tcp, local sockets and memory: Send, Recv, Place, Fetch on registered memory.
//!
//! ```text
//!              submit(token, operation)                   poll()
//!   owner ───────────────────────────► Channel ───────────────────────► Completion{token, buffer, outcome}
//!                                        │ ▲
//!                                  wire  ▼ │  wake descriptor: edge triggered
//! ```
//!
//! * An operation owns its buffer from `submit` until its completion hands it back. Every operation that was
//!   accepted gets exactly one completion, also when the channel dies.
//! * Nothing blocks and nothing happens behind the owner's back: work is done in `submit` and `poll` only.
//! * The peer's memory is named by a [`RegionDescriptor`]; the local side of Place and Fetch is a pool buffer.
//! * A Place or Fetch of no bytes succeeds and reaches no memory; a Send of no bytes is a message.
//! * Operations on one channel take effect at the peer in the order they were submitted, except that a Fetch
//!   may be overtaken by what follows it. A Send after a Place is received only once the placed bytes are there.
//!
//! To wait without spinning: register the wake descriptor once, edge triggered, for reading and writing; `poll`
//! until it yields nothing; `arm`; sleep only if that says [`Armed::Idle`].

mod admission;
mod channel;
pub mod local;
pub mod memory;
mod region_table;
mod spin;
mod stopper;
pub mod stream;
pub mod tcp;
pub mod verbs;

pub use channel::{
    Armed, Capabilities, Channel, ChannelError, Completion, FilePart, Kind, Listener, Operation,
    OperationError, Placed, Registrar, Registration, Rejected, RemoteAccess, Setup, SubmitError, ViewPlaced,
};
pub use holdfast_shared::types::RegionDescriptor;
pub use spin::Spin;
