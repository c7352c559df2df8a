//! The authority against a model so plain that it can be seen to be right: a list of opens, compared pair by pair.
//!
//! The model knows only when an open *ends*: when its close was asked for and nothing of it is left in dataplane.

use super::world::*;
use crate::state::{Effect, Input};
use crate::types::{Access, OpenId, SessionId, ShareMode, Status, conflicts};
use crate::wire::control::{Opened, Reply, Request};
use crate::wire::link::{Fence, LinkBinding};
use proptest::prelude::*;

#[derive(Clone, Debug)]
enum Step {
    Open {
        session: u8,
        inode: u64,
        access: u8,
        share: u8,
    },
    Bind {
        which: usize,
    },
    Close {
        which: usize,
    },
    /// Dataplane confirms the fence it was asked for this long ago.
    Confirm {
        which: usize,
    },
    Release {
        which: usize,
    },
    LoseSession {
        session: u8,
    },
    /// The link closes, dataplane lives: nothing ends.
    LinkDown,
    /// It registers anew, or dies and another does: nothing is left of any binding.
    LoseLink {
        dies: bool,
    },
    Remove {
        session: u8,
        inode: u64,
    },
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => (1u8..4, 1u64..4, 0u8..8, 0u8..8)
            .prop_map(|(session, inode, access, share)| Step::Open { session, inode, access, share }),
        6 => any::<usize>().prop_map(|which| Step::Bind { which }),
        4 => any::<usize>().prop_map(|which| Step::Close { which }),
        6 => any::<usize>().prop_map(|which| Step::Confirm { which }),
        2 => any::<usize>().prop_map(|which| Step::Release { which }),
        1 => (1u8..4).prop_map(|session| Step::LoseSession { session }),
        1 => Just(Step::LinkDown),
        1 => any::<bool>().prop_map(|dies| Step::LoseLink { dies }),
        2 => (1u8..4, 1u64..4).prop_map(|(session, inode)| Step::Remove { session, inode }),
    ]
}

struct ModelOpen {
    session: u8,
    opened: Opened,
    inode: u64,
    claim: (Access, ShareMode),
    bindings: Vec<LinkBinding>,
    closing: bool,
}

struct Model {
    world: World,
    alive: [bool; 4],
    opens: Vec<ModelOpen>,
    fences: Vec<Fence>,
    creates: u8,
    nonces: u8,
}

impl Model {
    fn new() -> Self {
        let mut world = World::new();
        for n in 1..4 {
            world.begin(n, "u1");
        }
        world.give(Input::LinkUp { service_blob: Vec::new(), held: Vec::new() });
        Self { world, alive: [true; 4], opens: Vec::new(), fences: Vec::new(), creates: 0, nonces: 0 }
    }

    fn pick(&self, which: usize) -> Option<usize> {
        (!self.opens.is_empty()).then(|| which % self.opens.len())
    }

    fn admits(&self, inode: u64, claim: (Access, ShareMode)) -> bool {
        !self.opens.iter().any(|open| open.inode == inode && conflicts(open.claim, claim))
    }

    /// Which opens end now, and that the effects say so: a descriptor closed for each and no other.
    fn ends(&mut self, effects: &[Effect]) {
        let before = self.opens.len();
        self.opens.retain(|open| !open.closing || !open.bindings.is_empty());
        let closed = effects.iter().filter(|effect| matches!(effect, Effect::CloseFile(_))).count();
        assert_eq!(closed, before - self.opens.len(), "{effects:?}");
        for effect in effects {
            if let Effect::Fence(fence) = effect {
                self.fences.push(*fence);
            }
        }
    }

