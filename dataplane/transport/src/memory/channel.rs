//! [`MemoryChannel`]: the trait over one side of a [`Wire`].

use super::wire::{Faults, Side, Wire};
use crate::admission::Admission;
use crate::channel::{
    Armed, Capabilities, Channel, ChannelError, Completion, Kind, Operation, Registrar, Rejected, Setup,
    SubmitError,
};
use crate::region_table::{RegionTable, TableRegistrar};
use holdfast_shared::auth::ChannelIdentity;
use holdfast_shared::wire::service::TransportKind;
use parking_lot::Mutex;
use rustix::event::{EventfdFlags, eventfd};
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// No longer than what a request of the data plane can name.
const LENGTH_MAX: usize = 1 << 30;

/// Numbers pairs, so that each has an identity of its own.
static PAIRS: AtomicU64 = AtomicU64::new(1);

/// One side of a pair.
pub struct MemoryChannel {
    wire: Arc<Mutex<Wire>>,
    side: usize,
    identity: ChannelIdentity,
    admission: Admission,
    wake: Arc<OwnedFd>,
    table: Arc<RegionTable>,
}

/// Two channels that are each other's peer. The first is the client.
///
/// # Errors
/// The kernel's, if it has no event descriptors left; `InvalidInput` for a setup that contradicts itself.
pub fn pair(client: Setup, server: Setup) -> io::Result<(MemoryChannel, MemoryChannel)> {
    let number = PAIRS.fetch_add(1, Ordering::Relaxed);
    let end = |mark: u8| {
        let mut end = [0; 20];
        end[..8].copy_from_slice(&number.to_le_bytes());
        end[19] = mark;
        end
    };
    let identity = ChannelIdentity { transport: TransportKind::Memory, client: end(1), server: end(2) };
    let (client_side, client_half) = half(client)?;
    let (server_side, server_half) = half(server)?;
    let wire = Arc::new(Mutex::new(Wire::new([client_side, server_side])));
    let channel = |side, (admission, wake, table)| MemoryChannel {
        wire: Arc::clone(&wire),
        side,
        identity: identity.clone(),
        admission,
        wake,
        table,
    };
    Ok((channel(0, client_half), channel(1, server_half)))
}

type Half = (Admission, Arc<OwnedFd>, Arc<RegionTable>);

fn half(setup: Setup) -> io::Result<(Side, Half)> {
    let capabilities = Capabilities {
        message_bytes_max: LENGTH_MAX,
        transfer_bytes_max: LENGTH_MAX,
        depth: setup.depth,
        zero_copy: false,
        cheap_poll: true,
        gives_way: true,
    };
    let mut admission = Admission::new(&setup, capabilities)?;
    let wake = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
    let table = RegionTable::new();
    let mut side = Side::new(Arc::clone(&wake), Arc::clone(&table));
    for (token, buffer) in setup.receives {
        admission.enter(Kind::Recv);
        side.submit(token, Operation::Recv { buffer });
    }
    Ok((side, (admission, wake, table)))
}

impl MemoryChannel {
    /// Faults of the pair this belongs to.
    pub fn faults(&self) -> Faults {
        Faults(Arc::clone(&self.wire))
    }

    fn with_side<T>(&self, act: impl FnOnce(&mut Side) -> T) -> T {
        let mut wire = self.wire.lock();
        let [a, b] = &mut wire.sides;
        act(if self.side == 0 { a } else { b })
    }
}

impl Channel for MemoryChannel {
    fn identity(&self) -> &ChannelIdentity {
        &self.identity
    }

    fn peer(&self) -> SocketAddr {
        (Ipv4Addr::LOCALHOST, 0).into()
    }

    fn capabilities(&self) -> Capabilities {
        self.admission.capabilities()
    }

    fn submit(&mut self, token: u64, operation: Operation) -> Result<(), Rejected> {
        let admitted = match self.ended() {
            Some(_) => Err(SubmitError::Closed),
            None => self.admission.check(&operation),
        };
        if let Err(error) = admitted {
            return Err(Rejected { error, operation });
        }
        let kind = operation.kind();
        // Lost between the two looks at the side, the operation would never complete.
        let late = self.with_side(|side| match side.end {
            Some(_) => Some(operation),
            None => {
                side.submit(token, operation);
                None
            }
        });
        if let Some(operation) = late {
            return Err(Rejected { error: SubmitError::Closed, operation });
        }
        self.admission.enter(kind);
        Ok(())
    }

    fn poll(&mut self, done: &mut Vec<Completion>) -> usize {
        let mut wire = self.wire.lock();
        wire.advance();
        let [a, b] = &mut wire.sides;
        let side = if self.side == 0 { a } else { b };
        side.seen();
        let count = side.ready.len();
        for completion in side.ready.drain(..) {
            self.admission.leave(completion.kind);
            done.push(completion);
        }
        count
    }

    fn arm(&mut self) -> Armed {
        let mut wire = self.wire.lock();
        // What was submitted after the last poll takes effect now, or it might never.
        wire.advance();
        let [a, b] = &mut wire.sides;
        let side = if self.side == 0 { a } else { b };
        if side.arm() { Armed::Idle } else { Armed::Pending }
    }

    fn wake_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    fn close(&mut self) {
        self.wire.lock().close(self.side);
    }

    fn ended(&self) -> Option<ChannelError> {
        self.with_side(|side| side.end.clone())
    }

    fn registrar(&self) -> Arc<dyn Registrar> {
        Arc::new(TableRegistrar(Arc::clone(&self.table)))
    }
}

impl Drop for MemoryChannel {
    fn drop(&mut self) {
        self.close();
        // The other side may live on for long: the buffers go back to their pool now.
        self.with_side(|side| side.ready.clear());
    }
}
