//! Listeners: turning away, stopping, and strangers.

use crate::kit::*;
use holdfast_transport::tcp::{TcpListener, connect};
use holdfast_transport::{Kind, Listener};
use holdfast_verbs::memory::Pool;
use std::time::Duration;

fn listener() -> TcpListener {
    TcpListener::bind("127.0.0.1:0".parse().unwrap()).unwrap()
}

#[test]
fn a_stopper_ends_a_waiting_accept_for_ever() {
    let mut listener = listener();
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

#[test]
fn who_is_turned_away_costs_nothing_and_the_next_is_served() {
    let mut listener = listener();
    let address = listener.address();
    let pool = Pool::new(4096, 16).unwrap();
    let theirs = pool.clone();
    let thread = std::thread::spawn(move || {
        let mut asked = 0;
        let channel = listener
            .accept(&mut |peer| {
                assert!(peer.ip().is_loopback());
                asked += 1;
                (asked == 3).then(|| setup(&theirs, Sizes::default(), 2))
            })
            .unwrap();
        (channel, asked)
    });
    let client_pool = Pool::new(4096, 16).unwrap();
    let connect = || {
        let channel =
            connect(address, Duration::from_secs(5), setup(&client_pool, Sizes::default(), 1)).unwrap();
        End::new(Box::new(channel), client_pool.clone())
    };
    for _ in 0..2 {
        let mut refused = connect();
        drive(&mut [&mut refused], |ends| ends[0].has_ended());
    }
    let mut client = connect();
    let (channel, asked) = thread.join().unwrap();
    let mut server = End::new(channel, pool);
    assert_eq!(asked, 3);
    client.send(1, b"hello");
    drive(&mut [&mut client, &mut server], |ends| ends[1].count(Kind::Recv) == 1);
}

#[test]
fn nobody_there_is_an_error_soon() {
    let address = listener().address();
    let pool = Pool::new(4096, 4).unwrap();
    let outcome = connect(address, Duration::from_secs(5), setup(&pool, Sizes::default(), 2));
    assert_eq!(outcome.err().unwrap().kind(), std::io::ErrorKind::ConnectionRefused);
    assert_eq!(pool.available(), 4);
}

#[test]
fn setups_that_contradict_themselves_are_refused() {
    let mut listener = listener();
    let address = listener.address();
    let pool = Pool::new(64, 4).unwrap();
    let mut foreign = setup(&pool, Sizes::default(), 1);
    foreign.pools.clear();
    let mut many = setup(&pool, Sizes::default(), 2);
    many.receives_max = 1;
    for wrong in [foreign, many] {
        let error = connect(address, Duration::from_secs(5), wrong).err().unwrap();
        assert_eq!(error.kind(), std::io::ErrorKind::InvalidInput);
    }
    assert_eq!(pool.available(), 4);
    let stop = listener.stopper();
    stop();
    assert!(listener.accept(&mut |_| None).is_err());
}
