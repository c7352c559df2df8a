//! Random operations against a model of what must come of them. A failure names its seed.

use crate::kit::*;
use holdfast_transport::{Kind, Operation, RemoteAccess};
use std::collections::{HashMap, VecDeque};

const SLOT: usize = 24 << 10;
const SLOTS: usize = 12;

pub(crate) fn random_operations_agree_with_the_model<F: Fabric>() {
    for seed in 1..=4 {
        println!("{} seed {seed}", F::NAME);
        run::<F>(seed);
    }
}

/// Where bytes were placed, and which.
type Placed = (usize, Vec<u8>);

/// The server places into free slots and says so in a message; it fetches from memory that only the client writes, between
/// fetches; both send messages, as far as the other has receives posted.
fn run<F: Fabric>(seed: u64) {
    let sizes = Sizes { depth: 12, receives: 6, buffer_len: SLOT, buffers: 40 };
    let (mut client, mut server) = ends::<F>(sizes, 6);
    let placed = client.register(SLOT * SLOTS, RemoteAccess::Place);
    let fetched = client.register(SLOT * SLOTS, RemoteAccess::Fetch);
    let mut random = Random(seed.wrapping_mul(0xA076_1D64_78BD_642F) | 1);
    let mut content = pattern(seed, SLOT * SLOTS);
    fetched.region().copy_in(0, &content).unwrap();
    let mut free: Vec<usize> = (0..SLOTS).collect();
    // What each side must receive, in order; and for Places, what must be in which slot by then.
    let mut to_client: VecDeque<(Vec<u8>, Option<Placed>)> = VecDeque::new();
    let mut to_server: VecDeque<Vec<u8>> = VecDeque::new();
    let mut fetches: HashMap<u64, (usize, usize)> = HashMap::new();
    let mut operations = [0usize; 2];
    let mut effects = 0;
    for token in 0..1200u64 {
        match random.below(10) {
            0..=2 if to_client.len() < 6 && operations[1] < 11 && !free.is_empty() => {
                let slot = free.swap_remove(random.below(free.len()));
                let length = 1 + random.below(SLOT);
                let start = slot * SLOT + random.below(SLOT - length + 1);
                let bytes = pattern(token, length);
                server.place(token, &bytes, placed.descriptor().part(start as u32, length as u32).unwrap());
                let note = pattern(token + 1, 1 + random.below(200));
                server.send(token, &note);
                to_client.push_back((note, Some((start, bytes))));
                operations[1] += 2;
            }
            3 | 4 if operations[1] < 12 => {
                let length = 1 + random.below(SLOT);
                let start = random.below(SLOT * SLOTS - length);
                server.fetch(token, fetched.descriptor().part(start as u32, length as u32).unwrap());
                fetches.insert(token, (start, length));
                operations[1] += 1;
            }
            5 if to_client.len() < 6 && operations[1] < 12 => {
                let note = pattern(token, random.below(SLOT + 1));
                server.send(token, &note);
                to_client.push_back((note, None));
                operations[1] += 1;
            }
            6 | 7 if to_server.len() < 6 && operations[0] < 12 => {
                let note = pattern(token, random.below(SLOT + 1));
                client.send(token, &note);
                to_server.push_back(note);
                operations[0] += 1;
            }
            8 if fetches.is_empty() => {
                let start = random.below(SLOT * SLOTS - 100);
                content[start..start + 100].copy_from_slice(&pattern(token, 100));
                fetched.region().copy_in(start, &content[start..start + 100]).unwrap();
            }
            9 if operations != [0, 0] || !to_client.is_empty() || !to_server.is_empty() => {
                drive(&mut [&mut client, &mut server], |ends| ends.iter().any(|end| !end.done.is_empty()));
            }
            _ => {
                client.pump();
                server.pump();
            }
        }
        for (side, end) in [&mut client, &mut server].into_iter().enumerate() {
            while let Some(completion) = end.done.pop_front() {
                let length = completion.outcome.unwrap_or_else(|error| panic!("seed {seed}: {error}"));
                effects += 1;
                match completion.kind {
                    Kind::Recv => {
                        let (note, place) = match side {
                            0 => to_client.pop_front().unwrap(),
                            _ => (to_server.pop_front().unwrap(), None),
                        };
                        assert!(completion.buffer[..length] == note[..], "seed {seed}, step {token}");
                        if let Some((start, bytes)) = place {
                            assert!(
                                bytes_of(placed.region(), start, bytes.len()) == bytes,
                                "seed {seed}, step {token}"
                            );
                            free.push(start / SLOT);
                        }
                        end.submit(completion.token, Operation::Recv { buffer: completion.buffer });
                    }
                    Kind::Fetch => {
                        operations[side] -= 1;
                        let (start, wanted) = fetches.remove(&completion.token).unwrap();
                        assert_eq!(length, wanted);
                        assert!(completion.buffer[..length] == content[start..start + length], "seed {seed}");
                    }
                    Kind::Send | Kind::Place => operations[side] -= 1,
                }
            }
        }
    }
    assert!(effects > 300, "seed {seed}: only {effects} completions, the test hardly tested anything");
    assert!(!client.has_ended() && !server.has_ended());
}
