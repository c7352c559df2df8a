//! A write of unknown fate on one channel of several: what must have happened before it goes to another.

use super::data::Plane;
use super::*;
use crate::{HandleId, Region, Stripes, Transport};

const HANDLES: [HandleId; 2] = [HandleId([8; 16]), HandleId([9; 16])];

/// Two data planes that say they are one: so that a channel can break without the other.
struct World {
    control: Control,
    peer: Peer,
    open: Open,
    planes: [Plane; 2],
    stripes: Stripes,
}

impl World {
    async fn new(config: impl FnOnce(&mut Config)) -> Self {
        let (control, mut peer, _, open) = opened(config).await;
        let planes = HANDLES.map(|handle| {
            let plane = Plane::start(0, 10, peer.key.bind_secret(OPEN), vec![1; 100]);
            plane.change(|script| script.handle = handle.0[0]);
            plane
        });
        let stripes = Stripes::new(&open).unwrap();
        for plane in &planes {
            tokio::select! {
                asked = peer.keys(plane.at()) => panic!("{asked:?}"),
                () = async {
                    open.query_key().await.unwrap();
                    stripes.connect(Transport::Tcp).await.unwrap();
                } => {}
            }
        }
        Self { control, peer, open, planes, stripes }
    }

    /// A write under way on a channel that then breaks; and where that was.
    async fn broken(&self) -> (tokio::task::JoinHandle<crate::Result<usize>>, usize) {
        for plane in &self.planes {
            plane.change(|script| script.hold = true);
        }
        let write = tokio::spawn({
            let (stripes, all) = (self.stripes.clone(), Region::allocate(5000).unwrap());
            async move { stripes.write_at(&all, 0..5000, 0).await }
        });
        let there = |plane: &Plane| plane.script.lock().held > 0;
        let seen = async {
            while !self.planes.iter().any(there) {
                sleep(Duration::from_millis(1)).await;
            }
        };
        timeout(SOON, seen).await.unwrap();
        let at = usize::from(there(&self.planes[1]));
        self.planes[1 - at].change(|script| script.hold = false);
        self.planes[at].cut();
        (write, at)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn rsm_17_a_write_goes_to_another_channel_only_when_its_old_handle_is_fenced() {
    let mut world = World::new(|_| ()).await;
    let (write, at) = world.broken().await;
    let other = &world.planes[1 - at];
    // The dead one finds nobody to connect to, and is not needed for any of this.
    let (keys, before) = (other.at(), world.peer.session);
    world.planes[at].kill();
    let mut next = tokio::select! {
        asked = world.peer.keys(keys) => panic!("the session was ended first: {asked:?}"),
        next = world.control.accept() => next,
    };
    let (id, resume) = next.resume().await;
    assert_eq!((resume.supersede, resume.keep), (Some(before), vec![HANDLES[1 - at]]), "what lives is kept");
    let log = other.script.lock().log.clone();
    assert!(log.iter().all(|(what, _)| *what == 'r'), "nothing was written before that: {log:?}");
    other.script.lock().secret = Some(next.key.bind_secret(OPEN));
    next.resumed(id, OPEN, Verdict::Unchanged, &[HANDLES[1 - at]]).await;
    let write = timeout(SOON, write);
    let count =
        tokio::select! { asked = next.keys(keys) => panic!("{asked:?}"), done = write => done.unwrap() };
    assert_eq!(count.unwrap().unwrap(), 5000);
    assert!(other.script.lock().log.contains(&('w', 0)));
}

#[tokio::test(flavor = "multi_thread")]
async fn rsm_17_a_write_does_not_go_to_another_channel_over_what_others_wrote() {
    let mut world = World::new(|_| ()).await;
    let (write, at) = world.broken().await;
    let keys = world.planes[1 - at].at();
    let mut next = tokio::select! {
        asked = world.peer.keys(keys) => panic!("the session was ended first: {asked:?}"),
        next = world.control.accept() => next,
    };
    let (id, _) = next.resume().await;
    next.resumed(id, OPEN, Verdict::Changed, &[HANDLES[1 - at]]).await;
    let write = timeout(SOON, write);
    let outcome =
        tokio::select! { asked = next.keys(keys) => panic!("{asked:?}"), done = write => done.unwrap() };
    assert!(matches!(outcome.unwrap(), Err(Error::WriteFateUnknown)));
    let log = world.planes[1 - at].script.lock().log.clone();
    assert!(log.iter().all(|(what, _)| *what == 'r'), "{log:?}");
    let one = Region::allocate(1).unwrap();
    assert!(matches!(world.stripes.read_at(&one, 0..1, 0).await, Err(Error::Changed)), "and all later ones");
    assert!(matches!(world.stripes.flush().await, Err(Error::Changed)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_write_that_is_not_settled_in_a_soft_clients_time_has_an_unknown_fate() {
    let mut world = World::new(|config| {
        (config.recovery, config.soft_ms) = (Recovery::Soft, 300);
    })
    .await;
    let (write, at) = world.broken().await;
    let keys = world.planes[1 - at].at();
    // Nobody answers to the next session's resume.
    let _next = tokio::select! {
        asked = world.peer.keys(keys) => panic!("the session was ended first: {asked:?}"),
        next = world.control.accept() => next,
    };
    assert!(matches!(timeout(SOON, write).await.unwrap().unwrap(), Err(Error::WriteFateUnknown)));
    assert_eq!(world.open.epoch(), 1);
}
