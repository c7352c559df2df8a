//! MACs of data frames: BLAKE3 keyed, cut to 128 bits.

use super::{DirectionKeys, Secret};
use crate::wire::data::{Frame, TAG_BYTES};
use minicbor::{Decode, Encode};
use subtle::ConstantTimeEq;

/// What protects the frames and payloads of a volume's channels.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord, Default, Encode, Decode)]
#[cbor(index_only)]
pub enum MacPolicy {
    /// Nothing; an operator must spell it out. For private networks only.
    #[n(0)]
    None,
    /// Every frame carries a MAC over header and body.
    #[n(1)]
    #[default]
    Header,
    /// The same, and the body holds a digest of the payload.
    #[n(2)]
    Payload,
    /// The same, and the payload is encrypted.
    #[n(3)]
    Sealed,
}

impl MacPolicy {
    /// As it travels in data frames and transcripts.
    pub const fn number(self) -> u8 {
        match self {
            Self::None => 0,
            Self::Header => 1,
            Self::Payload => 2,
            Self::Sealed => 3,
        }
    }

    /// Reads it as it travelled.
    pub const fn from_number(number: u8) -> Option<Self> {
        Some(match number {
            0 => Self::None,
            1 => Self::Header,
            2 => Self::Payload,
            3 => Self::Sealed,
            _ => return None,
        })
    }

    /// True if payloads are digested or encrypted: then a transfer is handled in one piece.
    pub const fn covers_payload(self) -> bool {
        matches!(self, Self::Payload | Self::Sealed)
    }
}

/// The key that one side of one binding uses for its frames, or none under policy `none`.
#[derive(Clone, Debug)]
pub struct FrameKey(Option<Secret>);

impl FrameKey {
    /// The frame key of one direction under a policy.
    pub fn new(keys: &DirectionKeys, policy: MacPolicy) -> Self {
        Self((policy != MacPolicy::None).then(|| keys.frame.clone()))
    }

    /// The key of frames outside any binding: their MAC is zero.
    pub const fn unkeyed() -> Self {
        Self(None)
    }

    /// Writes the MAC over `covered`; zeros without a key. Fits [`crate::wire::data::Writer::finish`].
    pub fn sign(&self, covered: &[u8], mac: &mut [u8; TAG_BYTES]) {
        *mac = self.tag(covered);
    }

    /// True if the frame's MAC is right; compared in constant time.
    pub fn verify(&self, frame: &Frame<'_>) -> bool {
        self.tag(frame.covered).ct_eq(frame.mac).into()
    }

    fn tag(&self, covered: &[u8]) -> [u8; TAG_BYTES] {
        let mut tag = [0; TAG_BYTES];
        if let Some(key) = &self.0 {
            tag.copy_from_slice(&blake3::keyed_hash(key.expose(), covered).as_bytes()[..TAG_BYTES]);
        }
        tag
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::data::{Flush, Opcode, Writer};

    #[test]
    fn any_flipped_bit_is_noticed() {
        let keys = DirectionKeys { frame: Secret::new([1; 32]), payload: Secret::new([2; 32]) };
        let key = FrameKey::new(&keys, MacPolicy::Header);
        let mut buffer = [0; 128];
        let mut w = Writer::new(&mut buffer, Opcode::Flush, 0, 1, 2, 3).unwrap();
        w.body(&Flush { reserved: 0.into() }).unwrap();
        let n = w.finish(|covered, mac| key.sign(covered, mac));
        assert!(key.verify(&Frame::parse(&buffer[..n]).unwrap()));
        for bit in 0..n * 8 {
            let mut copy = buffer;
            copy[bit / 8] ^= 1 << (bit % 8);
            assert!(!Frame::parse(&copy[..n]).is_ok_and(|f| key.verify(&f)), "bit {bit}");
        }
        assert!(!FrameKey::unkeyed().verify(&Frame::parse(&buffer[..n]).unwrap()));
    }
}
