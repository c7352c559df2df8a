//! Listeners: turning away, stopping, and strangers.

use crate::kit::*;
use holdfast_transport::{Kind, tcp, verbs};
use holdfast_verbs::memory::Pool;
use std::sync::mpsc;
use std::time::{Duration, Instant};

pub(crate) fn a_stopper_ends_a_waiting_accept_for_ever<F: Listening>() {
    let mut listener = F::listen();
    let stop = listener.stopper();
    let thread = std::thread::spawn(move || {
        let error = listener.accept(&mut |_| None).err().unwrap();
        assert_eq!(error.kind(), std::io::ErrorKind::Interrupted);
        listener.accept(&mut |_| None).err().unwrap().kind()
    });
    std::thread::sleep(Duration::from_millis(30));
    stop();
    stop();
    assert_eq!(thread.join().unwrap(), std::io::ErrorKind::Interrupted);
}

pub(crate) fn who_is_turned_away_costs_nothing_and_the_next_is_served<F: Listening>() {
    let mut listener = F::listen();
    let address = listener.address();
    let (pool, client_pool) = (Pool::new(4096, 16).unwrap(), Pool::new(4096, 16).unwrap());
    let theirs = pool.clone();
    let thread = std::thread::spawn(move || {
        let mut asked = 0;
        let accepted = listener.accept(&mut |peer| {
            assert_eq!(peer.ip(), address.ip());
            asked += 1;
            (asked == 3).then(|| setup(&theirs, Sizes::default(), 2))
        });
        (accepted.unwrap(), asked)
    });
    let connect = || F::connect(address, setup(&client_pool, Sizes::default(), 1));
    for _ in 0..2 {
        // Refused at once, or connected and dropped: both will do.
        if let Ok(channel) = connect() {
            let mut refused = End::new(channel, client_pool.clone());
            drive(&mut [&mut refused], |ends| ends[0].has_ended());
        }
        assert_eq!(client_pool.available(), 16);
    }
    let mut client = End::new(connect().unwrap(), client_pool.clone());
    let (channel, asked) = thread.join().unwrap();
    let mut server = End::new(channel, pool);
    assert_eq!(asked, 3);
    client.send(1, b"hello");
    drive(&mut [&mut client, &mut server], |ends| ends[1].count(Kind::Recv) == 1);
}

pub(crate) fn one_listener_serves_many_and_outlives_them<F: Listening>() {
    let mut listener = F::listen();
    let (address, stop) = (listener.address(), listener.stopper());
    let pool = Pool::new(4096, 64).unwrap();
    let theirs = pool.clone();
    let (accepted, channels) = mpsc::channel();
    let thread = std::thread::spawn(move || {
        while let Ok(channel) = listener.accept(&mut |_| Some(setup(&theirs, Sizes::default(), 2))) {
            accepted.send(channel).unwrap();
        }
    });
    for round in 0..3u8 {
        let client_pool = Pool::new(4096, 64).unwrap();
        let mut pairs: Vec<(End, End)> = (0..6)
            .map(|_| {
                let client = F::connect(address, setup(&client_pool, Sizes::default(), 1)).unwrap();
                let server = channels.recv_timeout(PATIENCE).unwrap();
                assert_eq!(client.identity(), server.identity());
                (End::new(client, client_pool.clone()), End::new(server, pool.clone()))
            })
            .collect();
        for (client, server) in &mut pairs {
            client.send(1, &[round; 100]);
            drive(&mut [client, server], |ends| ends[1].count(Kind::Recv) == 1);
        }
        drop(pairs);
        assert_eq!((pool.available(), client_pool.available()), (64, 64));
    }
    stop();
    thread.join().unwrap();
}

pub(crate) fn nobody_there_is_an_error_soon<F: Listening>() {
    let address = F::listen().address();
    let pool = Pool::new(4096, 4).unwrap();
    let begun = Instant::now();
    let error = F::connect(address, setup(&pool, Sizes::default(), 2)).err().unwrap();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused, "{error}");
    assert!(begun.elapsed() < PATIENCE / 2);
    assert_eq!(pool.available(), 4);
}

pub(crate) fn setups_that_contradict_themselves_are_refused<F: Listening>() {
    let listener = F::listen();
    let pool = Pool::new(64, 4).unwrap();
    let mut foreign = setup(&pool, Sizes::default(), 1);
    foreign.pools.clear();
    let mut many = setup(&pool, Sizes::default(), 2);
    many.receives_max = 1;
    for wrong in [foreign, many] {
        let error = F::connect(listener.address(), wrong).err().unwrap();
        assert_eq!(error.kind(), std::io::ErrorKind::InvalidInput, "{error}");
    }
    assert_eq!(pool.available(), 4);
}

#[test]
fn without_a_device_verbs_say_so() {
    if !holdfast_verbs::Device::list().unwrap().is_empty() {
        println!("not exercised: this host has an RDMA device");
        return;
    }
    let pool = Pool::new(64, 4).unwrap();
    let somewhere = "127.0.0.1:7701".parse().unwrap();
    let connected = verbs::connect(somewhere, Duration::from_secs(5), setup(&pool, Sizes::default(), 1));
    for error in [connected.err().unwrap(), verbs::VerbsListener::bind(somewhere).err().unwrap()] {
        assert_eq!(error.kind(), std::io::ErrorKind::NotFound);
        assert!(error.to_string().contains("RDMA device"), "{error}");
    }
}

#[test]
fn a_listener_says_where_it_listens() {
    let listener = <crate::fabrics::Tcp as Listening>::listen();
    assert_ne!(listener.address().port(), 0);
    assert!(tcp::TcpListener::bind(listener.address()).is_err(), "taken");
}
