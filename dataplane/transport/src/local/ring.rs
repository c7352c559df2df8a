//! A ring of bytes in memory that two processes have: one writes, one reads.
//!
//! ```text
//!   writer: copies in behind tail, then stores tail ───►  head ══ bytes that have come ══ tail ── room ── (head + CAPACITY)
//!   reader: copies out from head on, then stores head ──►  both only grow; where they point to is their remainder by CAPACITY
//! ```
//!
//! Each keeps its own end itself and never reads it back; of the other's it believes that it lies within a ring's length, or ends the
//! channel. So whatever the other stores, at whatever moment: what is reached lies within the ring, and what is read are bytes, which
//! the layers above check after they were copied out.

use crate::stream::{Ending, Piece, Room};
use holdfast_verbs::memory::{OutOfRange, Region, SharedWord};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Bytes a ring holds.
pub(super) const CAPACITY: usize = 128 << 10;
const CAPACITY_WORD: u64 = CAPACITY as u64;
/// The same, as a note says it.
pub(super) const RING_BYTES: u32 = 128 << 10;
const _: () = assert!(RING_BYTES as usize == CAPACITY);
/// Bytes copied at once between a ring and a region: no slice of either exists.
const STEP: usize = 1024;

/// Where a ring lies in the memory: its two words and its bytes.
#[derive(Clone, Copy)]
pub(super) struct At {
    pub(super) head: usize,
    pub(super) tail: usize,
    pub(super) bytes: usize,
}

/// What both ends are made of.
struct End {
    memory: Arc<Region>,
    bytes: usize,
    ours: SharedWord,
    theirs: SharedWord,
    /// Our word, as we stored it last.
    own: u64,
    /// Theirs, as it was seen last.
    seen: u64,
}

impl End {
    fn new(memory: &Arc<Region>, bytes: usize, ours: usize, theirs: usize) -> Result<Self, OutOfRange> {
        let (ours, theirs) = (memory.word(ours)?, memory.word(theirs)?);
        // Made by the server before the client could touch it.
        Ok(Self { memory: Arc::clone(memory), bytes, ours, theirs, own: 0, seen: 0 })
    }

    /// Looks at the other's word.
    fn look(&mut self) {
        self.seen = self.theirs.load(Ordering::Acquire);
    }

    /// Lets the other see what was done up to here.
    fn publish(&self) {
        self.ours.store(self.own, Ordering::Release);
    }

    /// The one or two stretches of memory of `count` bytes from our position on.
    fn stretches(&self, count: usize) -> [Range<usize>; 2] {
        // The remainder fits whatever it is the remainder of.
        let at = usize::try_from(self.own % CAPACITY_WORD).unwrap_or_default();
        let first = count.min(CAPACITY - at);
        let start = self.bytes + at;
        [start..start + first, self.bytes..self.bytes + (count - first)]
    }
}

fn ours_is_wrong(error: OutOfRange) -> Ending {
    Ending::Io(error.into())
}

/// The writing end.
pub(super) struct Writer(End);

impl Writer {
    pub(super) fn new(memory: &Arc<Region>, at: At) -> Result<Self, OutOfRange> {
        Ok(Self(End::new(memory, at.bytes, at.tail, at.head)?))
    }

    /// Bytes that fit now.
    pub(super) fn room(&mut self) -> Result<usize, Ending> {
        self.0.look();
        self.known_room()
    }

    /// Bytes that are known to fit.
    pub(super) fn known_room(&self) -> Result<usize, Ending> {
        let used = self.0.own.wrapping_sub(self.0.seen);
        let room = CAPACITY_WORD.checked_sub(used);
        room.and_then(|room| usize::try_from(room).ok())
            .ok_or(Ending::Misbehaved("it has read what was not written"))
    }

