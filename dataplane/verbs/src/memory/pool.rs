//! [`Pool`]: one mapping cut into equal pieces; [`Buffer`]: exclusive ownership of one piece.
//!
//! ```text
//!            take()                        drop
//!  free ─────────────► Buffer (caller) ─────────────► free
//!                        │        ▲
//!            post: moved │        │ completion: moved back
//!                        ▼        │
//!                      the device may touch it
//! ```
//!
//! Why `&mut [u8]` of a [`Buffer`] is sound:
//!
//! * The free list holds each index at most once, and a `Buffer` is not `Clone`: two buffers never overlap.
//! * The pool's memory is marked exclusive, and a registration of such memory with remote access is refused: no peer
//!   can write it on its own.
//! * The device touches it only for a posted work request, which takes the `Buffer` *by value* and gives it back with
//!   the completion. While a slice exists, the `Buffer` is borrowed and can't be posted.

use std::io;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};

use super::Memory;

/// Pieces start on a cache line of their own, so that two owners never share one.
const ALIGN: usize = 64;

static NEXT_ID: AtomicU64 = AtomicU64::new(1);

/// A fixed number of buffers of one size, over one mapping. Cheap to clone; clones are the same pool.
///
/// Taking and returning is lock-free and allocates nothing. Memory lives until the pool and its last buffer are gone.
#[derive(Clone)]
pub struct Pool {
    inner: Arc<Inner>,
}

struct Inner {
    id: u64,
    memory: Arc<Memory>,
    buffer_len: usize,
    /// Distance between the starts of two pieces.
    stride: usize,
    free: FreeList,
}

/// The free pieces: last given back, first taken, so that a pool much larger than what is in use stays in the cache
/// of the processor. A queue would go through all of its memory, which costs half of the bandwidth of a transfer.
///
/// ```text
///   head: tag | index ──► next[index] ──► ... ──► END       the tag grows with each change of the head: an index that
///                                                          went and came back meanwhile is not taken for unchanged
/// ```
struct FreeList {
    head: AtomicU64,
    next: Box<[AtomicU32]>,
    length: AtomicUsize,
}

const END: u32 = u32::MAX;
/// Added to the head's upper half.
const TAG: u64 = 1 << 32;

/// The index in a head: its lower half.
fn top_of(head: u64) -> u32 {
    let [a, b, c, d, ..] = head.to_le_bytes();
    u32::from_le_bytes([a, b, c, d])
}

impl FreeList {
    /// With all of `count` pieces in it, the first on top; `None` if they are more than can be numbered.
    fn full(count: usize) -> Option<Self> {
        let end = u32::try_from(count).ok().filter(|end| *end < END)?;
        let next = (1..=end).map(|index| AtomicU32::new(if index == end { END } else { index })).collect();
        Some(Self { head: AtomicU64::new(0), next, length: AtomicUsize::new(count) })
    }

    fn pop(&self) -> Option<usize> {
        let mut head = self.head.load(Ordering::Acquire);
        loop {
            let top = top_of(head) as usize;
            // END is no index.
            let next = self.next.get(top)?.load(Ordering::Relaxed);
            let new = (head & !u64::from(END)).wrapping_add(TAG) | u64::from(next);
            match self.head.compare_exchange_weak(head, new, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => {
                    self.length.fetch_sub(1, Ordering::Relaxed);
                    return Some(top);
                }
                Err(now) => head = now,
            }
        }
    }

    /// Gives back an index that `pop` gave out.
    fn push(&self, index: usize) {
        // Counted before it can be taken, so that the length never drops below zero.
        self.length.fetch_add(1, Ordering::Relaxed);
        let mut head = self.head.load(Ordering::Relaxed);
        loop {
            self.next[index].store(top_of(head), Ordering::Relaxed);
            let new = (head & !u64::from(END)).wrapping_add(TAG) | index as u64;
            match self.head.compare_exchange_weak(head, new, Ordering::AcqRel, Ordering::Relaxed) {
                Ok(_) => return,
                Err(now) => head = now,
            }
        }
    }
}

impl Pool {
    /// A pool of `count` buffers of `buffer_len` bytes each, zeroed. Buffers whose length is a multiple of the page
    /// size are page-aligned, as direct I/O wants it. Both numbers must be at least one.
    pub fn new(buffer_len: usize, count: usize) -> io::Result<Self> {
        Self::of(buffer_len, count, Memory::exclusive)
    }

    /// As [`Pool::new`], of huge pages that the operator has set aside (`vm.nr_hugepages`, 2 MiB each).
    ///
    /// # Errors
    /// `ENOMEM` if there are not enough of them.
    pub fn new_reserved(buffer_len: usize, count: usize) -> io::Result<Self> {
        Self::of(buffer_len, count, Memory::exclusive_reserved)
    }

