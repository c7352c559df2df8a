//! What happens when things go wrong: bad keys, peers that go, work dropped in flight, refusals, leaks.

use std::collections::VecDeque;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::common::{PATIENCE, REGION, config, pair, pair_with, rdma};
use holdfast_verbs::{
    Access, ConnectFailure, ConnectRequest, Device, Listener, ListenerLimits, MemoryRegistration, Operation,
    Outgoing, ProtectionDomain, Remote, Status, VerbsError, gauges,
};

#[test]
fn a_bad_key_is_a_remote_access_error_and_ends_both_ends() {
    let Some((_alone, address)) = rdma() else { return };
    let (mut client, mut server) = pair(address, 4);
    let good = client.remote(0);
    let bad = Remote { addr: good.addr, rkey: good.rkey ^ 0x5555 };
    let request = server.request(1, Operation::Write(bad), &[1; 1000]);
    server.post(request);
    let refused = server.next();
    assert_eq!((refused.token, refused.status, refused.bytes), (1, Status::RemoteAccessError, 0));
    // All that was posted comes back, at both ends, each exactly once.
    let flushed = server.drain();
    assert_eq!(flushed.iter().map(|completion| completion.token).collect::<Vec<_>>(), [0, 1, 2, 3]);
    assert!(flushed.iter().all(|completion| completion.status == Status::Flushed));
    drop(server);
    let flushed = client.drain();
    assert_eq!(flushed.len(), 4);
    assert!(flushed.iter().all(|completion| completion.status != Status::Success), "{flushed:?}");
    assert!(client.region_bytes(0, 1000).iter().all(|byte| *byte == 0));
}

#[test]
fn writes_outside_the_region_or_its_rights_are_refused() {
    let Some((_alone, address)) = rdma() else { return };
    for (offset, access) in
        [(REGION - 10, Access::RemoteWrite), (0, Access::RemoteRead), (0, Access::LocalOnly)]
    {
        let (mut client, server) = pair_with(address, 1, &config(), access);
        let request = client.request(1, Operation::Write(server.remote(offset)), &[1; 100]);
        client.post(request);
        assert_eq!(client.next().status, Status::RemoteAccessError, "{access:?} at {offset}");
        assert!(server.region_bytes(REGION - 100, 100).iter().all(|byte| *byte == 0));
    }
    let (mut client, server) = pair_with(address, 1, &config(), Access::RemoteWrite);
    let request = client.request(1, Operation::Read(server.remote(0)), &[1; 100]);
    client.post(request);
    assert_eq!(client.next().status, Status::RemoteAccessError, "no right to read");
}

#[test]
fn in_a_chain_the_one_that_failed_is_named() {
    let Some((_alone, address)) = rdma() else { return };
    let (mut client, server) = pair(address, 0);
    let (good, bad) = (server.remote(0), Remote { rkey: !server.remote(0).rkey, ..server.remote(0) });
    let mut queue: VecDeque<_> = [good, bad, good]
        .into_iter()
        .zip(1..)
        .map(|(remote, token)| {
            let mut request = client.request(token, Operation::Write(remote), &[5; 500]);
            request.signaled = false;
            request
        })
        .collect();
    assert_eq!(client.connection.post(&mut queue).unwrap(), 3);
    let ends: Vec<_> = client.drain().iter().map(|end| (end.token, end.status)).collect();
    assert_eq!(ends, [(1, Status::Success), (2, Status::RemoteAccessError), (3, Status::Flushed)]);
    assert_eq!(client.pool.available(), client.pool.capacity(), "every buffer came back");
}

#[test]
fn pool_memory_is_never_exposed() {
    let Some((_alone, address)) = rdma() else { return };
    let (client, _server) = pair(address, 1);
    let refused =
        MemoryRegistration::of_memory(client.connection.domain(), client.pool.memory(), Access::RemoteWrite);
    assert!(matches!(refused, Err(VerbsError::Exclusive)));
}

#[test]
fn an_unknown_receive_is_waited_for_and_then_given_up() {
    let Some((_alone, address)) = rdma() else { return };
    let (mut client, _server) = pair(address, 0);
    let request = client.request(1, Operation::Send, &[1; 100]);
    client.post(request);
    assert_eq!(client.next().status, Status::RnrRetryExceeded);
}