    fn unbind(&mut self, binding: LinkBinding) {
        for open in &mut self.opens {
            open.bindings.retain(|there| *there != binding);
        }
        self.fences.retain(|fence| fence.binding != binding);
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::Open { session, inode, access, share } if self.alive[usize::from(session)] => {
                let claim = (Access::from_bits(access).unwrap(), ShareMode::from_bits(share).unwrap());
                self.creates += 1;
                let request = open(self.creates, claim.0, claim.1);
                let effects = self.world.try_open(SessionId([session; 16]), request, inode);
                if self.admits(inode, claim) {
                    let (opened, bindings) = (opened(&effects), Vec::new());
                    self.opens.push(ModelOpen { session, opened, inode, claim, bindings, closing: false });
                } else {
                    assert_eq!(refusal(&effects), Status::ShareConflict);
                }
            }
            Step::Bind { which } => {
                let Some(which) = self.pick(which) else { return };
                let open = &mut self.opens[which];
                self.nonces = self.nonces.wrapping_add(1);
                let wanted = open.claim.0.intersection(RW);
                let redeem = right(&session_key(open.session), &open.opened, self.nonces, wanted);
                let wanted = match (open.closing, wanted.is_empty()) {
                    (true, _) => Some(Status::BadKey),
                    (false, true) => Some(Status::AccessDenied),
                    (false, false) => None,
                };
                match (self.world.redeem(redeem), wanted) {
                    (Ok(grant), None) => open.bindings.push(grant.binding),
                    (result, wanted) => assert_eq!(result.err(), wanted),
                }
            }
            Step::Close { which } => {
                let Some(which) = self.pick(which) else { return };
                let open = &mut self.opens[which];
                if !self.alive[usize::from(open.session)] {
                    return;
                }
                let (session, id, bound) =
                    (SessionId([open.session; 16]), open.opened.open, !open.bindings.is_empty());
                open.closing = true;
                let effects = self.world.ask(session, close(id));
                let told = effects.iter().any(|e| matches!(e, Effect::Reply { reply: Reply::Done, .. }));
                assert_eq!(told, !bound, "told when, and only when, nothing more can land");
                self.ends(&effects);
            }
            Step::Confirm { which } => {
                if self.fences.is_empty() {
                    return;
                }
                let fence = self.fences[which % self.fences.len()];
                self.unbind(fence.binding);
                let effects = self.world.confirm(fence);
                self.ends(&effects);
            }
            Step::Release { which } => {
                let all: Vec<LinkBinding> =
                    self.opens.iter().flat_map(|open| open.bindings.iter().copied()).collect();
                if all.is_empty() {
                    return;
                }
                let binding = all[which % all.len()];
                self.unbind(binding);
                let effects = self.world.give(Input::Released(binding));
                self.ends(&effects);
            }
            Step::LoseSession { session } => {
                self.alive[usize::from(session)] = false;
                for open in self.opens.iter_mut().filter(|open| open.session == session) {
                    open.closing = true;
                }
                let effects = self.world.give(Input::SessionLost(SessionId([session; 16])));
                self.ends(&effects);
            }
            Step::LinkDown => {
                let effects = self.world.give(Input::LinkDown);
                assert!(effects.is_empty(), "{effects:?}");
            }
            Step::LoseLink { dies } => {
                for open in &mut self.opens {
                    open.bindings.clear();
                }
                self.fences.clear();
                let up = Input::LinkUp { service_blob: Vec::new(), held: Vec::new() };
                let effects = self.world.give(if dies { Input::LinkLost } else { up });
                self.ends(&effects);
            }
            Step::Remove { session, inode } if self.alive[usize::from(session)] => {
                let session = SessionId([session; 16]);
                let effects = self.world.ask(session, Request::Remove(place("file")));
                let [Effect::Resolve { operation, .. }] = effects[..] else { panic!("{effects:?}") };
                let names = Ok(vec![Some(identity(inode))]);
                let effects = self.world.give(Input::Resolved { operation, result: names });
                if self.admits(inode, (Access::DELETE, ShareMode::ALL)) {
                    assert!(matches!(effects[..], [Effect::Perform { .. }]));
                    self.world.give(Input::Performed { operation, result: Ok(Reply::Done) });
                } else {
                    assert_eq!(refusal(&effects), Status::ShareConflict);
                }
            }
            Step::Open { .. } | Step::Remove { .. } => {}
        }
    }

    fn agrees(&self) {
        let counts = self.world.authority.counts();
        assert_eq!(counts.opens, self.opens.len());
        assert_eq!(counts.bindings, self.opens.iter().map(|open| open.bindings.len()).sum::<usize>());
        assert_eq!(counts.fences, self.fences.len());
        assert_eq!(counts.operations, 0);
        let mut ids: Vec<OpenId> = self.opens.iter().map(|open| open.opened.open).collect();
        ids.sort_unstable();
        ids.dedup();
        assert_eq!(ids.len(), self.opens.len());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]
    #[test]
    fn opn_01_opn_08_the_authority_does_what_the_model_does(steps in proptest::collection::vec(step(), 1..80)) {
        let mut model = Model::new();
        for step in steps {
            model.step(step);
            model.agrees();
        }
    }
}