    fn of(
        buffer_len: usize,
        count: usize,
        map: impl FnOnce(usize) -> io::Result<Arc<Memory>>,
    ) -> io::Result<Self> {
        let too_big = || io::Error::new(io::ErrorKind::InvalidInput, "pool size exceeds the address space");
        if buffer_len == 0 || count == 0 {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "a pool needs buffers, and buffers need bytes",
            ));
        }
        let stride = buffer_len.checked_next_multiple_of(ALIGN).ok_or_else(too_big)?;
        let total = stride.checked_mul(count).ok_or_else(too_big)?;
        // Mapped before the free list is allocated: a size the kernel refuses fails here, not in the allocator.
        let memory = map(total)?;
        let free = FreeList::full(count).ok_or_else(too_big)?;
        let id = NEXT_ID.fetch_add(1, Ordering::Relaxed);
        Ok(Self { inner: Arc::new(Inner { id, memory, buffer_len, stride, free }) })
    }

    /// Takes a free buffer, or `None` if all are in use. Its bytes are what the last owner left in them.
    pub fn take(&self) -> Option<Buffer> {
        let index = self.inner.free.pop()?;
        Some(Buffer { pool: Arc::clone(&self.inner), index })
    }

    /// A number no other pool of this process has: a registration made for one pool is recognised by it.
    pub fn id(&self) -> u64 {
        self.inner.id
    }

    /// The mapping that all buffers are part of, to be registered as a whole.
    pub fn memory(&self) -> &Arc<Memory> {
        &self.inner.memory
    }

    /// Length of each buffer, in bytes.
    pub fn buffer_len(&self) -> usize {
        self.inner.buffer_len
    }

    /// Number of buffers that are free at this moment.
    pub fn available(&self) -> usize {
        self.inner.free.length.load(Ordering::Relaxed)
    }

    /// Number of buffers in all.
    pub fn capacity(&self) -> usize {
        self.inner.free.next.len()
    }
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pool")
            .field("id", &self.id())
            .field("buffer_len", &self.buffer_len())
            .field("capacity", &self.capacity())
            .field("available", &self.available())
            .finish()
    }
}

/// Exclusive ownership of one piece of a [`Pool`]; a slice of bytes to its owner. Dropping it returns it to the pool.
pub struct Buffer {
    pool: Arc<Inner>,
    index: usize,
}

impl Buffer {
    /// Virtual address of the first byte.
    pub fn addr(&self) -> u64 {
        self.as_ptr() as u64
    }

    /// The [`Pool::id`] of the pool it belongs to.
    pub fn pool_id(&self) -> u64 {
        self.pool.id
    }

    fn start(&self) -> *mut u8 {
        // SAFETY: `index < count` (only indexes below `count` enter the free list), so the offset is less than
        // `stride * count`, the length of the mapping, which `pool` keeps alive.
        unsafe { self.pool.memory.as_mut_ptr().add(self.index * self.pool.stride) }
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: `start` is valid for `stride >= buffer_len` bytes, initialised (zeroed by the kernel), and owned by
        // this Buffer alone (module documentation); the borrow of self keeps it from being posted or written.
        unsafe { std::slice::from_raw_parts(self.start(), self.pool.buffer_len) }
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`; the exclusive borrow of self makes this the only slice.
        unsafe { std::slice::from_raw_parts_mut(self.start(), self.pool.buffer_len) }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.pool.free.push(self.index);
    }
}

impl std::fmt::Debug for Buffer {
    // Never its bytes: they may be somebody's file.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Buffer").field("pool", &self.pool.id).field("index", &self.index).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn exhaustion_is_an_answer_and_return_makes_room() {
        let pool = Pool::new(100, 2).unwrap();
        let first = pool.take().unwrap();
        let second = pool.take().unwrap();
        assert!(pool.take().is_none());
        assert_eq!((pool.available(), pool.capacity()), (0, 2));
        assert_eq!(first.len(), 100);
        assert!(first.addr().abs_diff(second.addr()) >= 100);
        drop(first);
        assert_eq!(pool.available(), 1);
        assert!(pool.take().is_some());
    }

    #[test]
    fn the_last_one_given_back_is_taken_first() {
        let pool = Pool::new(100, 3).unwrap();
        let (first, second) = (pool.take().unwrap(), pool.take().unwrap());
        let (first_at, second_at) = (first.addr(), second.addr());
        drop(second);
        drop(first);
        assert_eq!(pool.available(), 3);
        let again = [pool.take().unwrap(), pool.take().unwrap(), pool.take().unwrap()];
        assert_eq!([again[0].addr(), again[1].addr()], [first_at, second_at]);
        assert!(pool.take().is_none() && pool.available() == 0);
    }

    #[test]
    fn buffers_go_back_from_other_threads_and_never_overlap() {
        let pool = Pool::new(4096, 16).unwrap();
        std::thread::scope(|scope| {
            for mark in 1..=4u8 {
                let pool = pool.clone();
                scope.spawn(move || {
                    for _ in 0..2000 {
                        let Some(mut buffer) = pool.take() else {
                            std::thread::yield_now();
                            continue;
                        };
                        buffer.fill(mark);
                        assert!(buffer.iter().all(|&byte| byte == mark));
                    }
                });
            }
        });
        let all: Vec<Buffer> = std::iter::from_fn(|| pool.take()).collect();
        let addresses: HashSet<u64> = all.iter().map(Buffer::addr).collect();
        assert_eq!((all.len(), addresses.len()), (16, 16));
    }

    #[test]
    fn buffers_outlive_their_pool() {
        let pool = Pool::new(64, 1).unwrap();
        let mut buffer = pool.take().unwrap();
        drop(pool);
        buffer.fill(7);
        assert_eq!(buffer[63], 7);
    }

    #[test]
    fn page_sized_buffers_are_page_aligned_and_pools_differ() {
        let (a, b) = (Pool::new(8192, 3).unwrap(), Pool::new(8192, 3).unwrap());
        assert_ne!(a.id(), b.id());
        let buffer = a.take().unwrap();
        assert_eq!(buffer.addr() % 4096, 0);
        assert_eq!(buffer.pool_id(), a.id());
        assert!(a.memory().is_exclusive());
    }

    #[test]
    fn nonsense_sizes_are_refused() {
        for (len, count) in [(0, 1), (1, 0), (usize::MAX, 1), (1 << 40, 1 << 40)] {
            assert!(Pool::new(len, count).is_err(), "{len} x {count}");
        }
    }
}
