//! Keys, proofs and bindings.

use super::world::*;
use crate::auth::{BindAnswer, MacPolicy};
use crate::state::{Effect, Input, Limits};
use crate::types::{Access, ShareMode, Status};
use crate::wire::control::{Opened, Rename, Reply, Request, SetAttributes, Target};
use crate::wire::link::{Fence, Redeem};

fn bound() -> (World, Opened) {
    let mut world = World::new();
    let session = world.begin(1, "u1");
    world.give(Input::LinkUp { service_blob: b"blob".to_vec(), held: Vec::new() });
    let held = world.open(session, open(1, RW, ShareMode::ALL), 5);
    assert_eq!(held.key.service_blob, b"blob");
    (world, held)
}

/// KEY-01: whatever is changed in the key, the answer is the same, and nothing happens.
#[test]
fn key_01_a_changed_key_is_a_bad_key() {
    let (mut world, held) = bound();
    let good = right(&session_key(1), &held, 1, RW);
    let before = world.authority.counts();
    let mut wrong: Vec<Vec<u8>> = (0..good.resume_key.len()).map(|n| good.resume_key[..n].to_vec()).collect();
    wrong.extend((1..=64).map(|n| [good.resume_key.clone(), vec![0; n]].concat()));
    for bit in 0..good.resume_key.len() * 8 {
        let mut key = good.resume_key.clone();
        key[bit / 8] ^= 1 << (bit % 8);
        wrong.push(key);
    }
    for resume_key in wrong {
        // Proven or not: the client may well have the secret.
        let mut redeem = Redeem { resume_key, ..good.clone() };
        assert_eq!(world.redeem(redeem.clone()).err(), Some(Status::BadKey));
        prove(&session_key(1), &held, &mut redeem);
        assert_eq!(world.redeem(redeem).err(), Some(Status::BadKey));
    }
    assert_eq!(world.authority.counts(), before);
    world.redeem(good).unwrap();
}

/// KEY-06: another user who has the key but not the secret.
#[test]
fn key_06_a_key_without_its_secret_is_a_bad_key() {
    let (mut world, held) = bound();
    world.begin(2, "u2");
    assert_eq!(world.redeem(right(&session_key(2), &held, 1, RW)).err(), Some(Status::BadKey));
}

/// KEY-09: a key of another cluster, whose server runs the same software for the same user.
#[test]
fn key_09_another_servers_key_is_a_bad_key() {
    let (mut world, _) = bound();
    let mut other = World::with(Limits::default(), 2);
    let session = other.begin(1, "u1");
    let theirs = other.open(session, open(1, RW, ShareMode::ALL), 5);
    assert_eq!(world.redeem(right(&session_key(1), &theirs, 1, RW)).err(), Some(Status::BadKey));
}

/// KEY-10, AUT-01, AUT-02: a proof is for one channel, one nonce, one request, once.
#[test]
fn key_10_a_proof_fits_one_bind_only() {
    let (mut world, held) = bound();
    let good = right(&session_key(1), &held, 1, RW);
    let mut other_channel = good.clone();
    other_channel.channel.server[3] ^= 1;
    let mut swapped = good.clone();
    std::mem::swap(&mut swapped.channel.client, &mut swapped.channel.server);
    for wrong in [
        other_channel,
        swapped,
        Redeem { server_nonce: [2; 32], ..good.clone() },
        Redeem { client_challenge: [2; 32], ..good.clone() },
        Redeem { access: Access::READ, ..good.clone() },
        Redeem { policy: MacPolicy::None, ..good.clone() },
        Redeem { proof: [0; 32], ..good.clone() },
    ] {
        assert_eq!(world.redeem(wrong).err(), Some(Status::BadKey));
    }
    let grant = world.redeem(good.clone()).unwrap();
    assert_eq!(world.redeem(good.clone()).err(), Some(Status::BadKey), "replayed");
    // Reflected: control's own proof is not a client's.
    assert_eq!(world.redeem(Redeem { proof: grant.proof, ..good }).err(), Some(Status::BadKey));
}

