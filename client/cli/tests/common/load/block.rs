//! Blocks that say who wrote them, and show whether they are whole.
//!
//! ```text
//!   0        8        16        24                                        4064           4096
//!   │ writer │ block  │ sequence │ bytes that follow from these three ... │ BLAKE3 of all before │
//! ```

/// What one write must not be torn within.
pub const BLOCK: usize = 4096;
const BODY: usize = BLOCK - 32;

/// Who wrote a block, and when.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Stamp {
    pub writer: u64,
    pub block: u64,
    pub sequence: u64,
}

impl Stamp {
    /// The block with this stamp.
    pub fn fill(self, bytes: &mut [u8]) {
        let (body, digest) = bytes[..BLOCK].split_at_mut(BODY);
        let mut state = self.writer ^ self.block.rotate_left(20) ^ self.sequence.rotate_left(40);
        for (n, word) in body.chunks_exact_mut(8).enumerate() {
            let value = match n {
                0 => self.writer,
                1 => self.block,
                2 => self.sequence,
                _ => {
                    state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
                    state
                }
            };
            word.copy_from_slice(&value.to_le_bytes());
        }
        digest.copy_from_slice(blake3::hash(body).as_bytes());
    }

    /// The stamp of a block; `None` if nothing was ever written there.
    ///
    /// # Errors
    /// If the block is not whole.
    pub fn of(bytes: &[u8]) -> Result<Option<Self>, String> {
        if bytes.iter().all(|&byte| byte == 0) {
            return Ok(None);
        }
        if bytes.len() != BLOCK {
            return Err(format!("a block of {} bytes", bytes.len()));
        }
        let (body, digest) = bytes.split_at(BODY);
        let word = |n: usize| u64::from_le_bytes(body[8 * n..8 * n + 8].try_into().unwrap());
        let stamp = Self { writer: word(0), block: word(1), sequence: word(2) };
        if blake3::hash(body).as_bytes() != digest {
            return Err(format!("a torn block; its head says {stamp:?}"));
        }
        Ok(Some(stamp))
    }
}

/// A row of numbers that a seed decides.
pub struct Dice(u64);

impl Dice {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// SplitMix64.
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// One of `0..n`.
    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
}
