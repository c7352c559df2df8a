//! The transcript of a bind: everything that both sides must agree on before a byte of the file moves.

use super::schedule::sha256;
use super::{ChannelIdentity, MacPolicy};
use crate::types::{Access, HandleId, VolumeId};
use crate::wire::data;

/// What the client's proof covers. Both ends fill it from what they themselves saw.
#[derive(Clone, Debug)]
pub struct BindTranscript<'a> {
    /// The channel, by its ends.
    pub channel: &'a ChannelIdentity,
    /// The nonce the server gave this channel for this bind.
    pub server_nonce: &'a [u8; 32],
    /// Control's challenge for the open.
    pub open_challenge: &'a [u8; 32],
    /// The client's challenge.
    pub client_challenge: &'a [u8; 32],
    /// The resume key as sent.
    pub resume_key: &'a [u8],
    /// The volume.
    pub volume: VolumeId,
    /// The access wanted.
    pub access: Access,
    /// The MAC policy expected.
    pub policy: MacPolicy,
}

/// What the server's proof covers besides.
#[derive(Clone, Copy, Debug)]
pub struct BindAnswer {
    /// The new handle.
    pub handle: HandleId,
    /// The binding's epoch.
    pub epoch: u64,
    /// Access granted.
    pub access: Access,
    /// Policy in force.
    pub policy: MacPolicy,
}

impl BindTranscript<'_> {
    /// SHA-256 over the fields in fixed order; the one field of variable length enters by its own digest.
    pub fn digest(&self) -> [u8; 32] {
        sha256(&[
            b"holdfast bind v1",
            &[data::VERSION, self.access.bits(), self.policy.number()],
            &self.channel.transcript_bytes(),
            self.server_nonce,
            self.open_challenge,
            self.client_challenge,
            &sha256(&[self.resume_key]),
            &self.volume.0,
        ])
    }
}

impl BindAnswer {
    /// SHA-256 over the transcript's digest and the answer: the server's proof and the channel keys hang on it.
    pub fn digest(&self, transcript: &[u8; 32]) -> [u8; 32] {
        sha256(&[
            b"holdfast bound v1",
            transcript,
            &self.handle.0,
            &self.epoch.to_le_bytes(),
            &[self.access.bits(), self.policy.number()],
        ])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::service::TransportKind;

    /// AUT-02, KEY-10: whatever a man in the middle changes, the digest changes.
    #[test]
    fn every_field_counts() {
        let channel = ChannelIdentity { transport: TransportKind::Verbs, client: [1; 20], server: [2; 20] };
        let base = BindTranscript {
            channel: &channel,
            server_nonce: &[3; 32],
            open_challenge: &[4; 32],
            client_challenge: &[5; 32],
            resume_key: b"key",
            volume: VolumeId([6; 16]),
            access: Access::READ,
            policy: MacPolicy::Header,
        };
        let other = [
            ChannelIdentity { transport: TransportKind::Tcp, ..channel.clone() },
            ChannelIdentity { client: [9; 20], ..channel.clone() },
            ChannelIdentity { client: [2; 20], server: [1; 20], ..channel.clone() },
        ];
        let mut digests = vec![base.digest()];
        digests.extend(other.iter().map(|channel| BindTranscript { channel, ..base.clone() }.digest()));
        digests.push(BindTranscript { server_nonce: &[9; 32], ..base.clone() }.digest());
        digests.push(BindTranscript { open_challenge: &[9; 32], ..base.clone() }.digest());
        digests.push(BindTranscript { client_challenge: &[9; 32], ..base.clone() }.digest());
        digests.push(BindTranscript { resume_key: b"kez", ..base.clone() }.digest());
        digests.push(BindTranscript { volume: VolumeId([9; 16]), ..base.clone() }.digest());
        digests.push(BindTranscript { access: Access::ALL, ..base.clone() }.digest());
        digests.push(BindTranscript { policy: MacPolicy::None, ..base.clone() }.digest());
        let count = digests.len();
        digests.sort_unstable();
        digests.dedup();
        assert_eq!(digests.len(), count);
    }
}
