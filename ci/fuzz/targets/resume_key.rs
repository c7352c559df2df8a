//! Resume keys: nothing a fuzzer makes opens, whether it starts from noise or from a real key.
#![no_main]

use holdfast_shared::auth::{Keyring, ResumeKey, Secret};
use holdfast_shared::types::{ClusterId, OpenId, ProcessId, VolumeId};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let cluster = ClusterId([1; 16]);
    let ring = Keyring::new(cluster, 1, &Secret::new([7; 32]));
    assert!(ring.open(bytes).is_err());
    let key = ResumeKey {
        cluster,
        volume: VolumeId([2; 16]),
        open: OpenId([3; 16]),
        opened_ms: 4,
        process: ProcessId(5),
    };
    let mut real = ring.seal(&key, [9; 12]);
    let mut changed = false;
    for (to, from) in real.iter_mut().zip(bytes) {
        changed |= *from != 0;
        *to ^= from;
    }
    assert_eq!(ring.open(&real).is_err(), changed);
});
