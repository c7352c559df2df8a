//! What can be asked on a channel, how it becomes a frame, and what must be kept until its reply.

use crate::Region;
use crate::bind::{BindWait, BindingCore};
use crate::error::{Ended, Error, Result};
use holdfast_shared::auth::FrameKey;
use holdfast_shared::types::{RegionDescriptor, Status};
use holdfast_shared::wire::WireError;
use holdfast_shared::wire::data::{Bind, Flags, Flush, Io, Map, Opcode, Unmap, Writer};
use holdfast_transport::Registration;
use holdfast_transport::verbs::LaneEnd;
use parking_lot::Mutex;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use tokio::sync::OwnedSemaphorePermit;

/// A request about to be sent.
pub(crate) enum Request<'a> {
    Bind { body: &'a Bind, resume_key: &'a [u8] },
    Unbind,
    Read { offset: u64, remote: RegionDescriptor },
    Write { offset: u64, length: u32, source: Source<'a> },
    Flush { data_only: bool },
    Map { offset: u64, length: u64, lane: LaneEnd },
    Unmap { mapping: u32 },
    Descriptor,
}

/// Where a write's bytes are.
pub(crate) enum Source<'a> {
    /// From `start` of the region on, to be copied into the frame.
    Inline { region: &'a Region, start: usize },
    /// At `remote`, which is `start` of the region, for the server to fetch.
    Fetch { region: &'a Region, start: usize, remote: RegionDescriptor },
    /// As above; but they are encrypted into `bounce` and fetched from there.
    Bounced { region: &'a Region, start: usize, bounce: &'a Region, remote: RegionDescriptor },
}

/// What a request was, and what the device may touch until its reply.
pub(crate) enum Purpose {
    Bind(Box<BindWait>),
    Unbind,
    Flush,
    Map { length: u64 },
    Unmap,
    Descriptor,
    Read { region: Region, start: usize, length: u32, _registration: Arc<Registration> },
    Write { length: u32, _fetched: Fetched },
}

/// Memory a write is fetched from: withdrawn only after the reply. Its fields are held, not read.
pub(crate) enum Fetched {
    Inline,
    Region { _registration: Arc<Registration> },
    Bounce { _bounce: Bounce },
}

/// A region that encrypted bytes are fetched from; goes back to its channel when the reply has come.
pub(crate) struct Bounce {
    pub(crate) region: Region,
    pub(crate) registration: Arc<Registration>,
    pub(crate) home: Arc<Mutex<Vec<Region>>>,
    pub(crate) _place: OwnedSemaphorePermit,
}

impl Drop for Bounce {
    fn drop(&mut self) {
        self.home.lock().push(self.region.clone());
    }
}

/// What a request came to.
pub(crate) enum Done {
    /// Bytes read or written; 0 for unbind, unmap and flush.
    Counted(u32),
    /// What may be read one-sided.
    Mapped(Granted),
    /// The new binding.
    Bound(Arc<BindingCore>),
    /// The open's descriptor; `None` if this process had no room for it.
    Descriptor(Option<OwnedFd>),
}

/// A mapping, as the server granted it: length and address are checked.
#[derive(Clone, Copy)]
pub(crate) struct Granted {
    pub(crate) mapping: u32,
    pub(crate) address: u64,
    pub(crate) length: u64,
    pub(crate) rkey: u32,
}

/// Why a request came to nothing.
#[derive(Clone)]
pub(crate) enum Failure {
    Refused { status: Status, count: u32 },
    WritesLost,
    Ended(Ended),
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Refused { status, count: 0 } => Self::refused(status),
            Failure::Refused { status, count } => {
                let detail = format!("after {count} bytes, which took effect");
                Self::Refused(crate::Refusal { detail, ..crate::Refusal::new(status) })
            }
            Failure::WritesLost => Self::WritesLost,
            Failure::Ended(why) => Self::channel(why),
        }
    }
}

