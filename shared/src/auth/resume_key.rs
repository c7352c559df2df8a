//! Resume keys: opaque to the client, sealed by the server (AES-256-GCM-SIV, RFC 8452, which forgives a
//! repeated nonce).
//!
//! ```text
//!  0      4     5     6          10        22                                          86         102
//! ┌──────┬─────┬─────┬──────────┬─────────┬───────────────────────────────────────────┬──────────┐
//! │ HFRK │ ver │ alg │ key id   │ nonce   │ sealed: cluster 16, volume 16, open 16,    │ tag      │
//! │      │ =1  │ =1  │ u32 LE   │ 12      │ time u64 LE (ms), process u64 LE          │ 16       │
//! └──────┴─────┴─────┴──────────┴─────────┴───────────────────────────────────────────┴──────────┘
//!  └──── associated data ──────────────────┘
//! ```

use super::{BindSecret, Secret};
use crate::types::{ClusterId, OpenId, ProcessId, VolumeId};
use aws_lc_rs::aead::{AES_256_GCM_SIV, Aad, LessSafeKey, Nonce, UnboundKey};
use zeroize::Zeroize;

const MAGIC: [u8; 4] = *b"HFRK";
const VERSION: u8 = 1;
const ALGORITHM: u8 = 1;
const HEADER: usize = 10;
const NONCE: usize = 12;
const SEALED: usize = 64;
const TAG: usize = 16;
const LENGTH: usize = HEADER + NONCE + SEALED + TAG;

/// What a resume key says, for the server that made it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ResumeKey {
    /// Who issued it.
    pub cluster: ClusterId,
    /// On which volume the file is.
    pub volume: VolumeId,
    /// Which open it names. 128 random bits: a key never reaches another open.
    pub open: OpenId,
    /// When the file was opened, milliseconds since 1970.
    pub opened_ms: u64,
    /// The process that opened it.
    pub process: ProcessId,
}

/// Why a resume key was not taken. For the server's own log and counters: to the peer they are all the same.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ResumeKeyError {
    /// Not the length, or not the first bytes, of a resume key.
    #[error("not a resume key")]
    Form,
    /// Of a version or algorithm this server does not take.
    #[error("a resume key of version {0}, algorithm {1}")]
    Version(u8, u8),
    /// Sealed under a key that is not in the ring.
    #[error("sealed under the unknown key {0}")]
    UnknownKey(u32),
    /// Changed, or sealed by another server.
    #[error("the seal is broken")]
    Seal,
    /// Issued by another cluster.
    #[error("issued by another cluster")]
    Cluster,
}

struct Entry {
    id: u32,
    key: LessSafeKey,
}

/// The keys that seal resume keys: the first seals, all open, so that keys can be rotated.
pub struct Keyring {
    cluster: ClusterId,
    entries: Vec<Entry>,
}

impl Keyring {
    /// A ring for one cluster with the key that seals from now on.
    pub fn new(cluster: ClusterId, id: u32, key: &Secret) -> Self {
        Self { cluster, entries: vec![Entry { id, key: aead(key) }] }
    }

    /// Adds an older key that still opens.
    #[must_use]
    pub fn with_older(mut self, id: u32, key: &Secret) -> Self {
        self.entries.push(Entry { id, key: aead(key) });
        self
    }

    /// The cluster it seals for.
    pub const fn cluster(&self) -> ClusterId {
        self.cluster
    }

    /// Seals. `nonce` is 12 bytes of fresh randomness.
    ///
    /// # Panics
    /// Never: the ring holds at least one key, and the library takes every 64-byte message.
    pub fn seal(&self, key: &ResumeKey, nonce: [u8; NONCE]) -> Vec<u8> {
        let entry = &self.entries[0];
        let mut out = Vec::with_capacity(LENGTH);
        out.extend(MAGIC);
        out.extend([VERSION, ALGORITHM]);
        out.extend(entry.id.to_le_bytes());
        out.extend(nonce);
        out.extend(key.cluster.0);
        out.extend(key.volume.0);
        out.extend(key.open.0);
        out.extend(key.opened_ms.to_le_bytes());
        out.extend(key.process.0.to_le_bytes());
        let (aad, body) = out.split_at_mut(HEADER);
        let tag = entry.key.seal_in_place_separate_tag(
            Nonce::assume_unique_for_key(nonce),
            Aad::from(&*aad),
            &mut body[NONCE..],
        );
        match tag {
            Ok(tag) => out.extend(tag.as_ref()),
            Err(_) => unreachable!("AES-GCM-SIV takes every 64-byte message"),
        }
        out
    }

