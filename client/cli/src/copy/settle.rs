//! Names whose change was not answered: what has become of them is seen by looking, as nobody else uses names that hold a
//! random number.

use holdfast_client::{Error, Place, Result, Session, Status};

/// Repetitions of a request that each time lost its server: more is no accident.
const TIMES_MAX: usize = 100;

/// Renames an incomplete file to its own name. The incomplete one's name is ours alone: when it is gone, it was renamed.
pub(super) async fn rename(session: &Session, part: &Place, to: &Place) -> Result<()> {
    let mut result = session.rename(part, to, false).await;
    for _ in 0..TIMES_MAX {
        if !matches!(result, Err(Error::FateUnknown { .. })) {
            break;
        }
        match session.attributes(part).await {
            Err(error) if error.status() == Some(Status::NotFound) => return Ok(()),
            Err(error) => return Err(error),
            Ok(_) => result = session.rename(part, to, false).await,
        }
    }
    result
}

/// Removes an incomplete file; one that is not there is as good.
pub(super) async fn remove(session: &Session, part: &Place) -> Result<()> {
    let mut result = session.remove(part).await;
    for _ in 0..TIMES_MAX {
        match &result {
            Err(Error::FateUnknown { .. }) => result = session.remove(part).await,
            Err(error) if error.status() == Some(Status::NotFound) => return Ok(()),
            _ => break,
        }
    }
    result
}

/// Makes a link under a name that is ours alone: if it is there, it was made.
pub(super) async fn symlink(session: &Session, part: &Place, text: &str) -> Result<()> {
    let mut result = session.make_symlink(part, text).await;
    let mut unknown = false;
    for _ in 0..TIMES_MAX {
        match &result {
            Err(Error::FateUnknown { .. }) => {
                unknown = true;
                result = session.make_symlink(part, text).await;
            }
            Err(error) if unknown && error.status() == Some(Status::Exists) => return Ok(()),
            _ => break,
        }
    }
    result
}
