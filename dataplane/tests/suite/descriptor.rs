//! The open's own descriptor: given over a Unix socket, to who may have it, and it cannot write.

use crate::common::{Rig, Told, eventually};
use holdfast_shared::auth::MacPolicy;
use holdfast_shared::types::{Access, ByteRange, IoRule, Status};
use holdfast_shared::wire::link::{Fence, Restrict};
use std::fs::File;
use std::io::{Read, Seek, Write};

/// A file that is open for reading alone.
fn readable(content: &[u8]) -> File {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(content).unwrap();
    File::open(file.path()).unwrap()
}

#[test]
fn a_descriptor_reads_and_outlives_the_binding_which_is_why_it_cannot_write() {
    let rig = Rig::new();
    let open = rig.control.open_file(readable(b"what is there"), Access::READ, MacPolicy::Header);
    let mut client = rig.local_client();
    let binding = client.bind(&open).unwrap();
    assert_eq!(client.ask_descriptor(binding), Status::Ok);
    let mut file = File::from(client.given.pop().unwrap());
    let mut text = String::new();
    file.read_to_string(&mut text).unwrap();
    assert_eq!(text, "what is there");
    assert!(file.write(b"x").is_err());
    assert_eq!(rig.gauge("descriptors_given_total"), 1);
    // Once.
    assert_eq!(client.ask_descriptor(binding), Status::AccessDenied);
    // A fence is complete, though this is still open: who has it was let have it for good.
    let fence = Fence { binding: rig.control.last(), epoch: 5, reason: Status::Fenced };
    rig.engine.fence(fence);
    eventually("the fence is confirmed", || rig.control.told().contains(&Told::Fenced(fence)));
    file.rewind().unwrap();
    text.clear();
    file.read_to_string(&mut text).unwrap();
    assert_eq!(text, "what is there");
    assert_eq!(client.ask_descriptor(binding), Status::Fenced);
    assert!(client.given.is_empty());
}

#[test]
fn one_that_could_write_or_was_not_granted_is_not_given() {
    let rig = Rig::new();
    let mut client = rig.local_client();
    // Control would have it given, and its file is open for writing too.
    let writable = rig.control.open(b"content", Access::READ, MacPolicy::Header);
    let binding = client.bind(&writable).unwrap();
    assert_eq!(client.ask_descriptor(binding), Status::AccessDenied);
    // Control says nothing of it.
    let both = rig.control.open(b"content", Access::ALL, MacPolicy::Header);
    let binding = client.bind(&both).unwrap();
    assert_eq!(client.ask_descriptor(binding), Status::AccessDenied);
    assert_eq!((client.given.len(), rig.gauge("descriptors_given_total")), (0, 0));
    assert_eq!(client.read(binding, 0, 7).0, Status::Ok, "the channel lives");
}

#[test]
fn none_is_given_over_another_transport_or_while_others_have_locked_the_file() {
    let rig = Rig::new();
    let open = rig.control.open_file(readable(b"content"), Access::READ, MacPolicy::Header);
    let mut other = rig.client();
    let binding = other.bind(&open).unwrap();
    assert_eq!(other.ask_descriptor(binding), Status::Unsupported);

    let mut client = rig.local_client();
    let binding = client.bind(&open).unwrap();
    let rules = vec![IoRule { range: ByteRange::new(100, 1).unwrap(), deny: Access::READ }];
    rig.engine.restrict(Restrict { open: open.id, version: 1, rules });
    eventually("the rules are in force", || {
        rig.control.told().iter().any(|told| matches!(told, Told::Restricted(_)))
    });
    assert_eq!(client.ask_descriptor(binding), Status::LockConflict);
    rig.engine.restrict(Restrict { open: open.id, version: 2, rules: Vec::new() });
    eventually("the rules are gone", || {
        rig.control.told().iter().filter(|told| matches!(told, Told::Restricted(_))).count() == 2
    });
    assert_eq!(client.ask_descriptor(binding), Status::Ok);
    assert_eq!(client.given.len(), 1);
}
