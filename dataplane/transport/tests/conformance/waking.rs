//! Both sides sleep whenever they may, on threads of their own. A lost wake-up hangs one of them.

use crate::kit::*;
use holdfast_transport::{Armed, Kind, Operation, RemoteAccess};

pub(crate) fn two_sleepers_never_miss_each_other<F: Fabric>() {
    const ROUNDS: u64 = 2000;
    let (mut client, mut server) = ends::<F>(Sizes::default(), 4);
    let echo = std::thread::spawn(move || {
        for _ in 0..ROUNDS {
            let received = server.next_of(Kind::Recv);
            let length = received.outcome.unwrap();
            let mut buffer = server.buffer();
            buffer[..length].copy_from_slice(&received.buffer[..length]);
            server.submit(received.token, Operation::Recv { buffer: received.buffer });
            server.submit(0, Operation::Send { buffer, length });
            server.pump();
        }
        // Not before the last one has gone out.
        drive(&mut [&mut server], |ends| ends[0].has_ended());
    });
    for round in 0..ROUNDS {
        client.send(round, &round.to_le_bytes());
        let received = client.next_of(Kind::Recv);
        assert_eq!(received.buffer[..8], round.to_le_bytes());
        client.submit(received.token, Operation::Recv { buffer: received.buffer });
    }
    drop(client);
    echo.join().unwrap();
}

/// An armed end that only pushes, and looks for what has come at no time but after an edge.
pub(crate) fn what_is_pushed_goes_out_and_the_answer_still_wakes<F: Fabric>() {
    const ROUNDS: u64 = 500;
    let (mut client, mut server) = ends::<F>(Sizes::default(), 4);
    let echo = std::thread::spawn(move || {
        for _ in 0..ROUNDS {
            let received = server.next_of(Kind::Recv);
            server.submit(received.token, Operation::Recv { buffer: received.buffer });
            server.send(0, b"an answer");
            server.pump();
        }
        drive(&mut [&mut server], |ends| ends[0].has_ended());
    });
    for round in 0..ROUNDS {
        loop {
            client.pump();
            if client.channel.arm() == Armed::Idle {
                break;
            }
        }
        client.done.clear();
        client.send(round, b"a question");
        // One that can't says so: then the rule of polling and arming holds.
        if !client.channel.push() {
            drive(&mut [&mut client], |ends| ends[0].count(Kind::Recv) > 0);
        }
        while client.count(Kind::Recv) == 0 {
            client.sleep();
            loop {
                client.pump();
                if client.channel.arm() == Armed::Idle {
                    break;
                }
            }
        }
        let received = client.done.drain(..).find(|done| done.kind == Kind::Recv).unwrap();
        assert_eq!(&received.buffer[..9], b"an answer");
        client.submit(received.token, Operation::Recv { buffer: received.buffer });
    }
    drop(client);
    echo.join().unwrap();
}

const COUNT: u64 = 4000;
/// Messages that may be unacknowledged.
const WINDOW: u64 = 16;
/// Number of a message that only acknowledges.
const ACK: u64 = u64::MAX;

/// One side: sends its messages in random bursts, acknowledges the peer's, sleeps when it can do neither.
fn run(mut end: End, seed: u64) -> End {
    let (mut sent, mut received, mut heard, mut told) = (0u64, 0u64, 0u64, 0u64);
    let mut random = Random(seed);
    while received < COUNT || heard < COUNT {
        for _ in 0..random.below(9) {
            if sent < COUNT && sent < heard + WINDOW && say(&mut end, sent, received, 16 + random.below(3000))
            {
                (sent, told) = (sent + 1, received);
            }
        }
        let is_owed = received - told >= WINDOW / 2 || (received == COUNT && told < COUNT);
        if is_owed && say(&mut end, ACK, received, 16) {
            told = received;
        }
        end.pump();
        let may_send = sent < COUNT && sent < heard + WINDOW;
        if end.done.is_empty() && !may_send && (received < COUNT || heard < COUNT) {
            drive(&mut [&mut end], |ends| !ends[0].done.is_empty());
        }
        while let Some(completion) = end.done.pop_front() {
            completion.outcome.unwrap();
            if completion.kind == Kind::Recv {
                let number =
                    |at: usize| u64::from_le_bytes(completion.buffer[at..at + 8].try_into().unwrap());
                heard = heard.max(number(8));
                if number(0) != ACK {
                    assert_eq!(number(0), received);
                    received += 1;
                }
                end.submit(completion.token, Operation::Recv { buffer: completion.buffer });
            }
        }
    }
    if told < COUNT {
        assert!(say(&mut end, ACK, received, 16));
        end.pump();
    }
    end
}

