//! [`Target`]: what a stream reads from or writes to.

use crate::binding::whole;
use crate::error::Result;
use crate::{Binding, Open, Region, Stripes};
use std::ops::Range;

/// A file at the server, through one channel or several.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Target {
    /// Through one.
    Binding(Binding),
    /// Through several.
    Stripes(Stripes),
}

impl From<Binding> for Target {
    fn from(binding: Binding) -> Self {
        Self::Binding(binding)
    }
}

impl From<&Binding> for Target {
    fn from(binding: &Binding) -> Self {
        Self::Binding(binding.clone())
    }
}

impl From<Stripes> for Target {
    fn from(stripes: Stripes) -> Self {
        Self::Stripes(stripes)
    }
}

impl From<&Stripes> for Target {
    fn from(stripes: &Stripes) -> Self {
        Self::Stripes(stripes.clone())
    }
}

impl From<&Target> for Target {
    fn from(target: &Target) -> Self {
        target.clone()
    }
}

impl Target {
    /// The open it belongs to.
    pub fn open(&self) -> Option<&Open> {
        match self {
            Self::Binding(binding) => binding.open(),
            Self::Stripes(stripes) => Some(stripes.open()),
        }
    }

    /// As [`Binding::read_at`] and [`Stripes::read_at`].
    ///
    /// # Errors
    /// As theirs.
    pub async fn read_at(&self, region: &Region, range: Range<usize>, file_offset: u64) -> Result<usize> {
        match self {
            Self::Binding(binding) => binding.read_at(region, range, file_offset).await,
            Self::Stripes(stripes) => stripes.read_at(region, range, file_offset).await,
        }
    }

    /// As [`Binding::write_all`] and [`Stripes::write_all`].
    ///
    /// # Errors
    /// As theirs.
    pub async fn write_all(&self, region: &Region, range: Range<usize>, file_offset: u64) -> Result<()> {
        match self {
            Self::Binding(binding) => binding.write_all(region, range, file_offset).await,
            Self::Stripes(stripes) => stripes.write_all(region, range, file_offset).await,
        }
    }

    /// As [`Binding::flush`] and [`Stripes::flush`].
    ///
    /// # Errors
    /// As theirs.
    pub async fn flush(&self) -> Result<()> {
        match self {
            Self::Binding(binding) => binding.flush().await,
            Self::Stripes(stripes) => stripes.flush().await,
        }
    }

    /// As [`Binding::unbind`] and [`Stripes::unbind`].
    ///
    /// # Errors
    /// As theirs.
    pub async fn unbind(&self) -> Result<()> {
        match self {
            Self::Binding(binding) => binding.unbind().await,
            Self::Stripes(stripes) => stripes.unbind().await,
        }
    }

    /// Fills `range` from `file_offset` on as far as the file goes: short only where a read found nothing more.
    pub(super) async fn read_full(
        &self,
        region: &Region,
        range: Range<usize>,
        file_offset: u64,
    ) -> Result<usize> {
        whole(range, file_offset, |part, at| self.read_at(region, part, at)).await
    }
}
