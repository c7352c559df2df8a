//! [`Error`]: what can go wrong, sorted by whose affair it is.
//!
//! | kind | whose affair |
//! |---|---|
//! | [`Error::Refused`] | the server understood and said no; it says why and what to do |
//! | [`Error::Misbehaved`] | the peer broke the protocol: report it |
//! | [`Error::Incompatible`] | the two sides have no common version or policy: update one |
//! | [`Error::Io`], [`Error::Ended`], [`Error::TimedOut`] | the network, the disk, the other process |
//! | [`Error::Changed`], [`Error::Gone`] | somebody else, while the open was detached |
//! | [`Error::MappingLost`] | the server, which took a one-sided mapping back: the caller reads another way |
//! | [`Error::FateUnknown`], [`Error::WriteFateUnknown`], [`Error::WritesLost`] | a server that went away: the caller looks, or repeats |
//! | [`Error::Config`], [`Error::Usage`] | the caller |
//! | [`Error::Internal`] | a bug of this library |

use holdfast_shared::types::{GoneReason, Status};
use holdfast_transport::ChannelError;
use std::path::PathBuf;
use std::time::Duration;

/// The result of everything in this library.
pub type Result<T> = std::result::Result<T, Error>;

/// A refused request.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Refusal {
    /// The reason, from the closed set.
    pub status: Status,
    /// The server's own words; may be empty.
    pub detail: String,
    /// When trying again may help.
    pub retry: Option<Duration>,
}

impl Refusal {
    /// A refusal of which only the status is known, as data frames carry it.
    pub fn new(status: Status) -> Self {
        Self { status, detail: String::new(), retry: None }
    }
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.status)?;
        if !self.detail.is_empty() && self.detail != self.status.text() {
            write!(f, ": {}", self.detail)?;
        }
        match self.retry {
            Some(retry) => write!(f, "; try again in {} ms", retry.as_millis()),
            None => write!(f, "; {}", self.status.hint()),
        }
    }
}

/// Why a connection (a session or a channel) is over.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Ended {
    /// This side closed it.
    #[error("it was closed by this side")]
    Closed,
    /// The server closed it, or is gone.
    #[error("the server closed it or is gone")]
    Disconnected,
    /// The network or the device failed.
    #[error("{0}")]
    Transport(String),
    /// The server said why before it closed.
    #[error("the server ended it: {0}")]
    Notice(Status),
    /// The server, or somebody on the way, sent what the protocol does not allow.
    #[error("the server, or somebody on the way, broke the protocol: {0}")]
    Misbehaved(&'static str),
    /// A frame's MAC or sequence number was wrong: frames were lost, repeated or changed on the way.
    #[error("a frame's MAC or sequence is wrong")]
    BadMac,
    /// The server's proof was wrong: it is not the server that issued the resume key.
    #[error("the server's proof is wrong: it is not the server that issued the key")]
    BadProof,
}

impl From<ChannelError> for Ended {
    fn from(error: ChannelError) -> Self {
        match error {
            ChannelError::Closed => Self::Closed,
            ChannelError::Disconnected => Self::Disconnected,
            ChannelError::Misbehaved(what) => Self::Misbehaved(what),
            ChannelError::Transport(text) => Self::Transport(text),
        }
    }
}

/// What can go wrong. See the module's table.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The server refused the request.
    #[error("{0}")]
    Refused(Refusal),
    /// The session or channel is over.
    #[error("the {what} has ended: {why}")]
    Ended {
        /// `session` or `channel`.
        what: &'static str,
        /// Why.
        why: Ended,
    },
    /// The server broke the protocol.
    #[error("the server broke the protocol: {0}")]
    Misbehaved(String),
    /// No common version or policy.
    #[error("this client and the server do not fit together: {0}")]
    Incompatible(String),
    /// The deadline passed.
    #[error("no answer within {} ms to: {what}", after.as_millis())]
    TimedOut {
        /// What was waited for.
        what: &'static str,
        /// How long.
        after: Duration,
    },
    /// The system failed.
    #[error("{context}: {error}")]
    Io {
        /// What was being done.
        context: String,
        /// The system's error; part of the text, so it is not the `source` of this one too.
        error: std::io::Error,
    },
    /// The configuration cannot be used.
    #[error("{}: {reason}", path.display())]
    Config {
        /// Which file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// The caller asked for what cannot be.
    #[error("{0}")]
    Usage(String),
    /// Acknowledged but unflushed writes may be lost: the data plane restarted since they were made.
    #[error("the data plane restarted: writes since the last flush may be lost and must be repeated")]
    WritesLost,
    /// The server went away before it answered, and the request is not one that may be made twice: it was carried out, or
    /// not. Look before you repeat it.
    #[error(
        "the server went away before it answered to '{what}': look whether it was done before you repeat it"
    )]
    FateUnknown {
        /// What was asked.
        what: &'static str,
    },
    /// A write was under way when its channel broke, and since then the open was not protected all the while: whether the
    /// bytes took effect before somebody else's is not known, and they must not be written over these. Or, with
    /// `recovery = "soft"`, the server did not come back in time: it was carried out, or not.
    #[error(
        "a write was under way when the channel broke, and could not be made again safely: its fate is unknown"
    )]
    WriteFateUnknown,
    /// The file was changed by somebody else while the open was detached (or it can't be known that it was not). Every
    /// read, write and lock fails so until [`crate::Open::accept_change`].
    #[error("the file was changed by somebody else while the open was detached")]
    Changed,
    /// The open is gone, and its resume key is dead: open the file again.
    #[error("the open is gone ({}); the file was {}", gone_text(*reason), if *changed { "changed since, or may have been" } else { "not changed since" })]
    Gone {
        /// Why.
        reason: GoneReason,
        /// True if the file was changed since the open was detached, or if that can't be known.
        changed: bool,
    },
    /// A mapping can't be read any more: the server has withdrawn it (a fence, a lock of another open, the end of the
    /// binding), or its lane has failed. What is wrong with the file or the open, if anything is, the binding tells: fall
    /// back to [`crate::Binding::read_at`], or map again.
    #[error(
        "the mapping was withdrawn by the server, or its connection failed: read through the binding, or map again"
    )]
    MappingLost,
    /// A fault of this library.
    #[error("a fault in the client library: {0}; report it")]
    Internal(&'static str),
}