fn say(end: &mut End, number: u64, received: u64, length: usize) -> bool {
    let mut buffer = end.buffer();
    buffer[..8].copy_from_slice(&number.to_le_bytes());
    buffer[8..16].copy_from_slice(&received.to_le_bytes());
    end.channel.submit(number, Operation::Send { buffer, length }).is_ok()
}

pub(crate) fn bursts_between_sleepers_are_never_lost<F: Fabric>() {
    let sizes = Sizes { depth: 32, receives: 32, buffer_len: 4096, buffers: 96 };
    let (client, server) = ends::<F>(sizes, 32);
    let other = std::thread::spawn(move || run(server, 7));
    let mut client = run(client, 8);
    // The other side may still wait for what this one has queued.
    while !other.is_finished() {
        drive_for(&mut [&mut client], std::time::Duration::from_millis(5), |_| false);
    }
    let _server = other.join().unwrap();
}

pub(crate) fn sleepers_that_move_bulk_both_ways_never_miss_each_other<F: Fabric>() {
    const ROUNDS: u64 = 100;
    const LENGTH: usize = 1 << 20;
    const BULK: u64 = 200;
    let sizes = Sizes { depth: 16, receives: 8, buffer_len: LENGTH, buffers: 24 };
    let (mut client, mut server) = ends::<F>(sizes, 4);
    let [fetched, placed] =
        [RemoteAccess::Fetch, RemoteAccess::Place].map(|access| client.register(LENGTH, access));
    let (from, to) = (fetched.descriptor(), placed.descriptor());
    // The client answers messages; all the time its memory is read and written.
    let echo = std::thread::spawn(move || {
        loop {
            drive(&mut [&mut client], |ends| !ends[0].done.is_empty() || ends[0].has_ended());
            if client.has_ended() {
                return;
            }
            while let Some(completion) = client.done.pop_front() {
                if completion.kind == Kind::Recv {
                    let number = completion.buffer[..8].to_vec();
                    client.submit(completion.token, Operation::Recv { buffer: completion.buffer });
                    client.send(0, &number);
                }
            }
        }
    });
    let (mut heard, mut moved) = (0, 0);
    for _ in 0..2 {
        server.fetch(0, from);
        let buffer = server.buffer();
        server.submit(0, Operation::Place { buffer, remote: to });
    }
    server.send(0, &0u64.to_le_bytes());
    while heard < ROUNDS || moved < BULK {
        let completion = server.next();
        completion.outcome.unwrap();
        let buffer = completion.buffer;
        match completion.kind {
            Kind::Recv => {
                assert_eq!(buffer[..8], u64::to_le_bytes(heard));
                heard += 1;
                server.submit(completion.token, Operation::Recv { buffer });
                if heard < ROUNDS {
                    server.send(0, &heard.to_le_bytes());
                }
            }
            Kind::Send => {}
            kind => {
                moved += 1;
                let more = match kind {
                    Kind::Fetch => Operation::Fetch { buffer, remote: from },
                    _ => Operation::Place { buffer, remote: to },
                };
                if moved + 4 <= BULK {
                    server.submit(0, more);
                }
            }
        }
    }
    drop(server);
    echo.join().unwrap();
}

/// More is sent than has room on the way, and the sender looks (and arms) just after the receiver has made room.
pub(crate) fn who_waits_for_room_hears_of_it_whoever_looked_in_between<F: Fabric>() {
    const LENGTH: usize = 60 << 10;
    let sizes = Sizes { depth: 16, receives: 8, buffer_len: LENGTH, buffers: 24 };
    for server_first in [true, false] {
        let (mut client, mut server) = ends::<F>(sizes, 8);
        let bytes = pattern(7, LENGTH);
        let (sender, receiver) =
            if server_first { (&mut server, &mut client) } else { (&mut client, &mut server) };
        for token in 0..8 {
            sender.send(token, &bytes);
        }
        drive(&mut [sender, receiver], |ends| ends[1].done.len() == 8);
        for completion in receiver.done.drain(..) {
            assert_eq!(ok(&completion, Kind::Recv), LENGTH);
            assert!(completion.buffer[..] == bytes[..]);
        }
    }
}