#[test]
fn work_dropped_in_flight_never_lands_later() {
    let Some((_alone, address)) = rdma() else { return };
    // What is written over the region after the drop: from a file, which is quick, so that a late byte is late.
    let canary = rustix::fs::memfd_create("canary", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    assert_eq!(rustix::io::pwrite(&canary, &vec![0x11; REGION], 0).unwrap(), REGION);
    for round in 0..8 {
        let (mut client, server) = pair(address, 4);
        server.region.copy_in(0, &[0x77; REGION]).unwrap();
        // The registration stays, so that it isn't its end that keeps late bytes out.
        let (pool, region) = (client.pool.clone(), Arc::clone(&client.region));
        let registration = Arc::clone(&client.region_registration);
        // Reads of the peer's memory into ours, far more than can be done at once, then away with the connection.
        let mut queue: VecDeque<_> = (0..16)
            .map(|token| client.region_request(token, Operation::Read(server.remote(0)), 0..REGION))
            .collect();
        assert_eq!(client.connection.post(&mut queue).unwrap(), 16);
        std::thread::sleep(Duration::from_micros(300 * round));
        drop(client);
        // The memory is ours again: what we write now stays.
        assert_eq!(region.read_file(canary.as_fd(), 0, 0..REGION).unwrap(), REGION);
        assert_eq!(pool.available(), pool.capacity());
        std::thread::sleep(Duration::from_millis(50));
        let mut bytes = vec![0; REGION];
        region.copy_out(0, &mut bytes).unwrap();
        assert!(bytes.iter().all(|byte| *byte == 0x11), "the device wrote after its queue pair was gone");
        drop((server, registration));
    }
}

#[test]
fn a_peer_that_goes_wakes_the_sleeper() {
    let Some((_alone, address)) = rdma() else { return };
    let told = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&told);
    let mut config = config();
    config.notify = Some(Arc::new(move || {
        counter.fetch_add(1, Ordering::Relaxed);
    }));
    let (mut client, server) = pair_with(address, 4, &config, Access::RemoteWrite);
    assert!(!client.connection.is_disconnected());
    assert!(client.connection.arm().unwrap());
    let goes = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(50));
        drop(server);
    });
    crate::common::sleep(&client.connection, Instant::now() + PATIENCE);
    let flushed = client.drain();
    assert_eq!(flushed.len(), 4);
    assert!(flushed.iter().all(|completion| completion.status == Status::Flushed));
    assert!(client.connection.is_disconnected());
    assert!(told.load(Ordering::Relaxed) > 0);
    goes.join().unwrap();
}

#[test]
fn a_clean_disconnect_flushes_our_end_too() {
    let Some((_alone, address)) = rdma() else { return };
    let (mut client, mut server) = pair(address, 3);
    client.connection.disconnect().unwrap();
    assert!(client.drain().iter().all(|completion| completion.status == Status::Flushed));
    assert_eq!(server.drain().len(), 3);
}

#[test]
fn refusals_and_silence_are_told_apart() {
    let Some((_alone, address)) = rdma() else { return };
    let before = gauges();
    let nobody = std::net::SocketAddr::new(address.ip(), 9);
    let reason = |target, timeout| {
        let outgoing = Outgoing::resolve(target, timeout)?;
        let domain = ProtectionDomain::new(outgoing.device())?;
        outgoing.prepare(&domain, &config())?.connect(b"hello").map(drop)
    };
    let refused = reason(nobody, PATIENCE).unwrap_err();
    assert!(
        matches!(refused, VerbsError::NotConnected { reason: ConnectFailure::Rejected(_), .. }),
        "nobody listens: {refused}"
    );
    // A listener that drops what it gets refuses it.
    let rude = Listener::bind(address, ListenerLimits::default(), drop).unwrap();
    let refused = reason(rude.local_address().unwrap(), PATIENCE).unwrap_err();
    assert!(
        matches!(refused, VerbsError::NotConnected { reason: ConnectFailure::Rejected(_), .. }),
        "{refused}"
    );
    // One without room refuses; one that never answers is given up.
    let (sender, requests) = crossbeam::channel::unbounded();
    let limits = ListenerLimits { half_open: 1, ..ListenerLimits::default() };
    let slow = Listener::bind(address, limits, move |request| drop(sender.send(request))).unwrap();
    let target = slow.local_address().unwrap();
    let started = Instant::now();
    let silence = reason(target, Duration::from_millis(300)).unwrap_err();
    assert!(
        matches!(silence, VerbsError::NotConnected { reason: ConnectFailure::TimedOut, .. }),
        "{silence}"
    );
    assert!(started.elapsed() < Duration::from_secs(5));
    assert_eq!(slow.half_open(), 1);
    let refused = reason(target, PATIENCE).unwrap_err();
    assert!(
        matches!(refused, VerbsError::NotConnected { reason: ConnectFailure::Rejected(_), .. }),
        "{refused}"
    );
    drop(requests.try_recv().unwrap());
    assert_eq!(slow.half_open(), 0);
    drop((rude, slow));
    assert_eq!(gauges(), before, "attempts that failed leave nothing behind");
}