    /// Opens. Length, version and algorithm are looked at before anything else, and nothing is allocated.
    ///
    /// # Errors
    /// See [`ResumeKeyError`]; the peer must not learn which.
    pub fn open(&self, bytes: &[u8]) -> Result<ResumeKey, ResumeKeyError> {
        if bytes.len() != LENGTH || bytes[..4] != MAGIC {
            return Err(ResumeKeyError::Form);
        }
        if (bytes[4], bytes[5]) != (VERSION, ALGORITHM) {
            return Err(ResumeKeyError::Version(bytes[4], bytes[5]));
        }
        let id = u32::from_le_bytes([bytes[6], bytes[7], bytes[8], bytes[9]]);
        let entry = self.entries.iter().find(|e| e.id == id).ok_or(ResumeKeyError::UnknownKey(id))?;
        let nonce = Nonce::try_assume_unique_for_key(&bytes[HEADER..HEADER + NONCE])
            .map_err(|_| ResumeKeyError::Form)?;
        let mut sealed = [0; SEALED + TAG];
        sealed.copy_from_slice(&bytes[HEADER + NONCE..]);
        let plain = entry
            .key
            .open_in_place(nonce, Aad::from(&bytes[..HEADER]), &mut sealed)
            .map_err(|_| ResumeKeyError::Seal)?;
        let id = |at: usize| <[u8; 16]>::try_from(&plain[at..at + 16]).unwrap_or([0; 16]);
        let number =
            |at: usize| u64::from_le_bytes(<[u8; 8]>::try_from(&plain[at..at + 8]).unwrap_or([0; 8]));
        let key = ResumeKey {
            cluster: ClusterId(id(0)),
            volume: VolumeId(id(16)),
            open: OpenId(id(32)),
            opened_ms: number(48),
            process: ProcessId(number(56)),
        };
        if key.cluster == self.cluster { Ok(key) } else { Err(ResumeKeyError::Cluster) }
    }
}

/// Length of a sealed bind secret: key id, nonce, 32 bytes, tag.
const SEALED_SECRET: usize = 4 + NONCE + 32 + TAG;

impl Keyring {
    /// Seals an open's bind secret for the journal: key id u32 LE, nonce, ciphertext, tag. The open's id is associated data, so
    /// that a sealed secret is of no use under another open. `nonce` is 12 bytes of fresh randomness.
    ///
    /// # Panics
    /// Never: see [`Keyring::seal`].
    pub fn seal_secret(&self, open: OpenId, secret: &BindSecret, nonce: [u8; NONCE]) -> Vec<u8> {
        let entry = &self.entries[0];
        let mut out = Vec::with_capacity(SEALED_SECRET);
        out.extend(entry.id.to_le_bytes());
        out.extend(nonce);
        out.extend(secret.secret().expose());
        let tag = entry.key.seal_in_place_separate_tag(
            Nonce::assume_unique_for_key(nonce),
            Aad::from(secret_context(open)),
            &mut out[4 + NONCE..],
        );
        match tag {
            Ok(tag) => out.extend(tag.as_ref()),
            Err(_) => unreachable!("AES-GCM-SIV takes every 32-byte message"),
        }
        out
    }

    /// Opens a sealed bind secret.
    ///
    /// # Errors
    /// See [`ResumeKeyError`].
    pub fn open_secret(&self, open: OpenId, bytes: &[u8]) -> Result<BindSecret, ResumeKeyError> {
        let Some((id, rest)) = bytes.split_first_chunk::<4>() else { return Err(ResumeKeyError::Form) };
        let id = u32::from_le_bytes(*id);
        let entry = self.entries.iter().find(|e| e.id == id).ok_or(ResumeKeyError::UnknownKey(id))?;
        let (Some((nonce, body)), SEALED_SECRET) = (rest.split_first_chunk::<NONCE>(), bytes.len()) else {
            return Err(ResumeKeyError::Form);
        };
        let mut sealed = [0; 32 + TAG];
        sealed.copy_from_slice(body);
        let nonce = Nonce::assume_unique_for_key(*nonce);
        let plain = entry
            .key
            .open_in_place(nonce, Aad::from(secret_context(open)), &mut sealed)
            .map_err(|_| ResumeKeyError::Seal)?;
        let mut secret = [0; 32];
        secret.copy_from_slice(plain);
        sealed.zeroize();
        let opened = BindSecret::new(Secret::new(secret));
        secret.zeroize();
        Ok(opened)
    }
}

