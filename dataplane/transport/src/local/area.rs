//! The area: the memory that both ends of a local channel have, and what lies where in it.
//!
//! | offset | bytes   | what | stored by |
//! |-------:|--------:|------|-----------|
//! | 0      | 8       | to the server: tail | client |
//! | 64     | 8       | to the server: head | server |
//! | 128    | 8       | to the client: tail | server |
//! | 192    | 8       | to the client: head | client |
//! | 256    | 8       | the client sleeps: bit 0 until something comes, bit 1 until there is room | both |
//! | 320    | 8       | the server sleeps, likewise | both |
//! | 4096   | 8 x 256 | one word for each shared region: see [`super::share`] | both |
//! | 8192   | 131072  | to the server: the ring's bytes | client |
//! | 139264 | 131072  | to the client: the ring's bytes | server |
//!
//! Numbers have the processor's byte order: both processes are of one host. It is all zero when the server hands it over.

use super::ring::{At, CAPACITY, Reader, Writer};
use holdfast_verbs::memory::{OutOfRange, Region, SharedWord};
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

/// Regions that may be shared at once.
pub(super) const SLOTS: u16 = 256;
/// Bytes of the area.
pub(super) const AREA_BYTES: usize = RINGS + 2 * CAPACITY;

const WORDS: usize = 4096;
const RINGS: usize = 8192;
const TO_SERVER: At = At { tail: 0, head: 64, bytes: RINGS };
const TO_CLIENT: At = At { tail: 128, head: 192, bytes: RINGS + CAPACITY };
const CLIENT_SLEEPS: usize = 256;
const SERVER_SLEEPS: usize = 320;

/// Wakes when bytes have come.
pub(super) const DATA: u64 = 1;
/// Wakes when half of the ring is free.
pub(super) const ROOM: u64 = 2;

/// One end's view.
pub(super) struct Area {
    pub(super) writer: Writer,
    pub(super) reader: Reader,
    ours: SharedWord,
    theirs: SharedWord,
}

impl Area {
    pub(super) fn new(memory: &Arc<Region>, is_client: bool) -> Result<Self, OutOfRange> {
        let (out, back) = if is_client { (TO_SERVER, TO_CLIENT) } else { (TO_CLIENT, TO_SERVER) };
        let (ours, theirs) =
            if is_client { (CLIENT_SLEEPS, SERVER_SLEEPS) } else { (SERVER_SLEEPS, CLIENT_SLEEPS) };
        Ok(Self {
            writer: Writer::new(memory, out)?,
            reader: Reader::new(memory, back)?,
            ours: memory.word(ours)?,
            theirs: memory.word(theirs)?,
        })
    }

    /// From now on the peer rings the bell for it. Look again before sleeping: what came before may not have been told.
    pub(super) fn sleep_until(&self, what: u64) {
        self.ours.fetch_or(what, Ordering::SeqCst);
        fence(Ordering::SeqCst);
    }

    /// The peer need not ring the bell.
    pub(super) fn awake(&self, what: u64) {
        self.ours.fetch_and(!what, Ordering::Relaxed);
    }

    /// True if the peer sleeps until that, and nobody has rung: then the caller is to. Call it after the word was stored that the peer
    /// waits for.
    pub(super) fn rings(&self, what: u64) -> bool {
        // Either this sees that the peer sleeps, or the peer sees the word when it looks again.
        fence(Ordering::SeqCst);
        self.theirs.load(Ordering::Relaxed) & what != 0
            && self.theirs.fetch_and(!what, Ordering::AcqRel) & what != 0
    }
}

/// The word of one shared region.
pub(super) fn slot_word(memory: &Arc<Region>, slot: u16) -> Result<SharedWord, OutOfRange> {
    // Beyond the last there is a ring's bytes.
    if slot >= SLOTS {
        return Err(OutOfRange { start: usize::from(slot), end: usize::from(slot) + 1, len: SLOTS.into() });
    }
    memory.word(WORDS + 8 * usize::from(slot))
}
