//! Protection of payloads: AES-256-GCM, as a tag alone (GMAC) under policy `payload`, with encryption under
//! `sealed`.
//!
//! The nonce is the sequence number of the frame that carries the tag. A sequence is used once per direction
//! and the keys belong to one binding, so no nonce repeats under a key.

use super::{DirectionKeys, MacPolicy, Secret};
use crate::wire::data::TAG_BYTES;
use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};

/// A payload that is not what its sender sent.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the payload does not match its digest")]
pub struct PayloadError;

enum Mode {
    Off,
    Digest(LessSafeKey),
    Seal(LessSafeKey),
}

/// One direction's payload key under a policy.
pub struct PayloadKey(Mode);

fn nonce(sequence: u64) -> Nonce {
    let mut bytes = [0; 12];
    bytes[4..].copy_from_slice(&sequence.to_le_bytes());
    Nonce::assume_unique_for_key(bytes)
}

fn aead(secret: &Secret) -> LessSafeKey {
    match UnboundKey::new(&AES_256_GCM, secret.expose()) {
        Ok(key) => LessSafeKey::new(key),
        Err(_) => unreachable!("AES-256 takes every key of 32 bytes"),
    }
}

impl PayloadKey {
    /// The payload key of one direction.
    pub fn new(keys: &DirectionKeys, policy: MacPolicy) -> Self {
        Self(match policy {
            MacPolicy::None | MacPolicy::Header => Mode::Off,
            MacPolicy::Payload => Mode::Digest(aead(&keys.payload)),
            MacPolicy::Sealed => Mode::Seal(aead(&keys.payload)),
        })
    }

    /// Prepares a payload for sending, encrypting it in place under `sealed`. `None` if the policy has no digest.
    ///
    /// # Errors
    /// [`PayloadError`] if the library refuses (a payload beyond AES-GCM's 64 GiB).
    pub fn protect(
        &self,
        sequence: u64,
        payload: &mut [u8],
    ) -> Result<Option<[u8; TAG_BYTES]>, PayloadError> {
        let tag = match &self.0 {
            Mode::Off => return Ok(None),
            Mode::Digest(key) => {
                key.seal_in_place_separate_tag(nonce(sequence), Aad::from(&*payload), &mut [])
            }
            Mode::Seal(key) => key.seal_in_place_separate_tag(nonce(sequence), Aad::empty(), payload),
        };
        let tag = tag.map_err(|_| PayloadError)?;
        tag.as_ref().try_into().map(Some).map_err(|_| PayloadError)
    }

    /// Checks a received payload, decrypting it in place under `sealed`.
    ///
    /// # Errors
    /// [`PayloadError`] if the digest is missing or wrong, or is there under a policy without one; under
    /// `sealed` the payload is then zeroed.
    pub fn check(
        &self,
        sequence: u64,
        payload: &mut [u8],
        tag: Option<&[u8; TAG_BYTES]>,
    ) -> Result<(), PayloadError> {
        match (&self.0, tag) {
            (Mode::Off, None) => Ok(()),
            (Mode::Digest(key), Some(tag)) => key
                .open_separate_gather(nonce(sequence), Aad::from(&*payload), &[], tag, &mut [])
                .map_err(|_| PayloadError),
            (Mode::Seal(key), Some(tag)) => {
                let opened =
                    key.open_in_place_separate_tag(nonce(sequence), Aad::empty(), tag, payload).is_ok();
                if !opened {
                    // The library may have decrypted what turned out to be forged.
                    payload.fill(0);
                    return Err(PayloadError);
                }
                Ok(())
            }
            _ => Err(PayloadError),
        }
    }

    /// True if a digest travels with each payload.
    pub const fn is_on(&self) -> bool {
        !matches!(self.0, Mode::Off)
    }
}

impl std::fmt::Debug for PayloadKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("PayloadKey(..)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(policy: MacPolicy) -> PayloadKey {
        PayloadKey::new(&DirectionKeys { frame: Secret::new([1; 32]), payload: Secret::new([2; 32]) }, policy)
    }

    #[test]
    fn payloads_come_back_and_changes_are_noticed() {
        for policy in [MacPolicy::Payload, MacPolicy::Sealed] {
            let key = key(policy);
            let mut bytes = *b"some bytes of a file";
            let tag = key.protect(7, &mut bytes).unwrap().unwrap();
            assert_eq!(&bytes == b"some bytes of a file", policy == MacPolicy::Payload);
            let sent = bytes;
            key.check(7, &mut bytes, Some(&tag)).unwrap();
            assert_eq!(&bytes, b"some bytes of a file");
            assert!(key.check(8, &mut sent.clone(), Some(&tag)).is_err(), "another sequence");
            assert!(key.check(7, &mut sent.clone(), None).is_err(), "no tag");
            let mut flipped = sent;
            flipped[3] ^= 1;
            assert!(key.check(7, &mut flipped, Some(&tag)).is_err());
            assert_ne!(&flipped[..], b"some bytes of a file", "plain text never shows after a failure");
        }
    }

    #[test]
    fn without_a_digest_none_is_made_or_taken() {
        assert_eq!(key(MacPolicy::Header).protect(0, &mut [1]).unwrap(), None);
        assert!(key(MacPolicy::Header).check(0, &mut [1], Some(&[0; 16])).is_err());
    }
}
