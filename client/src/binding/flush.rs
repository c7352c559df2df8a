//! Flushes of a [`Binding`]: what was acknowledged becomes durable, or it is said that it did not.

use super::{Binding, Seat};
use crate::channel::request::{Purpose, Request};
use crate::error::{Error, Result};
use crate::recovery::rebind::{self, Trials};
use holdfast_shared::types::Status;
use std::sync::Arc;

impl Binding {
    /// Makes the writes acknowledged so far durable, with all attributes: those of every binding of the open, also if
    /// a process of the server was restarted since.
    ///
    /// # Errors
    /// [`Error::WritesLost`] if the server's host was restarted since some of them were made; every flush fails so until
    /// [`crate::Open::accept_lost_writes`]. And what the server refuses: after [`Status::Io`] and [`Status::NoSpace`] the storage
    /// has not taken them, and later flushes fail as [`Error::WritesLost`] too.
    ///
    /// A flush whose answer was lost is made again, and its success is believed. Only if the storage failed in the very flush
    /// during which the data plane went away is that too much: its failure was told to nobody.
    pub async fn flush(&self) -> Result<()> {
        self.flush_as(false).await
    }

    /// As [`Binding::flush`], for the data and the size alone (`fdatasync`).
    ///
    /// # Errors
    /// As [`Binding::flush`].
    pub async fn flush_data(&self) -> Result<()> {
        self.flush_as(true).await
    }

    async fn flush_as(&self, data_only: bool) -> Result<()> {
        let mut trials = None;
        loop {
            let seat = self.seat();
            match (self.flush_once(&seat, data_only).await, &self.inner.open) {
                (Err(error), Some(open)) if rebind::is_wanted(&error) => {
                    let trials = trials.get_or_insert_with(|| Trials::new(open));
                    trials.replace(&self.inner, open, &seat).await?;
                }
                (outcome, _) => return outcome,
            }
        }
    }

    /// One flush on this seat, whatever becomes of it.
    pub(crate) async fn flush_once(&self, seat: &Arc<Seat>, data_only: bool) -> Result<()> {
        let number = match self.open() {
            Some(open) => {
                open.inner.gate.check()?;
                open.inner.durable.begin()?
            }
            None => 0,
        };
        let submitted =
            seat.channel.submit(Some(&seat.core), Request::Flush { data_only }, Purpose::Flush).await;
        let outcome = match submitted {
            Ok(reply) => reply.count().await.map(drop),
            Err(error) => Err(error),
        };
        let Some(open) = self.open() else { return outcome };
        match outcome {
            Ok(()) => open.inner.durable.done(number),
            Err(error) => {
                // The kernel tells a failed write-back once, and forgets the bytes: a later flush would succeed.
                let failed = matches!(error.status(), Some(Status::Io | Status::NoSpace));
                if !rebind::is_wanted(&error) && (failed || matches!(error, Error::WritesLost)) {
                    open.inner.durable.lose();
                }
                Err(error)
            }
        }
    }
}