fn gone_text(reason: GoneReason) -> &'static str {
    match reason {
        GoneReason::Evicted => Status::Evicted.text(),
        GoneReason::ForceClosed => Status::ForceClosed.text(),
        GoneReason::FileLost => Status::FileLost.text(),
    }
}

impl Error {
    /// Wraps an error of the system with what was being done.
    pub fn io(context: impl Into<String>, error: std::io::Error) -> Self {
        Self::Io { context: context.into(), error }
    }

    pub(crate) fn refused(status: Status) -> Self {
        Self::Refused(Refusal::new(status))
    }

    pub(crate) fn channel(why: Ended) -> Self {
        Self::Ended { what: "channel", why }
    }

    pub(crate) fn session(why: Ended) -> Self {
        Self::Ended { what: "session", why }
    }

    /// The protocol's status, where there is one.
    pub fn status(&self) -> Option<Status> {
        match self {
            Self::Refused(refusal) => Some(refusal.status),
            Self::Ended { why: Ended::Notice(status), .. } => Some(*status),
            Self::Ended { why: Ended::BadProof, .. } => Some(Status::BadProof),
            Self::Ended { why: Ended::BadMac, .. } => Some(Status::BadMac),
            Self::Ended { why: Ended::Misbehaved(_), .. } | Self::Misbehaved(_) => Some(Status::Protocol),
            Self::TimedOut { .. } => Some(Status::TimedOut),
            Self::Gone { reason: GoneReason::Evicted, .. } => Some(Status::Evicted),
            Self::Gone { reason: GoneReason::ForceClosed, .. } => Some(Status::ForceClosed),
            Self::Gone { reason: GoneReason::FileLost, .. } => Some(Status::FileLost),
            _ => None,
        }
    }

    /// The closest Linux errno, for mounts and C callers. Total.
    pub fn errno(&self) -> i32 {
        const EIO: i32 = 5;
        const EINVAL: i32 = 22;
        const ESTALE: i32 = 116;
        const ECONNRESET: i32 = 104;
        match self {
            Self::Ended { why: Ended::Closed | Ended::Disconnected | Ended::Transport(_), .. } => ECONNRESET,
            Self::Incompatible(_) => Status::Version.errno(),
            Self::Io { error, .. } => error.raw_os_error().unwrap_or(EIO),
            Self::Config { .. } | Self::Usage(_) => EINVAL,
            Self::Changed | Self::MappingLost => ESTALE,
            _ => self.status().map_or(EIO, Status::errno),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_say_what_to_do() {
        let text = Error::refused(Status::NotFound).to_string();
        assert!(text.contains("no such file") && text.contains("check the name"), "{text}");
        let busy =
            Refusal { status: Status::Busy, detail: "held".into(), retry: Some(Duration::from_millis(250)) };
        assert!(busy.to_string().ends_with("held; try again in 250 ms"), "{busy}");
    }

    #[test]
    fn every_kind_has_an_errno() {
        assert_eq!(Error::refused(Status::NotFound).errno(), 2);
        assert_eq!(Error::channel(Ended::Disconnected).errno(), 104);
        assert_eq!(Error::channel(Ended::Notice(Status::OverCredit)).errno(), Status::OverCredit.errno());
        assert_eq!(Error::io("x", std::io::Error::from_raw_os_error(28)).errno(), 28);
        assert_eq!(Error::WritesLost.errno(), 5);
        assert_eq!(Error::Changed.errno(), 116);
        assert_eq!(Error::MappingLost.errno(), 116);
        for reason in [GoneReason::Evicted, GoneReason::ForceClosed, GoneReason::FileLost] {
            let gone = Error::Gone { reason, changed: true };
            assert_eq!(gone.errno(), 116);
            assert!(gone.to_string().contains("may have been"), "{gone}");
        }
    }
}