#[test]
fn aut_01_the_grant_proves_control_to_the_client() {
    let (mut world, held) = bound();
    let redeem = right(&session_key(1), &held, 1, Access::READ);
    let grant = world.redeem(redeem.clone()).unwrap();
    assert_eq!((grant.open, grant.access, grant.epoch), (held.open, Access::READ, 1));
    let digest = crate::auth::BindTranscript {
        channel: &redeem.channel,
        server_nonce: &redeem.server_nonce,
        open_challenge: &held.key.challenge,
        client_challenge: &redeem.client_challenge,
        resume_key: &redeem.resume_key,
        volume: held.key.volume,
        access: redeem.access,
        policy: redeem.policy,
    }
    .digest();
    let answer =
        BindAnswer { handle: grant.handle, epoch: grant.epoch, access: grant.access, policy: grant.policy };
    let secret = session_key(1).bind_secret(held.open);
    assert!(secret.server_proof_is_right(&answer.digest(&digest), &grant.proof));
    assert!(secret.channel_keys(&answer.digest(&digest)) == grant.keys);
}

#[test]
fn who_has_proven_the_key_is_told_plainly() {
    let (mut world, held) = bound();
    let key = session_key(1);
    let mut weaker = right(&key, &held, 1, RW);
    weaker.policy = MacPolicy::None;
    prove(&key, &held, &mut weaker);
    assert_eq!(world.redeem(weaker).err(), Some(Status::Invalid), "no downgrade");
    assert_eq!(world.redeem(right(&key, &held, 1, Access::ALL)).err(), Some(Status::AccessDenied));
    assert_eq!(world.redeem(right(&key, &held, 1, Access::NONE)).err(), Some(Status::AccessDenied));
    for nonce in 0..64 {
        world.bind(&key, &held, nonce);
    }
    assert_eq!(world.redeem(right(&key, &held, 64, RW)).err(), Some(Status::TooMany));
}

/// KEY-07: from the close on, the key is dead.
#[test]
fn key_07_a_closed_open_has_no_key() {
    let (mut world, held) = bound();
    let session = crate::types::SessionId([1; 16]);
    assert!(closes(&world.ask(session, close(held.open))));
    assert_eq!(world.redeem(right(&session_key(1), &held, 1, RW)).err(), Some(Status::BadKey));
}

/// Silence is no proof: only a death or a new registration ends what was bound.
#[test]
fn opn_08_a_closed_link_ends_no_binding_until_dataplane_registers_or_dies() {
    for dies in [false, true] {
        let (mut world, held) = bound();
        let session = crate::types::SessionId([1; 16]);
        let exclusive = world.open(session, open(2, RW, ShareMode::NONE), 6);
        world.bind(&session_key(1), &held, 1);
        world.bind(&session_key(1), &exclusive, 1);
        assert!(world.give(Input::LinkDown).is_empty());
        assert_eq!(world.authority.counts().bindings, 2);
        assert_eq!(fences(&world.ask(session, close(exclusive.open))).len(), 1, "the close waits");
        let rival = world.try_open(session, open(3, Access::READ, ShareMode::ALL), 6);
        assert_eq!(refusal(&rival), Status::ShareConflict);
        // What is opened meanwhile cannot be bound.
        let later = world.open(session, open(4, RW, ShareMode::ALL), 7);
        assert!(later.key.service_blob.is_empty());
        let up = Input::LinkUp { service_blob: b"next".to_vec(), held: Vec::new() };
        assert!(closes(&world.give(if dies { Input::LinkLost } else { up })));
        let counts = world.authority.counts();
        assert_eq!((counts.opens, counts.bindings, counts.fences), (2, 0, 0));
        opened(&world.try_open(session, open(3, Access::READ, ShareMode::ALL), 6));
    }
}

/// A control that starts beside a living dataplane does not know what that still serves.
#[test]
fn nothing_is_granted_while_an_earlier_controls_dataplane_may_live() {
    let size = SetAttributes {
        target: Target::Path(place("file")),
        size: Some(0),
        mode: None,
        accessed: None,
        modified: None,
    };
    let rename = Rename { from: place("file"), to: place("other"), no_replace: false };
    for dies in [false, true] {
        let mut world = World::new();
        world.give(Input::DataplaneMayLive);
        let session = world.begin(1, "u1");
        for request in [
            Request::Open(open(1, RW, ShareMode::ALL)),
            Request::Remove(place("file")),
            Request::Rename(rename.clone()),
            Request::SetAttributes(size.clone()),
        ] {
            match &world.ask(session, request)[..] {
                [Effect::Reply { reply: Reply::Refused(refusal), .. }] => {
                    assert_eq!((refusal.status, refusal.retry_ms), (Status::Unavailable, Some(200)));
                }
                other => panic!("not refused: {other:?}"),
            }
        }
        let up = Input::LinkUp { service_blob: Vec::new(), held: Vec::new() };
        world.give(if dies { Input::LinkLost } else { up });
        world.open(session, open(1, RW, ShareMode::ALL), 5);
    }
}

