//! Exit codes, and how errors are told.

use holdfast_client::{Ended, Error, Status};
use std::io::Write;
use std::process::ExitCode;

/// Some files of several were not copied; each was named when it failed.
#[derive(Debug, thiserror::Error)]
#[error("{failed} of {total} could not be copied; they are named above")]
pub(crate) struct Partial {
    pub(crate) failed: u64,
    pub(crate) total: u64,
}

/// The table of exit codes as `--help` shows it.
pub(crate) const HELP: &str = "Exit codes:
  0  done
  1  failed: the text says why
  2  the command line is not valid
  3  the server refused the request
  4  the server cannot be reached, or the connection broke
  5  some of the files were copied, others not (none at all: as the first error)
  6  the file was changed by somebody else while the server was away, or whether the request was carried out is not known";

/// Prints the error, if there is one, and chooses the exit code.
pub(crate) fn report(result: anyhow::Result<()>, json: bool) -> ExitCode {
    let Err(error) = result else { return ExitCode::SUCCESS };
    if is_broken_pipe(&error) {
        // The reader of our output has seen enough (`| head`).
        return ExitCode::SUCCESS;
    }
    if json {
        let status = error.chain().find_map(|e| e.downcast_ref::<Error>()).and_then(Error::status);
        let line =
            serde_json::json!({ "error": format!("{error:#}"), "status": status.map(|s| format!("{s:?}")) });
        let _ = writeln!(std::io::stderr(), "{line}");
    } else {
        // Refusals carry the server's words. A standard error that is closed is no reason to panic.
        let text = crate::output::shown_lines(&format!("{error:#}"));
        let _ = writeln!(std::io::stderr(), "holdfast: {text}");
    }
    ExitCode::from(code(&error))
}

fn code(error: &anyhow::Error) -> u8 {
    if error.chain().any(|e| e.is::<Partial>()) {
        return 5;
    }
    match error.chain().find_map(|e| e.downcast_ref::<Error>()) {
        // Fenced: the session that held the open is gone.
        Some(Error::Refused(refusal)) if refusal.status == Status::Fenced => 4,
        Some(Error::Refused(_)) => 3,
        Some(Error::Ended { why: Ended::Closed | Ended::Disconnected | Ended::Transport(_), .. }) => 4,
        Some(Error::TimedOut { .. } | Error::Io { .. }) => 4,
        Some(Error::Changed | Error::Gone { .. } | Error::WriteFateUnknown | Error::FateUnknown { .. }) => 6,
        _ => 1,
    }
}

/// True if the connection is gone: nothing more will succeed.
pub(crate) fn is_connection(error: &anyhow::Error) -> bool {
    error.chain().any(|e| matches!(e.downcast_ref::<Error>(), Some(Error::Ended { .. })))
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let broken = |e: &std::io::Error| e.kind() == std::io::ErrorKind::BrokenPipe;
    error.chain().any(|e| e.downcast_ref().is_some_and(broken))
}

#[cfg(test)]
mod tests {
    use super::*;
    use holdfast_client::Refusal;

    #[test]
    fn codes_are_those_documented() {
        for (status, wanted) in [(Status::NotFound, 3), (Status::Fenced, 4)] {
            let refused = Error::Refused(Refusal { status, detail: String::new(), retry: None });
            assert_eq!(code(&anyhow::Error::new(refused).context("x")), wanted);
        }
        assert_eq!(code(&Error::Ended { what: "channel", why: Ended::Disconnected }.into()), 4);
        assert_eq!(code(&anyhow::Error::new(Error::Changed).context("x")), 6);
        assert_eq!(code(&Error::FateUnknown { what: "remove" }.into()), 6);
        assert_eq!(code(&Partial { failed: 1, total: 2 }.into()), 5);
        assert_eq!(code(&anyhow::anyhow!("x")), 1);
    }
}
