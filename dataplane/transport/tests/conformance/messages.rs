//! Send and Recv.

use crate::kit::*;
use holdfast_transport::{ChannelError, Kind, Operation, OperationError};

pub(crate) fn messages_arrive_in_order_and_whole<F: Fabric>() {
    let (mut client, mut server) = ends::<F>(Sizes::default(), 16);
    let lengths = [0, 1, 23, 24, 25, 100, 4096, 4608, 16 << 10, (16 << 10) + 1, 64 << 10];
    for round in 0..120u64 {
        let message = pattern(round, lengths[round as usize % lengths.len()]);
        client.send(round, &message);
        drive(&mut [&mut client, &mut server], |ends| !ends[0].done.is_empty() && !ends[1].done.is_empty());
        let sent = client.next();
        assert_eq!((sent.token, ok(&sent, Kind::Send)), (round, message.len()));
        let received = server.next();
        assert_eq!(ok(&received, Kind::Recv), message.len());
        assert_eq!(
            received.token,
            FIRST_RECEIVE + round % 16,
            "receives are used in the order they were posted"
        );
        assert!(received.buffer[..message.len()] == message[..], "round {round}");
        server.submit(received.token, Operation::Recv { buffer: received.buffer });
    }
}

pub(crate) fn both_directions_at_full_depth<F: Fabric>() {
    const COUNT: u64 = 600;
    let (mut client, mut server) = ends::<F>(Sizes::default(), 16);
    // A receiver that says how many it took, in each message of its own, would be a protocol; the test looks itself.
    let (mut sent, mut received) = ([0; 2], [0u64; 2]);
    while received != [COUNT; 2] {
        let mut ends = [&mut client, &mut server];
        for side in 0..2 {
            while sent[side] < COUNT
                && sent[side] < received[1 - side] + 16
                && ends[side].pool.available() > 0
            {
                let message = pattern(sent[side] * 2 + side as u64, (sent[side] as usize * 37) % 5000);
                let mut buffer = ends[side].buffer();
                buffer[..message.len()].copy_from_slice(&message);
                let send = Operation::Send { buffer, length: message.len() };
                if ends[side].channel.submit(sent[side], send).is_err() {
                    break;
                }
                sent[side] += 1;
            }
        }
        drive(&mut ends, |ends| ends.iter().any(|end| !end.done.is_empty()));
        for side in 0..2 {
            while let Some(completion) = ends[side].done.pop_front() {
                let length = completion.outcome.unwrap();
                if completion.kind == Kind::Recv {
                    let expected =
                        pattern(received[side] * 2 + 1 - side as u64, (received[side] as usize * 37) % 5000);
                    assert!(completion.buffer[..length] == expected[..], "message {}", received[side]);
                    received[side] += 1;
                    ends[side].submit(completion.token, Operation::Recv { buffer: completion.buffer });
                }
            }
        }
    }
}

pub(crate) fn a_send_waits_for_a_recv<F: Fabric>() {
    if !F::SEND_WAITS {
        println!("{}: not promised", F::NAME);
        return;
    }
    let (mut client, mut server) = ends::<F>(Sizes::default(), 0);
    for token in 0..3 {
        client.send(token, &pattern(token, 3000));
    }
    let early = drive_for(&mut [&mut client, &mut server], std::time::Duration::from_millis(50), |ends| {
        ends[1].count(Kind::Recv) > 0
    });
    assert!(!early && !client.has_ended() && !server.has_ended());
    for token in 0..3 {
        server.recv(token);
        drive(&mut [&mut client, &mut server], |ends| ends[1].count(Kind::Recv) > 0);
        let received = server.next();
        assert_eq!((received.token, ok(&received, Kind::Recv)), (token, 3000));
        assert!(received.buffer[..3000] == pattern(token, 3000)[..]);
    }
}

pub(crate) fn a_message_longer_than_its_buffer_ends_the_channel<F: Fabric>() {
    let (mut client, mut server) = ends::<F>(Sizes::default(), 0);
    let small = holdfast_verbs::memory::Pool::new(100, 2).unwrap();
    let sizes = Sizes::default();
    let (a, b) = F::pair(setup(&client.pool, sizes, 2), setup(&small, sizes, 2));
    let (mut long, mut short) = (End::new(a, client.pool.clone()), End::new(b, small.clone()));
    long.send(7, &[9; 101]);
    drive(&mut [&mut long, &mut short], |ends| ends.iter().all(|end| end.has_ended()));
    drive(&mut [&mut short], |ends| ends[0].done.len() == 2);
    let why = short.channel.ended().unwrap();
    assert_eq!(short.next().outcome.unwrap_err(), OperationError::Length, "{why:?}");
    assert_eq!(short.next().outcome.unwrap_err(), OperationError::Flushed);
    assert!(matches!(why, ChannelError::Misbehaved(_)), "{why:?}");
    // Another channel between the same two is not concerned.
    server.recv(1);
    client.send(1, b"fine");
    drive(&mut [&mut client, &mut server], |ends| ends[1].count(Kind::Recv) == 1);
    drop((long, short));
    assert_eq!(small.available(), 2);
}
