//! So that no plane outlives a killed `serve`: the child asks the kernel for SIGTERM on its parent's death, then
//! becomes the plane. (Doing this between fork and exec in the parent would need `unsafe`.)
//!
//! The kernel ties that to the *thread* that made the child, so `serve` runs on its main thread alone.

use crate::args::PlaneGuard;
use anyhow::{Context, bail};
use rustix::process::{Signal, getppid, set_parent_process_death_signal};
use std::os::unix::process::CommandExt;
use std::process::Command;

pub(crate) fn run(args: &PlaneGuard) -> anyhow::Result<()> {
    set_parent_process_death_signal(Some(Signal::TERM))?;
    if getppid().map(|pid| pid.as_raw_nonzero().get()) != Some(args.parent) {
        bail!("the parent is gone already");
    }
    let (program, rest) = args.command.split_first().context("no program")?;
    let error = Command::new(program).args(rest).exec();
    Err(error).with_context(|| format!("cannot start {}", program.to_string_lossy()))
}
