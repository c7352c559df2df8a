//! Changes of a file's size, which wait for a dataplane that maps files.

use crate::common::Server;
use crate::common::client::{Client, at, open};
use crate::common::dataplane::Dataplane;
use holdfast_shared::types::Status;
use holdfast_shared::wire::control::{Reply, Request, SetAttributes, Target};
use holdfast_shared::wire::link::{MAPPABLE_AS_SAID, ToControl, ToDataplane, Withdraw};
use rustix::fs::{FlockOperation, flock};
use std::time::Duration;

/// Registers with a link of its own, as one that maps.
fn register(server: &Server, first: bool) -> Dataplane {
    let dataplane = Dataplane::connect(server);
    assert_eq!(dataplane.try_register_as(first, true), Some(Status::Ok));
    dataplane
}

fn withdraw(dataplane: &Dataplane) -> Withdraw {
    match dataplane.hear() {
        Some((ToDataplane::Withdraw(withdraw), None)) => withdraw,
        other => panic!("not asked to withdraw: {other:?}"),
    }
}

fn mappable(dataplane: &Dataplane) -> u64 {
    match dataplane.hear() {
        Some((ToDataplane::Mappable(id), None)) => id,
        other => panic!("not told that it may map: {other:?}"),
    }
}

/// The answer to a question of an earlier link says nothing of what was mapped since: only the one to the question of this
/// link counts.
#[tokio::test]
async fn a_change_of_size_waits_for_the_answer_of_this_link() {
    let server = Server::start();
    // It lives: that its link has gone is no answer.
    let lock = std::fs::File::create(server.state("dataplane.lock")).unwrap();
    flock(&lock, FlockOperation::NonBlockingLockExclusive).unwrap();
    let mut links = vec![register(&server, true)];
    assert_eq!(mappable(&links[0]), MAPPABLE_AS_SAID);
    let mut client = Client::connect(&server, "writer").await;
    client.open(open("file")).await;
    std::fs::write(server.data("file"), [b'a'; 5000]).unwrap();
    let target = Target::Path(at("file"));
    let changes = SetAttributes { target, size: Some(100), mode: None, accessed: None, modified: None };
    let change = client.send(Request::SetAttributes(changes)).await;
    let mut asked = vec![withdraw(&links[0]).id];
    for n in 1..4 {
        drop(links.pop());
        server.await_gauge("link_up", 0);
        links.push(register(&server, false));
        let again = withdraw(&links[0]);
        assert!(!asked.contains(&again.id), "link {n}: asked as before, an answer of before would do");
        assert_eq!(mappable(&links[0]), MAPPABLE_AS_SAID);
        // Late, or of a dataplane that mistakes what it is asked.
        for id in &asked {
            links[0].say(&ToControl::Withdrawn(*id));
        }
        let early = tokio::time::timeout(Duration::from_millis(200), client.receive()).await;
        assert!(early.is_err(), "link {n}: answered, while the file may be mapped: {early:?}");
        assert_eq!(std::fs::metadata(server.data("file")).unwrap().len(), 5000, "link {n}");
        asked.push(again.id);
    }
    let last = asked[asked.len() - 1];
    links[0].say(&ToControl::Withdrawn(last));
    let answer = client.receive().await.unwrap();
    assert_eq!(answer.id, change);
    match answer.reply {
        Reply::Attributes(attributes) => assert_eq!(attributes.size, 100),
        other => panic!("not changed: {other:?}"),
    }
    assert_eq!(mappable(&links[0]), last);
    drop(lock);
}
