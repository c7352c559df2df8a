//! Binds per second that the proofs allow: the server's share (open the key, recompute, check, derive) and the
//! client's.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use holdfast_shared::auth::{
    BindAnswer, BindTranscript, ChannelIdentity, Keyring, MacPolicy, ResumeKey, Secret, SessionKey,
};
use holdfast_shared::types::{Access, ClusterId, HandleId, OpenId, ProcessId, VolumeId};
use holdfast_shared::wire::service::TransportKind;
use std::hint::black_box;
use std::time::Duration;

fn bind(c: &mut Criterion) {
    let cluster = ClusterId([1; 16]);
    let ring = Keyring::new(cluster, 1, &Secret::new([2; 32]));
    let open = OpenId([3; 16]);
    let volume = VolumeId([4; 16]);
    let session = SessionKey::new(Secret::new([5; 32]));
    let resume_key =
        ring.seal(&ResumeKey { cluster, volume, open, opened_ms: 1, process: ProcessId(1) }, [6; 12]);
    let channel = ChannelIdentity { transport: TransportKind::Verbs, client: [7; 20], server: [8; 20] };
    let transcript = BindTranscript {
        channel: &channel,
        server_nonce: &[9; 32],
        open_challenge: &[10; 32],
        client_challenge: &[11; 32],
        resume_key: &resume_key,
        volume,
        access: Access::READ,
        policy: MacPolicy::Header,
    };
    let secret = session.bind_secret(open);
    let proof = secret.client_proof(&transcript.digest());
    let answer =
        BindAnswer { handle: HandleId([12; 16]), epoch: 1, access: Access::READ, policy: MacPolicy::Header };

    let mut group = c.benchmark_group("bind");
    group.throughput(Throughput::Elements(1));
    group.bench_function("server: open key, check proof, prove, derive keys", |b| {
        b.iter(|| {
            let key = ring.open(black_box(&resume_key)).expect("our own key");
            assert_eq!(key.open, open);
            let digest = transcript.digest();
            assert!(secret.client_proof_is_right(&digest, black_box(&proof)));
            let answered = answer.digest(&digest);
            (secret.server_proof(&answered), secret.channel_keys(&answered))
        });
    });
    group.bench_function("client: derive secret, prove, check, derive keys", |b| {
        b.iter(|| {
            let secret = session.bind_secret(black_box(open));
            let digest = transcript.digest();
            let mine = secret.client_proof(&digest);
            let answered = answer.digest(&digest);
            let theirs = secret.server_proof(&answered);
            assert!(secret.server_proof_is_right(&answered, &theirs));
            (mine, secret.channel_keys(&answered))
        });
    });
    group.bench_function("seal a resume key", |b| {
        let key = ResumeKey { cluster, volume, open, opened_ms: 1, process: ProcessId(1) };
        b.iter(|| ring.seal(black_box(&key), [6; 12]));
    });
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default().warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(2));
    targets = bind
}
criterion_main!(benches);
