//! The engine over real verbs. Without an RDMA device there is nothing to run: the test says so, and fails if
//! `HOLDFAST_REQUIRE_RDMA` is set.

use crate::common::{Client, Rig, eventually, pattern};
use holdfast_shared::auth::MacPolicy;
use holdfast_shared::types::{Access, RegionDescriptor, Status};
use holdfast_shared::wire::data::Opcode;
use holdfast_transport::{Listener, verbs};
use holdfast_verbs::Device;
use std::net::SocketAddr;
use std::time::Duration;

fn client(rig: &Rig, listener: &mut verbs::VerbsListener, address: SocketAddr) -> Client {
    let parts = Client::parts();
    let setup = parts.setup();
    let connecting =
        std::thread::spawn(move || verbs::connect(address, Duration::from_secs(5), setup).unwrap());
    rig.engine.adopt(listener.accept(&mut |peer| rig.engine.setup(peer)).unwrap());
    let mut client = Client::new(Box::new(connecting.join().unwrap()), parts);
    client.hello();
    client
}

#[test]
fn the_engine_serves_over_verbs() {
    let addresses: Vec<_> =
        Device::list().unwrap().iter().flat_map(|device| device.ipv4_addresses().unwrap()).collect();
    let Some(address) = addresses.first() else {
        assert!(std::env::var_os("HOLDFAST_REQUIRE_RDMA").is_none(), "there is no RDMA device");
        println!("skipped: no RDMA device here");
        return;
    };
    let rig = Rig::new();
    let mut listener = verbs::VerbsListener::bind((*address, 0).into()).unwrap();
    let address = SocketAddr::from((*address, listener.address().port()));
    let before = holdfast_verbs::gauges();
    let free = rig.gauge("message_buffers_free");
    for policy in [MacPolicy::Header, MacPolicy::Sealed] {
        let content = pattern(1 << 20, 1);
        let open = rig.control.open(&content, Access::ALL, policy);
        let mut client = client(&rig, &mut listener, address);
        let binding = client.bind(&open).unwrap();
        let length = if policy.covers_payload() { 256 << 10 } else { 1 << 20 };
        assert_eq!(client.read(binding, 0, length), (Status::Ok, content[..length as usize].to_vec()));
        let new = pattern(200_000, 2);
        assert_eq!(client.write(binding, 777, &new), (Status::Ok, 200_000));
        assert_eq!(client.write_inline(binding, 0, b"inline"), (Status::Ok, 6));
        assert_eq!(client.flush(binding), Status::Ok);
        assert_eq!(open.content()[777..200_777], new[..]);
        assert_eq!(client.read(binding, (1 << 20) - 5, 100).1, content[(1 << 20) - 5..]);
        let registered = rig.gauge("registrations_total");
        let part = client.descriptor();
        for _ in 0..20 {
            let requests: Vec<u32> =
                (0..64).map(|n| client.send_io(Opcode::Read, binding, n * 4096, 4096, part)).collect();
            for request in requests {
                assert_eq!(client.answer(request), (Status::Ok, 4096));
            }
        }
        assert_eq!(rig.gauge("registrations_total"), registered, "a request registered memory");
        eventually("an idle worker sleeps", || {
            let polls = rig.gauge("polls_total");
            std::thread::sleep(Duration::from_millis(300));
            rig.gauge("polls_total") - polls <= 2
        });
        // A forged key ends this channel and no other.
        let forged = RegionDescriptor::new(part.address(), part.rkey() ^ 0x5500, part.length());
        client.send_io(Opcode::Read, binding, 0, 4096, forged);
        while client.next().is_some() {}
        drop(client);
        rig.wait_gauge("channels", 0);
        rig.wait_gauge("buffers_free", rig.gauge("buffers_total"));
        rig.wait_gauge("message_buffers_free", free);
    }
    eventually("queue pairs are gone", || holdfast_verbs::gauges().queue_pairs == before.queue_pairs);
    eventually("every binding is released", || rig.control.all_released());
}