impl Request<'_> {
    fn opcode(&self) -> Opcode {
        match self {
            Self::Bind { .. } => Opcode::Bind,
            Self::Unbind => Opcode::Unbind,
            Self::Read { .. } => Opcode::Read,
            Self::Write { .. } => Opcode::Write,
            Self::Flush { .. } => Opcode::Flush,
            Self::Map { .. } => Opcode::Map,
            Self::Unmap { .. } => Opcode::Unmap,
            Self::Descriptor => Opcode::Descriptor,
        }
    }

    /// Builds the frame and returns its length. `scratch` is for bytes that must be digested or encrypted: a
    /// private copy, as a region's own may change while they are looked at.
    pub(super) fn encode(
        &self,
        buffer: &mut [u8],
        number: u32,
        sequence: u64,
        binding: Option<&BindingCore>,
        scratch: &mut Vec<u8>,
    ) -> Result<usize> {
        let flags = if matches!(self, Self::Flush { data_only: true }) { Flags::DATA_ONLY } else { 0 };
        let unkeyed = FrameKey::unkeyed();
        let (id, key) = binding.map_or((0, &unkeyed), |b| (b.number, &b.to_server));
        let mut w = Writer::new(buffer, self.opcode(), flags, id, number, sequence).map_err(ours)?;
        match self {
            Self::Bind { body, resume_key } => {
                w.body(*body).map_err(ours)?;
                w.payload(resume_key.len()).map_err(ours)?.copy_from_slice(resume_key);
            }
            Self::Unbind | Self::Descriptor => {}
            Self::Flush { .. } => {
                w.body(&Flush { reserved: 0.into() }).map_err(ours)?;
            }
            Self::Map { offset, length, lane } => {
                let (offset, length) = ((*offset).into(), (*length).into());
                w.body(&Map { offset, length, lane: *lane, reserved: [0; 4] }).map_err(ours)?;
            }
            Self::Unmap { mapping } => {
                w.body(&Unmap { mapping: (*mapping).into(), reserved: 0.into() }).map_err(ours)?;
            }
            Self::Read { offset, remote } => {
                w.body(&io(*offset, remote.length(), *remote)).map_err(ours)?;
            }
            Self::Write { offset, length, source } => {
                let binding = binding.ok_or(Error::Internal("a write without a binding"))?;
                write(&mut w, *offset, *length, source, binding, sequence, scratch)?;
            }
        }
        Ok(w.finish(|covered, mac| key.sign(covered, mac)))
    }
}

fn io(offset: u64, length: u32, region: RegionDescriptor) -> Io {
    Io { offset: offset.into(), length: length.into(), reserved: 0.into(), region }
}

fn write(
    w: &mut Writer<'_>,
    offset: u64,
    length: u32,
    source: &Source<'_>,
    binding: &BindingCore,
    sequence: u64,
    scratch: &mut Vec<u8>,
) -> Result<()> {
    let (region, start, remote) = match source {
        Source::Inline { region, start } => (region, *start, RegionDescriptor::NONE),
        Source::Fetch { region, start, remote } | Source::Bounced { region, start, remote, .. } => {
            (region, *start, *remote)
        }
    };
    let covered = binding.payload_to_server.is_on();
    w.body(&io(offset, length, remote)).map_err(ours)?;
    if covered {
        scratch.resize(length as usize, 0);
        region.copy_out(start, scratch)?;
        let tag = binding
            .payload_to_server
            .protect(sequence, scratch)
            .map_err(|_| Error::Internal("a payload could not be protected"))?;
        if let Some(tag) = tag {
            w.digest(&tag).map_err(ours)?;
        }
    }
    match source {
        Source::Inline { .. } => {
            let place = w.payload(length as usize).map_err(ours)?;
            if covered { place.copy_from_slice(scratch) } else { region.copy_out(start, place)? }
        }
        Source::Bounced { bounce, .. } => bounce.copy_in(0, scratch)?,
        Source::Fetch { .. } => {}
    }
    Ok(())
}

/// Frames are built from checked values: an error is ours.
fn ours(_: WireError) -> Error {
    Error::Internal("a frame could not be built")
}
