//! The key schedule: HKDF-SHA256 (RFC 5869) from the TLS exporter down to the keys of one channel.

use super::{ChannelKeys, DirectionKeys, Secret};
use crate::types::OpenId;
use aws_lc_rs::{digest, hkdf, hmac};
use subtle::ConstantTimeEq;

/// Label of the TLS exporter (RFC 8446 section 7.5) that gives the session key; its context is empty, its
/// length 32 bytes.
pub const EXPORTER_LABEL: &[u8] = b"EXPORTER-Holdfast-session-v1";

struct Len32;

impl hkdf::KeyType for Len32 {
    fn len(&self) -> usize {
        32
    }
}

/// HKDF-Extract then -Expand to 32 bytes. The lengths are constants far below HKDF's limit, so the library's
/// errors cannot occur; if they ever did, the result would be a value neither side can use by accident twice.
fn derive(ikm: &[u8], salt: &[u8], info: &[&[u8]]) -> Secret {
    let prk = hkdf::Salt::new(hkdf::HKDF_SHA256, salt).extract(ikm);
    let mut out = [0; 32];
    let filled = prk.expand(info, Len32).and_then(|okm| okm.fill(&mut out));
    assert!(filled.is_ok(), "HKDF of 32 bytes cannot fail");
    Secret::new(out)
}

/// SHA-256.
pub(super) fn sha256(parts: &[&[u8]]) -> [u8; 32] {
    let mut context = digest::Context::new(&digest::SHA256);
    for part in parts {
        context.update(part);
    }
    let mut out = [0; 32];
    out.copy_from_slice(context.finish().as_ref());
    out
}

/// K1: the key of one session, from the TLS exporter.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SessionKey(Secret);

impl SessionKey {
    /// Takes the exporter's 32 bytes.
    pub const fn new(exported: Secret) -> Self {
        Self(exported)
    }

    /// Kr, the bind secret of one open.
    pub fn bind_secret(&self, open: OpenId) -> BindSecret {
        BindSecret(derive(self.0.expose(), b"holdfast v1", &[b"resume", &open.0]))
    }
}

/// Kr: the secret that proves a resume key. It outlives the session it came from.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BindSecret(Secret);

impl BindSecret {
    /// From stored bytes.
    pub const fn new(secret: Secret) -> Self {
        Self(secret)
    }

    /// The bytes, to be stored sealed.
    pub const fn secret(&self) -> &Secret {
        &self.0
    }

    /// One key for each role, so that a proof reflected to its sender is never right.
    fn mac(&self, role: &[u8]) -> hmac::Key {
        hmac::Key::new(hmac::HMAC_SHA256, derive(self.0.expose(), b"holdfast v1", &[role]).expose())
    }

    /// The client's proof over a transcript digest.
    pub fn client_proof(&self, transcript: &[u8; 32]) -> [u8; 32] {
        sign(&self.mac(b"client proof"), transcript)
    }

    /// The server's proof over the digest of transcript and answer.
    pub fn server_proof(&self, answered: &[u8; 32]) -> [u8; 32] {
        sign(&self.mac(b"server proof"), answered)
    }

    /// Checks the client's proof in constant time.
    pub fn client_proof_is_right(&self, transcript: &[u8; 32], proof: &[u8; 32]) -> bool {
        self.client_proof(transcript).ct_eq(proof).into()
    }

    /// Checks the server's proof in constant time.
    pub fn server_proof_is_right(&self, answered: &[u8; 32], proof: &[u8; 32]) -> bool {
        self.server_proof(answered).ct_eq(proof).into()
    }

    /// The keys of one binding on one channel.
    pub fn channel_keys(&self, answered: &[u8; 32]) -> ChannelKeys {
        let key = |label: &[u8]| derive(self.0.expose(), answered, &[label]);
        ChannelKeys {
            to_server: DirectionKeys { frame: key(b"frame c2s"), payload: key(b"payload c2s") },
            to_client: DirectionKeys { frame: key(b"frame s2c"), payload: key(b"payload s2c") },
        }
    }
}

fn sign(key: &hmac::Key, message: &[u8]) -> [u8; 32] {
    let mut out = [0; 32];
    out.copy_from_slice(hmac::sign(key, message).as_ref());
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kr(n: u8) -> BindSecret {
        SessionKey::new(Secret::new([n; 32])).bind_secret(OpenId([9; 16]))
    }

    #[test]
    fn aut_09_every_label_gives_another_key() {
        let keys = kr(1).channel_keys(&[3; 32]);
        let all = [
            &keys.to_server.frame,
            &keys.to_server.payload,
            &keys.to_client.frame,
            &keys.to_client.payload,
            &kr(1).0,
            &kr(2).0,
        ];
        for (i, a) in all.iter().enumerate() {
            assert!(all[..i].iter().all(|b| a != b), "key {i} repeats");
        }
        assert_ne!(keys, kr(1).channel_keys(&[4; 32]), "another transcript");
        assert_ne!(keys, kr(2).channel_keys(&[3; 32]), "another session");
    }

    #[test]
    fn aut_01_proofs_are_bound_to_role_secret_and_transcript() {
        let t = [5; 32];
        let proof = kr(1).client_proof(&t);
        assert!(kr(1).client_proof_is_right(&t, &proof));
        assert!(!kr(1).server_proof_is_right(&t, &proof), "reflected");
        assert!(!kr(2).client_proof_is_right(&t, &proof), "wrong secret");
        assert!(!kr(1).client_proof_is_right(&[6; 32], &proof), "another transcript");
    }

    /// Golden, from an independent HKDF: both ends derive this, so a change is a change of the protocol.
    #[test]
    fn the_schedule_is_fixed() {
        assert_eq!(kr(1).client_proof(&[0; 32])[..4], GOLDEN_CLIENT);
        assert_eq!(kr(1).channel_keys(&[0; 32]).to_client.frame.expose()[..4], GOLDEN_FRAME);
    }
    const GOLDEN_CLIENT: [u8; 4] = [91, 71, 194, 80];
    const GOLDEN_FRAME: [u8; 4] = [251, 146, 44, 51];
}
