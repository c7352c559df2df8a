//! The Holdfast client library.
//!
//! ```text
//!   Config ─► Session ─ open ─► Open ─ bind on a DataChannel ─► Binding ─ read_at / write_at ─► Region
//!             (TLS, control)    (resume key, challenge)         (verbs or tcp)            (registered memory)
//! ```
//!
//! * A [`Session`] is one authenticated control connection. Files are named, opened and described there.
//! * An [`Open`] is the server's object: one granted access to one file.
//! * A file's bytes never pass through the control connection.
//! * When a process of the server dies, or the network, the session and the bindings come back by themselves, and requests
//!   under way are made again where that is safe. What cannot be made good is an error or an [`Event`], never silence.

mod bind;
mod binding;
mod channel;
mod claim;
mod config;
mod endpoint;
mod error;
mod handed;
mod hot;
mod mapping;
mod open;
mod recovery;
mod region;
mod requests;
#[cfg(test)]
mod scripted;
mod session;
pub mod stream;
mod stripe;
mod tls;

pub use binding::Binding;
pub use channel::{DataChannel, InFlight};
pub use config::{Config, OneSided, Recovery, Tls, Transport};
pub use error::{Ended, Error, Refusal, Result};
pub use mapping::Mapping;
pub use open::{Event, Events, LockOptions, Open, OpenOptions};
pub use recovery::resume::{ResumeOptions, Resumed};
pub use region::{Region, RegionMemory};
pub use requests::{Changes, Listing};
pub use session::Session;
pub use stripe::{RAILS_MAX, RailState, Stripes};

pub use holdfast_shared::auth::MacPolicy;
pub use holdfast_shared::types::{
    Access, CreateId, Disposition, FileTime, GoneReason, HandleId, HoldClass, LockItem, LockKind, LockRange,
    OpenId, ProcessId, SessionId, ShareMode, Status, Verdict,
};
pub use holdfast_shared::wire::control::{
    Attributes, Entry, FileKind, KeyGrant, Place, VolumeInfo, VolumeStatus,
};
pub use holdfast_shared::wire::service::{Endpoint, ServiceBlob, TransportKind};

/// Reading certificates, for tools that make them.
pub mod pem {
    pub use rustls::pki_types::CertificateDer;
    pub use rustls::pki_types::pem::PemObject;
}

/// Bytes nobody can guess.
///
/// # Errors
/// If the system gives none.
pub fn random_bytes<const N: usize>() -> Result<[u8; N]> {
    random()
}

pub(crate) fn random<const N: usize>() -> Result<[u8; N]> {
    let mut bytes = [0; N];
    aws_lc_rs::rand::fill(&mut bytes).map_err(|_| Error::Internal("the system gives no randomness"))?;
    Ok(bytes)
}