    /// Writes as much of the pieces as fits. Returns how much that was.
    pub(super) fn write(&mut self, pieces: &[Piece<'_>]) -> Result<usize, Ending> {
        let wanted = pieces.iter().map(Piece::len).fold(0, usize::saturating_add);
        let mut room = self.known_room()?;
        if room < wanted {
            room = self.room()?;
        }
        let mut total = 0;
        for piece in pieces {
            let count = piece.len().min(room - total);
            match piece {
                Piece::Slice(bytes) => self.put(bytes.get(..count).unwrap_or_default())?,
                Piece::Region(region, range) => {
                    let mut step = [0; STEP];
                    let mut done = 0;
                    while done < count {
                        let now = step.get_mut(..STEP.min(count - done)).unwrap_or_default();
                        region.copy_out(range.start + done, now).map_err(ours_is_wrong)?;
                        done += now.len();
                        self.put(now)?;
                    }
                }
                // A wire that does not take them is given none.
                Piece::File(..) => return Err(Ending::Io(std::io::ErrorKind::Unsupported.into())),
            }
            total += count;
        }
        if total > 0 {
            self.0.publish();
        }
        Ok(total)
    }

    fn put(&mut self, bytes: &[u8]) -> Result<(), Ending> {
        let [first, second] = self.0.stretches(bytes.len());
        let (one, other) = bytes.split_at_checked(first.len()).unwrap_or_default();
        self.0.memory.copy_in(first.start, one).map_err(ours_is_wrong)?;
        self.0.memory.copy_in(second.start, other).map_err(ours_is_wrong)?;
        self.0.own = self.0.own.wrapping_add(bytes.len() as u64);
        Ok(())
    }
}

/// The reading end.
pub(super) struct Reader(End);

impl Reader {
    pub(super) fn new(memory: &Arc<Region>, at: At) -> Result<Self, OutOfRange> {
        Ok(Self(End::new(memory, at.bytes, at.head, at.tail)?))
    }

    /// Bytes that have come.
    pub(super) fn available(&mut self) -> Result<usize, Ending> {
        self.0.look();
        self.known()
    }

    /// Bytes that are known to have come.
    pub(super) fn known(&self) -> Result<usize, Ending> {
        let come = self.0.seen.wrapping_sub(self.0.own);
        if come > CAPACITY_WORD {
            return Err(Ending::Misbehaved("it has written more than there is room for"));
        }
        usize::try_from(come).map_err(|_| Ending::Misbehaved("it has written more than can be counted"))
    }

    /// Reads as much into the rooms as has come. Returns how much that was.
    pub(super) fn read(&mut self, rooms: &mut [Room<'_>]) -> Result<usize, Ending> {
        let wanted = rooms.iter().map(Room::len).fold(0, usize::saturating_add);
        let mut come = self.known()?;
        if come < wanted {
            come = self.available()?;
        }
        let mut total = 0;
        for room in rooms {
            let count = room.len().min(come - total);
            match room {
                Room::Slice(bytes) => self.take(bytes.get_mut(..count).unwrap_or_default())?,
                Room::Region(region, range) => {
                    let mut step = [0; STEP];
                    let mut done = 0;
                    while done < count {
                        let now = step.get_mut(..STEP.min(count - done)).unwrap_or_default();
                        self.take(now)?;
                        region.copy_in(range.start + done, now).map_err(ours_is_wrong)?;
                        done += now.len();
                    }
                }
            }
            total += count;
        }
        if total > 0 {
            self.0.publish();
        }
        Ok(total)
    }

    fn take(&mut self, bytes: &mut [u8]) -> Result<(), Ending> {
        let [first, second] = self.0.stretches(bytes.len());
        let count = bytes.len() as u64;
        let (one, other) = bytes.split_at_mut_checked(first.len()).unwrap_or_default();
        self.0.memory.copy_out(first.start, one).map_err(ours_is_wrong)?;
        self.0.memory.copy_out(second.start, other).map_err(ours_is_wrong)?;
        self.0.own = self.0.own.wrapping_add(count);
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::cast_possible_truncation)] // bytes of patterns
mod tests {
    use super::*;
    use std::collections::VecDeque;

    const AT: At = At { head: 0, tail: 64, bytes: 128 };

    fn ring() -> (Arc<Region>, Writer, Reader) {
        let memory = Region::new(128 + CAPACITY).unwrap();
        let (writer, reader) = (Writer::new(&memory, AT).unwrap(), Reader::new(&memory, AT).unwrap());
        (memory, writer, reader)
    }

    /// xorshift64*
    fn random(state: &mut u64) -> usize {
        *state ^= *state >> 12;
        *state ^= *state << 25;
        *state ^= *state >> 27;
        usize::try_from(state.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33).unwrap()
    }