#[test]
fn an_accepted_peer_that_never_answers_is_dropped_without_a_trace() {
    let Some((_alone, address)) = rdma() else { return };
    let before = gauges();
    let (sender, requests) = crossbeam::channel::unbounded();
    let listener =
        Listener::bind(address, ListenerLimits::default(), move |request| drop(sender.send(request)))
            .unwrap();
    // The peer gives up between its request and our acceptance.
    let outgoing = Outgoing::resolve(listener.local_address().unwrap(), Duration::from_millis(200)).unwrap();
    let domain = ProtectionDomain::new(outgoing.device()).unwrap();
    outgoing.prepare(&domain, &config()).unwrap().connect(b"").unwrap_err();
    let request: ConnectRequest = requests.recv_timeout(PATIENCE).unwrap();
    assert!(request.received().elapsed() >= Duration::from_millis(100));
    let server_domain = ProtectionDomain::new(request.device()).unwrap();
    // Some kernels notice when the queue pair is made, some when it is accepted, some only by the silence after it.
    let accepted = request.connection(&server_domain, &config()).and_then(|incoming| incoming.accept(b""));
    let failure = match accepted {
        Ok(connection) => connection.wait_established(Duration::from_millis(300)).unwrap_err(),
        Err(failure) => failure,
    };
    assert!(matches!(failure, VerbsError::NotConnected { .. } | VerbsError::Call { .. }), "{failure}");
    assert_eq!(listener.half_open(), 0);
    drop((listener, domain, server_domain));
    assert_eq!(gauges(), before);
}

#[test]
fn many_come_and_go_at_once() {
    let Some((_alone, address)) = rdma() else { return };
    drop(pair(address, 1));
    let before = gauges();
    std::thread::scope(|scope| {
        for order in 0..4 {
            scope.spawn(move || {
                for _ in 0..4 {
                    let (mut client, mut server) = pair(address, 4);
                    let request = client.request(1, Operation::Send, &[order; 3000]);
                    client.post(request);
                    assert_eq!(server.next().status, Status::Success);
                    // Work in flight, and both ends going in either order.
                    let request = server.region_request(2, Operation::Write(client.remote(0)), 0..REGION);
                    server.post(request);
                    if order % 2 == 0 {
                        drop(client);
                        server.drain();
                    } else {
                        drop(server);
                        client.drain();
                    }
                }
            });
        }
    });
    let after = gauges();
    assert_eq!(holdfast_verbs::Gauges { registrations_total: before.registrations_total, ..after }, before);
}

#[test]
fn nothing_is_left_over() {
    let Some((_alone, address)) = rdma() else { return };
    drop(pair(address, 4));
    let before = gauges();
    for _ in 0..5 {
        let (mut client, server) = pair(address, 4);
        assert!(gauges().pinned_bytes > before.pinned_bytes);
        assert_eq!(gauges().outstanding_work_requests, before.outstanding_work_requests + 8);
        let request = client.request(1, Operation::Write(server.remote(0)), &[1; 4096]);
        client.post(request);
        drop(client);
        drop(server);
    }
    let after = gauges();
    assert_eq!(after.registrations_total, before.registrations_total + 20);
    assert_eq!(holdfast_verbs::Gauges { registrations_total: before.registrations_total, ..after }, before);
}

#[test]
fn the_device_tells_about_itself() {
    let Some((_alone, address)) = rdma() else { return };
    let devices = Device::list().unwrap();
    let device = devices.iter().find(|device| {
        device.ipv4_addresses().unwrap().contains(&match address.ip() {
            std::net::IpAddr::V4(ip) => ip,
            std::net::IpAddr::V6(_) => unreachable!("found by its IPv4 address"),
        })
    });
    let device = device.unwrap();
    let port = device.port(1).unwrap();
    assert!(port.active && port.active_mtu >= 256 && port.max_message > 0, "{port:?}");
    assert!(device.limits().reads_issued > 0 && device.limits().reads_answered > 0);
    assert!(!device.counters(1).is_empty());
    assert!(device.port(99).is_err());
}
