//! Binds: who may attach a data channel to an open (transitions 403 to 407 of the seed, control's half).
//!
//! Order matters. First that the key is ours, names a live open, and was proven on this very channel: any
//! failure there is [`Status::BadKey`], after the same work. Only somebody who has proven the key learns more.

use super::table::{Binding, Open};
use super::{Authority, Effect, Fresh};
use crate::auth::{BindAnswer, BindSecret, BindTranscript, Secret};
use crate::types::{Access, HandleId, OpenId, Status};
use crate::wire::link::{Grant, Redeem};

impl Authority {
    pub(super) fn redeem(&mut self, redeem: &Redeem, fresh: &Fresh, effects: &mut Vec<Effect>) {
        match self.grant(redeem, fresh) {
            Ok((file, grant)) => {
                let open = grant.open;
                effects.push(Effect::Grant { id: redeem.id, file, grant: Box::new(grant) });
                // Whoever proves the new secret knows of the resume. Behind the grant, which need not wait for that.
                self.heard(open, effects);
            }
            Err(status) => effects.push(Effect::RefuseBind { id: redeem.id, status }),
        }
    }

    fn grant(&mut self, redeem: &Redeem, fresh: &Fresh) -> Result<(super::FileId, Grant), Status> {
        let (id, transcript) = self.prove(redeem).ok_or(Status::BadKey)?;
        let limit = self.limits.bindings_per_open;
        let open = self.opens.get(id).ok_or(Status::BadKey)?;
        if open.journalled > self.journal.durable {
            // What the bind relies on could still be lost; the client has not been answered either.
            return Err(Status::Unavailable);
        }
        if open.rules.loosened > self.journal.durable {
            // So could the end of a lock that the grant's rules would not have any more.
            return Err(Status::Unavailable);
        }
        if redeem.policy != open.policy {
            return Err(Status::Invalid);
        }
        // A channel moves bytes: the right to delete is exercised at control.
        let moves = Access::READ | Access::WRITE;
        if redeem.access.is_empty() || !open.access().intersection(moves).contains(redeem.access) {
            return Err(Status::AccessDenied);
        }
        if open.bindings.len() >= limit {
            return Err(Status::TooMany);
        }
        // Whoever has it can't be fenced: so not even the kernel lets it write.
        let descriptor = redeem.access == Access::READ
            && !open.access().contains(Access::WRITE)
            && self.volumes.local_descriptors(open.volume());
        let direct = self.volumes.direct(open.volume());
        let answer = BindAnswer {
            handle: HandleId::from_random(fresh.handle),
            epoch: open.epoch,
            access: redeem.access,
            policy: open.policy,
        };
        let answered = answer.digest(&transcript);
        let (proof, keys) = (open.secret.server_proof(&answered), open.secret.channel_keys(&answered));
        let (file, rules, rules_version) = (open.file, open.rules.rules.clone(), open.rules.version);
        let binding = Binding { handle: answer.handle, epoch: answer.epoch, transcript, fencing: false };
        let binding = self.opens.bind(id, binding).ok_or(Status::BadKey)?;
        let BindAnswer { handle, epoch, access, policy } = answer;
        let grant = Grant {
            binding,
            open: id,
            handle,
            epoch,
            access,
            policy,
            proof,
            keys,
            rules,
            rules_version,
            transcript,
            descriptor,
            direct,
        };
        Ok((file, grant))
    }

    /// The open whose key was proven, and the digest of the transcript; `None` says nothing about why.
    fn prove(&self, redeem: &Redeem) -> Option<(OpenId, [u8; 32])> {
        let key = self.keyring.open(&redeem.resume_key).ok();
        let open = key.and_then(|key| Some((key.open, self.opens.get(key.open)?)));
        let open =
            open.filter(|(_, open)| open.is_active() && key.is_some_and(|key| key.volume == open.volume()));
        // Without an open the same work is done over a secret that proves nothing, so that time tells nothing.
        let nothing = BindSecret::new(Secret::new([0; 32]));
        let (secret, challenge, volume) = match open {
            Some((_, Open { secret, challenge, at, .. })) => (secret, challenge, at.volume),
            None => (&nothing, &redeem.client_challenge, crate::types::VolumeId::NONE),
        };
        let transcript = BindTranscript {
            channel: &redeem.channel,
            server_nonce: &redeem.server_nonce,
            open_challenge: challenge,
            client_challenge: &redeem.client_challenge,
            resume_key: &redeem.resume_key,
            volume,
            access: redeem.access,
            policy: redeem.policy,
        };
        let digest = transcript.digest();
        let right = secret.client_proof_is_right(&digest, &redeem.proof);
        let (id, open) = open?;
        (right && !open.has_seen(&digest)).then_some((id, digest))
    }
}