    #[test]
    fn bytes_come_out_as_they_went_in_however_they_are_cut() {
        for seed in 1..=8u64 {
            let (_, mut writer, mut reader) = ring();
            let (mut state, mut expected, mut count) = (seed, VecDeque::new(), 0u64);
            let region = Region::new(CAPACITY).unwrap();
            for _ in 0..3000 {
                if random(&mut state) % 2 == 0 {
                    let length = random(&mut state) % [40, 5000, 2 * CAPACITY][random(&mut state) % 3];
                    let bytes: Vec<u8> = (0..length).map(|n| (count + n as u64) as u8).collect();
                    let in_region = bytes.len().min(random(&mut state) % 3000);
                    region.copy_in(7, &bytes[..in_region]).unwrap();
                    let pieces =
                        [Piece::Region(&region, 7..7 + in_region), Piece::Slice(&bytes[in_region..])];
                    let written = writer.write(&pieces).unwrap();
                    assert_eq!(written, length.min(CAPACITY - expected.len()), "as much as fits");
                    expected.extend(&bytes[..written]);
                    count += written as u64;
                } else {
                    let (one, other) = (random(&mut state) % 3000, random(&mut state) % 70_000);
                    let mut bytes = vec![0; one + other];
                    let (first, second) = bytes.split_at_mut(one);
                    let mut rooms = [Room::Slice(first), Room::Region(&region, 3..3 + other)];
                    let read = reader.read(&mut rooms).unwrap();
                    assert_eq!(read, (one + other).min(expected.len()), "as much as there is");
                    region.copy_out(3, second).unwrap();
                    assert!(bytes[..read].iter().copied().eq(expected.drain(..read)), "seed {seed}");
                }
            }
        }
    }

    #[test]
    fn two_threads_that_never_wait_for_each_other() {
        let (_, mut writer, mut reader) = ring();
        const TOTAL: usize = 20 << 20;
        let thread = std::thread::spawn(move || {
            let (mut sent, mut state) = (0usize, 3);
            while sent < TOTAL {
                let length = (1 + random(&mut state) % 3000).min(TOTAL - sent);
                let bytes: Vec<u8> = (sent..sent + length).map(|n| (n % 251) as u8).collect();
                let written = writer.write(&[Piece::Slice(&bytes)]).unwrap();
                sent += written;
                if written == 0 {
                    std::thread::yield_now();
                }
            }
        });
        let (mut received, mut bytes) = (0usize, vec![0; 10_000]);
        while received < TOTAL {
            let count = reader.read(&mut [Room::Slice(&mut bytes)]).unwrap();
            assert!(bytes[..count].iter().enumerate().all(|(n, byte)| *byte == ((received + n) % 251) as u8));
            received += count;
            if count == 0 {
                std::thread::yield_now();
            }
        }
        thread.join().unwrap();
    }

    #[test]
    fn a_full_ring_takes_nothing_and_an_empty_one_gives_nothing() {
        let (_, mut writer, mut reader) = ring();
        assert_eq!(reader.read(&mut [Room::Slice(&mut [0])]).unwrap(), 0);
        assert_eq!(writer.write(&[Piece::Slice(&vec![1; CAPACITY + 1])]).unwrap(), CAPACITY);
        assert_eq!(writer.room().unwrap(), 0);
        assert_eq!(writer.write(&[Piece::Slice(&[1])]).unwrap(), 0);
        assert_eq!(reader.read(&mut [Room::Slice(&mut [0; 3])]).unwrap(), 3);
        assert_eq!(writer.write(&[Piece::Slice(&[1; 9])]).unwrap(), 3);
    }

    #[test]
    fn words_that_make_no_sense_end_it_and_reach_nothing_outside() {
        // What lies behind the ring must not be touched.
        let memory = Region::new(128 + CAPACITY + 4096).unwrap();
        memory.copy_in(128 + CAPACITY, &[0xC5; 4096]).unwrap();
        for word in [1, CAPACITY_WORD + 1, u64::MAX, u64::MAX - CAPACITY_WORD, 1 << 63] {
            let (mut writer, mut reader) =
                (Writer::new(&memory, AT).unwrap(), Reader::new(&memory, AT).unwrap());
            memory.word(AT.head).unwrap().store(word, Ordering::Relaxed);
            let full = vec![7; 2 * CAPACITY];
            let wrote = writer.write(&[Piece::Slice(&full)]);
            // One byte less than was written is a reader that is slow.
            assert_eq!(matches!(wrote, Err(Ending::Misbehaved(_))), word != u64::MAX, "head {word}");
            memory.word(AT.tail).unwrap().store(word, Ordering::Relaxed);
            let read = reader.read(&mut [Room::Slice(&mut vec![0; 2 * CAPACITY])]);
            // A byte that was never written may be read, if it lies within the ring: it is the peer's own.
            assert_eq!(matches!(read, Err(Ending::Misbehaved(_))), word != 1, "tail {word}");
        }
        let mut behind = [0; 4096];
        memory.copy_out(128 + CAPACITY, &mut behind).unwrap();
        assert_eq!(behind, [0xC5; 4096]);
    }
}
