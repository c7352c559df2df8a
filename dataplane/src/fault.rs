//! Our own faults. A process that has lost a thread would only look alive: it ends, and a supervisor starts it anew.

use std::fmt::Display;

/// Exit code after a panic, or when a thread can't go on.
pub const EXIT_CODE: i32 = 70;

/// From now on a panic of any thread ends the process.
pub fn end_on_panic() {
    std::panic::set_hook(Box::new(|panic| {
        tracing::error!("{panic}");
        std::process::exit(EXIT_CODE);
    }));
}

/// Ends the process.
pub fn fatal(what: &str, error: &dyn Display) -> ! {
    tracing::error!(%error, "{what}");
    std::process::exit(EXIT_CODE);
}