/// The same create id from a later session: the earlier one is over, and nothing bound with its secret lands after the
/// answer.
#[test]
fn opn_06_a_replay_elsewhere_ends_the_earlier_session_and_fences_first() {
    let (mut world, held) = bound();
    let before = crate::types::SessionId([1; 16]);
    world.open(before, open(2, RW, ShareMode::ALL), 6);
    let old = world.bind(&session_key(1), &held, 1);
    let later = world.begin(2, "u1");
    let effects = world.ask(later, Request::Open(open(1, RW, ShareMode::ALL)));
    assert!(effects.iter().any(|e| matches!(e, Effect::Disconnect(session) if *session == before)));
    assert!(!effects.iter().any(|e| matches!(e, Effect::Inspect { .. } | Effect::Reply { .. })));
    let asked = fences(&effects);
    assert_eq!(asked.len(), 1);
    assert_eq!((asked[0].binding, asked[0].reason), (old, Status::Superseded));
    let counts = world.authority.counts();
    assert_eq!((counts.sessions, counts.opens), (1, 1), "the earlier session's other open is closed");
    // The earlier session asks no more; its secret binds nothing.
    assert!(world.ask(before, close(held.open)).is_empty());
    assert_eq!(world.redeem(right(&session_key(1), &held, 2, RW)).err(), Some(Status::BadKey));
    let effects = world.confirm(asked[0]);
    assert!(matches!(effects[..], [Effect::Inspect { .. }]), "{effects:?}");
    let again = opened(&world.look(effects, 5));
    assert_eq!(again.open, held.open);
    let grant = world.redeem(right(&session_key(2), &again, 1, RW)).unwrap();
    assert!(grant.epoch > asked[0].epoch);
    // A replay that waits when its own session goes holds nothing up; and this open is not to be held.
    let third = world.begin(3, "u1");
    let asked = fences(&world.ask(third, Request::Open(open(1, RW, ShareMode::ALL))));
    world.give(Input::SessionLost(third));
    let effects = world.confirm(asked[0]);
    assert!(matches!(effects[..], [Effect::CloseFile(_)]), "{effects:?}");
    assert_eq!(world.authority.counts(), Default::default());
}

#[test]
fn a_lost_link_ends_its_bindings_and_no_open() {
    let (mut world, held) = bound();
    let session = crate::types::SessionId([1; 16]);
    let closing = world.open(session, open(2, RW, ShareMode::ALL), 6);
    let first = world.bind(&session_key(1), &held, 1);
    world.bind(&session_key(1), &closing, 1);
    assert_eq!(fences(&world.ask(session, close(closing.open))).len(), 1);
    // What waited for the dead dataplane's word has its proof now.
    assert!(closes(&world.give(Input::LinkLost)));
    let counts = world.authority.counts();
    assert_eq!((counts.opens, counts.bindings, counts.fences), (1, 0, 0));
    // The next dataplane binds anew; what the old one might still say means nothing.
    world.give(Input::LinkUp { service_blob: Vec::new(), held: Vec::new() });
    let second = world.bind(&session_key(1), &held, 1);
    assert_ne!(first, second);
    world.give(Input::Released(first));
    world.confirm(Fence { binding: first, epoch: 1, reason: Status::Closed });
    // Nor does a confirmation that nobody asked for.
    world.confirm(Fence { binding: second, epoch: 1, reason: Status::Closed });
    assert_eq!(world.authority.counts().bindings, 1);
    let effects = world.give(Input::Released(second));
    assert!(effects.is_empty());
    assert!(matches!(world.ask(session, close(held.open))[..], [Effect::CloseFile(_), Effect::Reply { .. }]));
}
