//! What a block holds, so that it can be told whether it is whole, where it belongs, and which write it is of.
//!
//! ```text
//!   0        8        16           24                                    block
//!   │ MAGIC  │ number │ generation │ words made from number and generation │
//! ```

const MAGIC: u64 = u64::from_le_bytes(*b"holdfast");
const WORD: usize = 8;

/// The smallest block that can be checked, bytes.
#[cfg(test)]
const LEAST: usize = 4 * WORD;

/// The words that follow the first three (splitmix64).
fn words(number: u64, generation: u64) -> impl Iterator<Item = u64> {
    let mut state = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ generation.rotate_left(32);
    std::iter::repeat_with(move || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    })
}

fn content(number: u64, generation: u64) -> impl Iterator<Item = u64> {
    [MAGIC, number, generation].into_iter().chain(words(number, generation))
}

/// Fills a block, whose length is a multiple of 8.
pub(super) fn fill(block: &mut [u8], number: u64, generation: u64) {
    for (bytes, word) in block.chunks_exact_mut(WORD).zip(content(number, generation)) {
        bytes.copy_from_slice(&word.to_le_bytes());
    }
}

/// Checks a block, and gives the generation of the write that it is of.
///
/// # Errors
/// What is wrong with it, in words.
pub(super) fn check(block: &[u8], number: u64) -> Result<u64, String> {
    let word = |n: usize| {
        let bytes = block.get(n * WORD..(n + 1) * WORD).and_then(|bytes| bytes.try_into().ok());
        bytes.map_or(0, u64::from_le_bytes)
    };
    let (magic, found, generation) = (word(0), word(1), word(2));
    if magic != MAGIC {
        return Err(format!("block {number} was not written by `holdfast bench --verify`, or is lost"));
    }
    if found != number {
        return Err(format!("block {number} holds block {found}"));
    }
    let wrong =
        content(number, generation).zip(block.chunks_exact(WORD)).position(|(w, b)| w.to_le_bytes() != *b);
    match wrong {
        Some(at) => {
            Err(format!("block {number} is torn: of write {generation} up to byte {}, not after", at * WORD))
        }
        None => Ok(generation),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_is_known_and_any_damage_is_seen() {
        let mut block = vec![0; 4096];
        assert!(check(&block, 7).unwrap_err().contains("not written"));
        fill(&mut block, 7, 3);
        assert_eq!(check(&block, 7), Ok(3));
        assert!(check(&block, 8).unwrap_err().contains("holds block 7"));
        let mut newer = vec![0; 4096];
        fill(&mut newer, 7, 4);
        let torn = [&newer[..1024], &block[1024..]].concat();
        assert!(check(&torn, 7).unwrap_err().contains("torn"));
        for at in [WORD * 2, LEAST, 4095] {
            let mut damaged = block.clone();
            damaged[at] ^= 1;
            assert!(check(&damaged, 7).is_err(), "{at}");
        }
    }
}
