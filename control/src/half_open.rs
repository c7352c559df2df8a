//! Connections whose handshake is not finished: how many there may be, and who must go when there are too many.
//!
//! A peer that is nobody yet costs one place. One address has a share of the places; an IPv6 host has at
//! least a /64 to choose from, so that counts as one address. When all places are taken, the oldest
//! connection gives way to the newest: a handshake takes milliseconds, so it is somebody idle who goes.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::sync::Arc;
use tokio::sync::Notify;

/// All half-open connections, the oldest first.
#[derive(Debug, Default)]
pub(crate) struct HalfOpen {
    last: u64,
    places: BTreeMap<u64, (IpAddr, Arc<Notify>)>,
    by_address: HashMap<IpAddr, usize>,
}

/// What a new connection got.
#[derive(Debug)]
pub(crate) struct Entered {
    /// The number of its place.
    pub(crate) number: u64,
    /// Tells when it has to go.
    pub(crate) evicted: Arc<Notify>,
    /// True if another had to go for it.
    pub(crate) replaced: bool,
}

impl HalfOpen {
    /// A place for a connection from there; `None` if the address has its share.
    pub(crate) fn enter(&mut self, from: IpAddr, max: usize, per_address: usize) -> Option<Entered> {
        let address = network(from);
        if self.by_address.get(&address).is_some_and(|count| *count >= per_address) {
            return None;
        }
        let oldest = self.places.first_key_value().map(|(number, _)| *number);
        let replaced = oldest.filter(|_| self.places.len() >= max).and_then(|number| self.leave(number));
        if let Some(evicted) = &replaced {
            evicted.notify_one();
        }
        self.last += 1;
        let (number, evicted) = (self.last, Arc::new(Notify::new()));
        self.places.insert(number, (address, evicted.clone()));
        *self.by_address.entry(address).or_default() += 1;
        Some(Entered { number, evicted, replaced: replaced.is_some() })
    }

    /// Gives a place back, if it is still held.
    pub(crate) fn leave(&mut self, number: u64) -> Option<Arc<Notify>> {
        let (address, evicted) = self.places.remove(&number)?;
        if let Some(count) = self.by_address.get_mut(&address) {
            *count -= 1;
            if *count == 0 {
                self.by_address.remove(&address);
            }
        }
        Some(evicted)
    }
}

/// What counts as one address.
fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) => IpAddr::V6((v6.to_bits() & !u128::from(u64::MAX)).into()),
        v4 => v4,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn from(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[tokio::test]
    async fn the_oldest_gives_way_to_the_newest() {
        let mut half_open = HalfOpen::default();
        let first = half_open.enter(from("10.0.0.1"), 2, 2).unwrap();
        let second = half_open.enter(from("10.0.0.1"), 2, 2).unwrap();
        assert!(half_open.enter(from("10.0.0.1"), 2, 2).is_none(), "its share");
        assert!(!first.replaced && !second.replaced);
        let third = half_open.enter(from("10.0.0.2"), 2, 2).unwrap();
        assert!(third.replaced);
        first.evicted.notified().await;
        assert!(half_open.leave(first.number).is_none(), "given back once");
        assert!(half_open.leave(second.number).is_some() && half_open.leave(third.number).is_some());
        assert!(half_open.places.is_empty() && half_open.by_address.is_empty());
    }

    #[test]
    fn an_ipv6_network_is_one_address() {
        let mut half_open = HalfOpen::default();
        assert!(half_open.enter(from("2001:db8::1"), 9, 1).is_some());
        assert!(half_open.enter(from("2001:db8::ffff:2"), 9, 1).is_none());
        assert!(half_open.enter(from("2001:db8:0:1::1"), 9, 1).is_some());
        assert!(half_open.enter(from("10.0.0.1"), 9, 1).is_some());
        assert!(half_open.enter(from("::ffff:10.0.0.1"), 9, 1).is_none());
        assert!(half_open.enter(from("10.0.0.2"), 9, 1).is_some());
    }
}
