//! Sets of opens that cost no memory of their own while they have one member: most files have one open.

use crate::types::OpenId;
use std::collections::BTreeSet;

/// A set of opens.
#[derive(Debug, Default)]
pub(super) enum Ids {
    #[default]
    None,
    One(OpenId),
    #[expect(clippy::box_collection, reason = "the others, of which there are most, stay as small as one id")]
    Many(Box<BTreeSet<OpenId>>),
}

impl Ids {
    pub(super) fn insert(&mut self, id: OpenId) {
        match self {
            Self::None => *self = Self::One(id),
            Self::One(one) if *one == id => {}
            Self::One(one) => *self = Self::Many(Box::new(BTreeSet::from([*one, id]))),
            Self::Many(many) => drop(many.insert(id)),
        }
    }

    pub(super) fn remove(&mut self, id: OpenId) {
        match self {
            Self::One(one) if *one == id => *self = Self::None,
            Self::None | Self::One(_) => {}
            Self::Many(many) => {
                many.remove(&id);
                if many.len() <= 1 {
                    *self = many.first().map_or(Self::None, |one| Self::One(*one));
                }
            }
        }
    }

    pub(super) fn contains(&self, id: OpenId) -> bool {
        match self {
            Self::None => false,
            Self::One(one) => *one == id,
            Self::Many(many) => many.contains(&id),
        }
    }

    pub(super) fn len(&self) -> usize {
        match self {
            Self::None => 0,
            Self::One(_) => 1,
            Self::Many(many) => many.len(),
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// In the order of the ids.
    pub(super) fn iter(&self) -> impl Iterator<Item = OpenId> {
        let (one, many) = match self {
            Self::None => (None, None),
            Self::One(one) => (Some(*one), None),
            Self::Many(many) => (None, Some(many.iter().copied())),
        };
        one.into_iter().chain(many.into_iter().flatten())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_set_holds_what_was_inserted_in_order_and_each_once() {
        let id = |n: u8| OpenId([n; 16]);
        let mut ids = Ids::default();
        assert!(ids.is_empty());
        for n in [3, 1, 1, 3, 2] {
            ids.insert(id(n));
            assert!(ids.contains(id(n)));
        }
        assert_eq!(ids.iter().collect::<Vec<_>>(), [id(1), id(2), id(3)]);
        ids.remove(id(9));
        ids.remove(id(1));
        ids.remove(id(3));
        assert!(matches!(ids, Ids::One(one) if one == id(2)), "{ids:?}");
        assert!(!ids.contains(id(3)) && ids.contains(id(2)) && ids.len() == 1);
        ids.remove(id(1));
        ids.remove(id(2));
        assert!(ids.is_empty() && ids.iter().next().is_none());
    }
}
