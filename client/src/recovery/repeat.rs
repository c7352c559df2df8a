//! Which requests may be made again when their answer was lost.

use crate::error::{Error, Result};
use holdfast_shared::wire::control::{Request, Target};

/// Says that a request may be made again.
///
/// # Errors
/// [`Error::FateUnknown`] if it may have been carried out and doing it twice would do something else: a second removal
/// may remove what another client has put in its place.
pub(crate) fn may_be_made_again(request: &Request, sent: bool) -> Result<()> {
    match unsafe_to_repeat(request) {
        Some(what) if sent => Err(Error::FateUnknown { what }),
        _ => Ok(()),
    }
}

fn unsafe_to_repeat(request: &Request) -> Option<&'static str> {
    match request {
        Request::MakeDirectory(_) => Some("make directory"),
        Request::Remove(_) => Some("remove"),
        Request::Rename(_) => Some("rename"),
        Request::MakeSymlink(_) => Some("make link"),
        // A file's size by its name: others may have written since. By an open, the verdict tells.
        Request::SetAttributes(set) if set.size.is_some() && matches!(set.target, Target::Path(_)) => {
            Some("set size")
        }
        // Told apart by create id, number or resume key; absolute; or without effect.
        Request::Hello(_)
        | Request::Open(_)
        | Request::Resume(_)
        | Request::Lock(_)
        | Request::Unlock(_)
        | Request::CancelLock(_)
        | Request::Close(_)
        | Request::Logoff
        | Request::SetAttributes(_)
        | Request::QueryKey(_)
        | Request::GetAttributes(_)
        | Request::List(_)
        | Request::VolumeStatus(_)
        | Request::Volumes
        | Request::ReadSymlink(_)
        | Request::Ping => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Changes, Place};

    #[test]
    fn what_must_not_be_done_twice_is_not() {
        let place = || Place { volume: "v".into(), path: "p".into() };
        let sized = Changes { size: Some(1), ..Changes::default() };
        for (request, safe) in [
            (Request::Ping, true),
            (Request::Remove(place()), false),
            (Request::SetAttributes(Changes::default().of(Target::Path(place()))), true),
            (Request::SetAttributes(sized.of(Target::Path(place()))), false),
            (Request::SetAttributes(sized.of(Target::Open(crate::OpenId([1; 16])))), true),
        ] {
            assert_eq!(may_be_made_again(&request, true).is_ok(), safe, "{request:?}");
            assert!(may_be_made_again(&request, false).is_ok(), "never sent");
        }
    }
}
