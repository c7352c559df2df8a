//! What an error of the file system means to a client: one total function.

use crate::throttle::Throttle;
use holdfast_shared::types::Status;
use holdfast_shared::wire::control::Refusal;
use rustix::io::Errno;

/// The status for an error of the kernel. Whatever is not foreseen is [`Status::Io`].
pub fn status_of(error: Errno) -> Status {
    match error {
        Errno::NOENT => Status::NotFound,
        Errno::EXIST => Status::Exists,
        Errno::NOTDIR => Status::NotDirectory,
        Errno::ISDIR => Status::IsDirectory,
        Errno::NOTEMPTY => Status::NotEmpty,
        Errno::XDEV => Status::PathEscape,
        Errno::NAMETOOLONG => Status::NameTooLong,
        Errno::LOOP => Status::SymlinkLoop,
        Errno::ACCESS | Errno::PERM => Status::AccessDenied,
        Errno::ROFS => Status::ReadOnly,
        Errno::INVAL | Errno::ILSEQ => Status::Invalid,
        Errno::OPNOTSUPP | Errno::NOSYS | Errno::NXIO | Errno::NODEV => Status::Unsupported,
        Errno::NOSPC | Errno::DQUOT => Status::NoSpace,
        Errno::FBIG | Errno::OVERFLOW => Status::FileTooBig,
        Errno::MFILE | Errno::NFILE | Errno::MLINK => Status::TooMany,
        Errno::BUSY | Errno::TXTBSY | Errno::AGAIN => Status::Busy,
        Errno::TIMEDOUT => Status::TimedOut,
        _ => Status::Io,
    }
}

/// A refusal with that status. Only what a client cannot have caused goes to the log.
pub(crate) fn refused(error: Errno) -> Refusal {
    let status = status_of(error);
    if matches!(status, Status::Io | Status::NoSpace | Status::TooMany) {
        static LINES: Throttle = Throttle::new();
        if let Some(left_out) = LINES.admit() {
            tracing::warn!(%error, left_out, "the file system refused an operation");
        }
    }
    refusal(status, "")
}

/// A refusal whose words are the status's own, or better ones.
pub(crate) fn refusal(status: Status, detail: &str) -> Refusal {
    let detail = if detail.is_empty() { status.text() } else { detail };
    Refusal { status, detail: detail.to_owned(), retry_ms: None }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_errno_has_a_status_and_none_is_ok() {
        for raw in 1..4096 {
            assert_ne!(status_of(Errno::from_raw_os_error(raw)), Status::Ok);
        }
        // Where a status has an errno of its own, the way there and back is the same.
        for error in [Errno::NOENT, Errno::NOTDIR, Errno::NOSPC, Errno::ROFS, Errno::LOOP, Errno::XDEV] {
            assert_eq!(status_of(error).errno(), error.raw_os_error());
        }
    }
}