/// Associated data of a sealed bind secret: never equal to that of a resume key, which begins with its magic.
fn secret_context(open: OpenId) -> [u8; 24] {
    let mut context = *b"bind kr.________________";
    context[8..].copy_from_slice(&open.0);
    context
}

impl std::fmt::Debug for Keyring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let ids: Vec<u32> = self.entries.iter().map(|e| e.id).collect();
        f.debug_struct("Keyring").field("cluster", &self.cluster).field("key_ids", &ids).finish()
    }
}

fn aead(secret: &Secret) -> LessSafeKey {
    match UnboundKey::new(&AES_256_GCM_SIV, secret.expose()) {
        Ok(key) => LessSafeKey::new(key),
        Err(_) => unreachable!("AES-256 takes every key of 32 bytes"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn ring(cluster: u8, key: u8) -> Keyring {
        Keyring::new(ClusterId([cluster; 16]), 1, &Secret::new([key; 32]))
    }

    fn sample(cluster: u8) -> ResumeKey {
        ResumeKey {
            cluster: ClusterId([cluster; 16]),
            volume: VolumeId([2; 16]),
            open: OpenId([3; 16]),
            opened_ms: 4,
            process: ProcessId(5),
        }
    }

    /// KEY-01, KEY-09, KEY-11: only the very bytes that this server sealed are taken.
    #[test]
    fn key_01_only_the_sealed_bytes_open() {
        let ring1 = ring(1, 1);
        let bytes = ring1.seal(&sample(1), [7; 12]);
        assert_eq!(bytes.len(), LENGTH);
        assert_eq!(ring1.open(&bytes).unwrap(), sample(1));
        for bit in 0..bytes.len() * 8 {
            let mut copy = bytes.clone();
            copy[bit / 8] ^= 1 << (bit % 8);
            assert!(ring1.open(&copy).is_err(), "bit {bit}");
        }
        for cut in 0..bytes.len() {
            assert!(ring1.open(&bytes[..cut]).is_err());
        }
        assert!(ring1.open(&[bytes.as_slice(), &[0]].concat()).is_err());
        assert_eq!(ring(1, 2).open(&bytes), Err(ResumeKeyError::Seal), "another server's key");
        assert_eq!(ring(2, 1).open(&bytes), Err(ResumeKeyError::Cluster), "another cluster");
        let mut old = bytes.clone();
        old[4] = 0;
        assert_eq!(ring1.open(&old), Err(ResumeKeyError::Version(0, 1)), "before any other parsing");
    }

    /// KEY-05: what the journal holds of a secret opens only with the server's key, and only under its own open.
    #[test]
    fn key_05_a_sealed_secret_is_of_no_use_without_the_key() {
        let (ring1, open) = (ring(1, 1), OpenId([3; 16]));
        let secret = BindSecret::new(Secret::new([0x77; 32]));
        let sealed = ring1.seal_secret(open, &secret, [7; 12]);
        assert!(!sealed.windows(4).any(|w| w == [0x77; 4]), "not in clear");
        assert!(ring1.open_secret(open, &sealed).unwrap() == secret);
        assert_eq!(ring1.open_secret(OpenId([4; 16]), &sealed).err(), Some(ResumeKeyError::Seal));
        assert_eq!(ring(1, 2).open_secret(open, &sealed).err(), Some(ResumeKeyError::Seal));
        for at in 0..sealed.len() {
            let mut copy = sealed.clone();
            copy[at] ^= 1;
            assert!(ring1.open_secret(open, &copy).is_err(), "byte {at}");
            assert!(ring1.open_secret(open, &sealed[..at]).is_err());
        }
    }

    #[test]
    fn keys_rotate() {
        let old = ring(1, 1).seal(&sample(1), [7; 12]);
        let new =
            Keyring::new(ClusterId([1; 16]), 2, &Secret::new([9; 32])).with_older(1, &Secret::new([1; 32]));
        assert_eq!(new.open(&old).unwrap(), sample(1));
        assert_eq!(ring(1, 1).open(&new.seal(&sample(1), [8; 12])), Err(ResumeKeyError::UnknownKey(2)));
    }

    proptest! {
        #[test]
        fn noise_never_opens_nor_panics(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            prop_assert!(ring(1, 1).open(&bytes).is_err());
        }
    }
}
