//! Random requests against a plain vector of bytes.

use crate::common::Rig;
use holdfast_shared::auth::MacPolicy;
use holdfast_shared::types::{Access, Status};
use proptest::prelude::*;

#[derive(Clone, Debug)]
enum Act {
    Read { at: u64, length: u32 },
    Write { at: u64, data: Vec<u8> },
    Inline { at: u64, data: Vec<u8> },
    Flush,
    Rebind,
}

fn act() -> impl Strategy<Value = Act> {
    let at = 0u64..60_000;
    let bytes = |max: usize| proptest::collection::vec(any::<u8>(), 0..max);
    prop_oneof![
        4 => (at.clone(), 0u32..50_000).prop_map(|(at, length)| Act::Read { at, length }),
        3 => (at.clone(), bytes(30_000)).prop_map(|(at, data)| Act::Write { at, data }),
        3 => (at, bytes(4097)).prop_map(|(at, data)| Act::Inline { at, data }),
        1 => Just(Act::Flush),
        1 => Just(Act::Rebind),
    ]
}

fn policy() -> impl Strategy<Value = MacPolicy> {
    prop_oneof![
        Just(MacPolicy::None),
        Just(MacPolicy::Header),
        Just(MacPolicy::Payload),
        Just(MacPolicy::Sealed)
    ]
}

fn write(model: &mut Vec<u8>, at: u64, data: &[u8]) {
    let at = usize::try_from(at).unwrap();
    if !data.is_empty() {
        model.resize(model.len().max(at + data.len()), 0);
        model[at..at + data.len()].copy_from_slice(data);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn the_file_is_the_model(
        policy in policy(),
        small in any::<bool>(),
        local in any::<bool>(),
        acts in proptest::collection::vec(act(), 1..40),
    ) {
        let rig = Rig::with(|s| {
            // Small buffers cut requests into pieces; policies over payloads want one piece.
            if small && !policy.covers_payload() {
                s.engine.buffer_bytes = 4096;
                s.engine.pool_bytes = 8 * 4096;
            }
        });
        let open = rig.control.open(&[], Access::ALL, policy);
        let mut client = if local { rig.local_client() } else { rig.client() };
        let mut binding = client.bind(&open).unwrap();
        let mut model = Vec::new();
        for act in acts {
            match act {
                Act::Read { at, length } => {
                    let start = usize::try_from(at).unwrap().min(model.len());
                    let end = (start + length as usize).min(model.len());
                    prop_assert_eq!(client.read(binding, at, length), (Status::Ok, model[start..end].to_vec()));
                }
                Act::Write { at, data } => {
                    write(&mut model, at, &data);
                    prop_assert_eq!(client.write(binding, at, &data), (Status::Ok, u32::try_from(data.len()).unwrap()));
                }
                Act::Inline { at, data } => {
                    let data = &data[..data.len().min(4096)];
                    write(&mut model, at, data);
                    prop_assert_eq!(client.write_inline(binding, at, data), (Status::Ok, u32::try_from(data.len()).unwrap()));
                }
                Act::Flush => prop_assert_eq!(client.flush(binding), Status::Ok),
                Act::Rebind => {
                    let request = client.send_unbind(binding);
                    prop_assert_eq!(client.answer(request).0, Status::Ok);
                    binding = client.bind(&open).unwrap();
                }
            }
        }
        prop_assert_eq!(open.content(), model);
    }
}
