//! Who may: resume keys, the key schedule, bind transcripts and proofs, MACs of data frames.
//!
//! ```text
//!  TLS exporter ─► K1 (session key) ─► Kr (bind secret, per open) ─┬► client proof key ─► proof_c over transcript
//!                                                                  ├► server proof key ─► proof_s over transcript + answer
//!                                                                  └► channel keys, bound to transcript + answer
//! ```
//!
//! Neither K1 nor Kr ever travels: client and control derive both. Randomness comes in as arguments.
//! The byte layouts are in docs/PROTOCOL.md.

mod channel;
mod frame_mac;
mod payload;
mod resume_key;
mod schedule;
mod secret;
mod transcript;

pub use channel::{ChannelIdentity, ChannelKeys, DirectionKeys};
pub use frame_mac::{FrameKey, MacPolicy};
pub use payload::{PayloadError, PayloadKey};
pub use resume_key::{Keyring, ResumeKey, ResumeKeyError};
pub use schedule::{BindSecret, EXPORTER_LABEL, SessionKey};
pub use secret::Secret;
pub use transcript::{BindAnswer, BindTranscript};
