//! Who may come in: channels that have no binding yet, by address.
//!
//! ```text
//!            arrive                adopted                 first bind, end
//!  (peer) ──────────► expected ──────────► half-open(id) ──────────────────► (gone)
//!            │            └─ never came: forgotten after a while
//!            └─ full: the oldest of the address that has the most gives way
//! ```
//!
//! Nobody has proven anything here, so a place is worth little: a newcomer gets the place of the one that has sat on
//! his longest. An honest client binds within milliseconds, and has its place no longer than that.

use parking_lot::Mutex;
use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

/// After this a peer that was let in and never became a channel is forgotten; longer than any transport's handshake.
const EXPECTED_FOR: Duration = Duration::from_secs(6);

/// One host, as far as an address tells: of IPv6 the network, as a host has all the addresses in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Host {
    V4([u8; 4]),
    V6([u8; 8]),
}

impl Host {
    fn of(peer: SocketAddr) -> Self {
        match peer.ip().to_canonical() {
            IpAddr::V4(ip) => Self::V4(ip.octets()),
            IpAddr::V6(ip) => {
                let mut network = [0; 8];
                network.copy_from_slice(&ip.octets()[..8]);
                Self::V6(network)
            }
        }
    }
}

/// Someone who waits.
struct Waiting {
    host: Host,
    peer: SocketAddr,
    /// `None`: has become a channel.
    expected_until: Option<Instant>,
    worker: usize,
}

#[derive(Default)]
struct Inside {
    /// Oldest first.
    waiting: BTreeMap<u64, Waiting>,
    hosts: HashMap<Host, usize>,
    next: u64,
}

/// What the door says to a newcomer.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    Welcome,
    /// The channel with this id, at this worker, has to go.
    InsteadOf {
        worker: usize,
        id: u64,
    },
    /// All places are taken by peers that are about to become channels.
    Full,
}

/// See the module's text.
pub(crate) struct Door {
    inside: Mutex<Inside>,
    max: usize,
    per_host: usize,
}

impl Door {
    pub(crate) fn new(max: usize, per_host: usize) -> Self {
        Self { inside: Mutex::default(), max, per_host }
    }

    /// A peer has come.
    pub(crate) fn arrive(&self, peer: SocketAddr, now: Instant) -> Answer {
        let host = Host::of(peer);
        let mut inside = self.inside.lock();
        inside.forget(now);
        let of_host = inside.hosts.get(&host).copied().unwrap_or(0);
        let mut answer = Answer::Welcome;
        if of_host >= self.per_host || inside.waiting.len() >= self.max {
            let crowded = inside.hosts.iter().max_by_key(|(_, count)| **count).map(|(host, _)| *host);
            let from = if of_host >= self.per_host { Some(host) } else { crowded };
            let oldest = inside
                .waiting
                .iter()
                .find(|(_, w)| Some(w.host) == from && w.expected_until.is_none())
                .map(|(id, w)| (*id, w.worker));
            let Some((id, worker)) = oldest else { return Answer::Full };
            inside.leave(id);
            answer = Answer::InsteadOf { worker, id };
        }
        inside.enter(Waiting { host, peer, expected_until: Some(now + EXPECTED_FOR), worker: 0 });
        answer
    }

    /// The peer is a channel now, of this worker; its id.
    pub(crate) fn adopted(&self, peer: SocketAddr, worker: usize) -> u64 {
        let mut inside = self.inside.lock();
        let expected = inside.waiting.iter().find(|(_, w)| w.peer == peer && w.expected_until.is_some());
        if let Some(id) = expected.map(|(id, _)| *id) {
            inside.leave(id);
        }
        inside.enter(Waiting { host: Host::of(peer), peer, expected_until: None, worker })
    }

    /// The channel is bound, or gone. Idempotent.
    pub(crate) fn leave(&self, id: u64) {
        self.inside.lock().leave(id);
    }
}

impl Inside {
    fn enter(&mut self, waiting: Waiting) -> u64 {
        self.next += 1;
        *self.hosts.entry(waiting.host).or_default() += 1;
        self.waiting.insert(self.next, waiting);
        self.next
    }

    fn leave(&mut self, id: u64) {
        let Some(waiting) = self.waiting.remove(&id) else { return };
        if let Some(count) = self.hosts.get_mut(&waiting.host) {
            *count = count.saturating_sub(1);
            if *count == 0 {
                self.hosts.remove(&waiting.host);
            }
        }
    }

    fn forget(&mut self, now: Instant) {
        let late = |w: &Waiting| w.expected_until.is_some_and(|until| until <= now);
        while let Some(id) = self.waiting.iter().find(|(_, w)| late(w)).map(|(id, _)| *id) {
            self.leave(id);
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn peer(host: u8, port: u16) -> SocketAddr {
        SocketAddr::from(([10, 0, 0, host], port))
    }

    #[test]
    fn the_oldest_of_the_host_with_the_most_gives_way() {
        let door = Door::new(4, 3);
        let now = Instant::now();
        assert_eq!(door.arrive(peer(9, 1), now), Answer::Welcome);
        let lonely = door.adopted(peer(9, 1), 0);
        let ids: Vec<u64> = (0..3)
            .map(|port| {
                assert_eq!(door.arrive(peer(1, port), now), Answer::Welcome);
                door.adopted(peer(1, port), 1)
            })
            .collect();
        // A host at its limit pays itself; then the doors are full, and the crowd pays.
        assert_eq!(door.arrive(peer(1, 9), now), Answer::InsteadOf { worker: 1, id: ids[0] });
        door.adopted(peer(1, 9), 1);
        assert_eq!(door.arrive(peer(2, 1), now), Answer::InsteadOf { worker: 1, id: ids[1] });
        door.adopted(peer(2, 1), 0);
        door.leave(lonely);
        door.leave(lonely);
        assert_eq!(door.arrive(peer(3, 1), now), Answer::Welcome);
    }

    #[test]
    fn who_never_becomes_a_channel_counts_and_is_forgotten() {
        let door = Door::new(2, 2);
        let now = Instant::now();
        assert_eq!(door.arrive(peer(1, 1), now), Answer::Welcome);
        assert_eq!(door.arrive(peer(1, 2), now), Answer::Welcome);
        assert_eq!(door.arrive(peer(1, 3), now), Answer::Full);
        assert_eq!(door.arrive(peer(1, 3), now + EXPECTED_FOR), Answer::Welcome);
        let inside = door.inside.lock();
        assert_eq!((inside.waiting.len(), inside.hosts.len()), (1, 1));
    }

    #[test]
    fn a_host_is_an_ipv4_address_or_an_ipv6_network() {
        let host = |text: &str| Host::of(SocketAddr::new(text.parse().unwrap(), 1));
        assert_eq!(host("2001:db8::1"), host("2001:db8::ffff:1"));
        assert_ne!(host("2001:db8::1"), host("2001:db8:0:1::1"));
        assert_eq!(host("::ffff:10.0.0.1"), host("10.0.0.1"));
        assert_ne!(host("10.0.0.1"), host("10.0.0.2"));
    }
}
