//! What waits to be told to control, and what of it a registration makes needless.

use crate::engine::Ticket;
use crossbeam::queue::SegQueue;
use holdfast_shared::wire::link::{Fence, LinkBinding, Redeem, Restricted};
use std::collections::HashSet;

pub(super) enum Outgoing {
    Redeem(Ticket, Redeem),
    Fenced(Fence),
    Released(LinkBinding),
    Restricted(Restricted),
    Withdrawn(u64),
}

/// After all bindings were gathered, `held` by name: what is still to be told once control has answered, and the binds
/// that are to be refused.
///
/// Workers are asked one by one. Of a binding that had ended before its worker was asked, nothing is told: it is not among
/// those held. One that ended afterwards is told of as held, so its end must be told too. A restriction or withdrawal was
/// asked for by an earlier control.
pub(super) fn sort_out(
    queue: &SegQueue<Outgoing>,
    held: &HashSet<LinkBinding>,
) -> (Vec<Outgoing>, Vec<Ticket>) {
    let (mut untold, mut tickets) = (Vec::new(), Vec::new());
    while let Some(message) = queue.pop() {
        match message {
            Outgoing::Redeem(ticket, _) => tickets.push(ticket),
            Outgoing::Fenced(Fence { binding, .. }) | Outgoing::Released(binding)
                if held.contains(&binding) =>
            {
                untold.push(message);
            }
            Outgoing::Fenced(_)
            | Outgoing::Released(_)
            | Outgoing::Restricted(_)
            | Outgoing::Withdrawn(_) => {}
        }
    }
    (untold, tickets)
}

#[cfg(test)]
mod tests {
    use super::*;
    use holdfast_shared::types::{OpenId, Status};

    #[test]
    fn only_the_end_of_what_is_told_as_held_is_told() {
        let queue = SegQueue::new();
        let fence = |n| Fence { binding: LinkBinding(n), epoch: 1, reason: Status::Fenced };
        queue.push(Outgoing::Fenced(fence(1)));
        queue.push(Outgoing::Fenced(fence(2)));
        queue.push(Outgoing::Restricted(Restricted { open: OpenId([1; 16]), version: 9 }));
        queue.push(Outgoing::Withdrawn(9));
        queue.push(Outgoing::Released(LinkBinding(3)));
        queue.push(Outgoing::Released(LinkBinding(4)));
        let held = [2, 4, 5].map(LinkBinding).into();
        let (untold, tickets) = sort_out(&queue, &held);
        assert!(
            matches!(untold[..], [Outgoing::Fenced(f), Outgoing::Released(LinkBinding(4))] if f == fence(2))
        );
        assert!(tickets.is_empty() && queue.is_empty());
    }
}
