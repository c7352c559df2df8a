//! Safe wrapper round libibverbs and librdmacm, and the one memory module: the unsafe code of the data path.
//!
//! ```text
//! memory/   Memory ─► Pool ─► Buffer     exclusive bytes, never exposed to a peer: &mut [u8]
//!                  └► Region             bytes a peer may write at any time: copy in, copy out, file I/O
//!
//! Device ◄─ ProtectionDomain ◄─┬─ MemoryRegistration ◄─┐          ◄─ "holds an Arc to"
//!                              ├─ FileRegistration ─► FileMapping    a file's pages, for one peer to read
//!                              └─ Connection ──────────┴─ work requests in flight
//!                                   │ (queue pair, completion queue)
//!                                   └─ cm: one event channel and thread per process; Listener, Outgoing
//!
//! file_ring reads of files through io_uring, into the same pools
//!
//! gauges    what this process holds at the moment, for metrics, tests and leak hunts
//! ffi       the only place that sees rdma-sys
//! ```
//!
//! What holds everywhere here:
//!
//! * Parents outlive children by construction: a child holds an `Arc` to its parent.
//! * A posted work request owns its memory until its completion, or until its queue pair is destroyed; a file operation under
//!   way owns its own until its completion.
//! * Drop logs and never panics. What could not be taken from the device is leaked on purpose.
//! * Without an RDMA device [`Device::list`] is empty, and the memory module works all the same.
// The workspace denies unsafe code. It is allowed in this crate, and beside it only in `control/kernel`: talking to the device, mapping memory
// and handing that memory to the kernel can't be done without. Every block names the facts that make it sound.
#![allow(unsafe_code)]

pub mod cm;
mod cq;
mod device;
mod error;
mod exposed;
mod ffi;
pub mod file_ring;
pub mod gauges;
pub mod memory;
mod mr;
mod pd;
mod qp;
mod ring;
mod work;

pub use cm::{
    ConnectRequest, Connection, ConnectionConfig, Incoming, Listener, ListenerLimits,
    MAX_ACCEPT_PRIVATE_DATA, MAX_CONNECT_PRIVATE_DATA, Notify, Outgoing, Prepared,
};
pub use device::{Device, DeviceLimits, Gid, LinkLayer, Port};
pub use error::{ConnectFailure, VerbsError, memlock_limit};
pub use exposed::FileRegistration;
pub use gauges::{Gauges, gauges};
pub use mr::{Access, MemoryRegistration};
pub use pd::ProtectionDomain;
pub use qp::{ConnectionIdentity, QueueDepths};
pub use work::{Completion, CompletionKind, Local, Operation, Remote, Status, WorkRequest};

// What moves between threads: the callback's, a worker's, the caller's.
const _: () = {
    const fn is_send<T: Send>() {}
    is_send::<Connection>();
    is_send::<ConnectRequest>();
    is_send::<Incoming>();
    is_send::<Prepared>();
    is_send::<Listener>();
    is_send::<Completion>();
    is_send::<memory::Buffer>();
    const fn is_sync<T: Send + Sync>() {}
    is_sync::<MemoryRegistration>();
    is_sync::<memory::Pool>();
    is_sync::<memory::Region>();
};
