//! The dataplane of before: whether it lives, and what it still has.

use crate::driver::Event;
use crate::link::{LinkPacket, Registration};
use std::time::Duration;
use tokio::sync::mpsc;

/// How often a start that waits for a dataplane says so.
const SAY: Duration = Duration::from_secs(5);

/// A dataplane that has registered: the number of its connection, what it told, and how to answer it.
pub type Registered = (u64, Box<Registration>, mpsc::UnboundedSender<LinkPacket>);

/// Waits for the dataplane of before to register, or to be dead ([`Event::EarlierDataplaneDead`]): then `None`, since what it
/// had is gone. However long that takes: it may be writing to files of which nobody else may know yet.
pub async fn living(events: &mut mpsc::Receiver<Event>) -> Option<Registered> {
    tracing::info!("a dataplane of an earlier start lives; it is asked for what it holds");
    loop {
        match tokio::time::timeout(SAY, events.recv()).await {
            Ok(Some(Event::LinkBegin(id, registration, packets))) => {
                tracing::info!(
                    bindings = registration.held.len(),
                    descriptors = registration.descriptors.len(),
                    "the living dataplane has registered"
                );
                return Some((id, registration, packets));
            }
            Ok(Some(Event::EarlierDataplaneDead) | None) => {
                tracing::info!("the dataplane of before is dead");
                return None;
            }
            // Whoever asks now is told to ask later.
            Ok(Some(_)) => {}
            Err(_) => tracing::warn!(
                "waiting: a dataplane holds dataplane.lock and has not registered; nobody is let in before it has, \
                 or has ended"
            ),
        }
    }
}
