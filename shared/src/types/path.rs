//! Paths inside a volume: checked for form here, and for where they lead by the kernel (`openat2`).

use super::limits::{NAME_BYTES_MAX, PATH_BYTES_MAX};

/// Why bytes are not a path inside a volume.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum PathError {
    /// It begins with a slash.
    #[error("the path is absolute; paths begin at the volume's root, without a slash")]
    Absolute,
    /// A component is `..`.
    #[error("the path contains '..'")]
    Parent,
    /// A component is longer than 255 bytes, or the whole longer than 4095.
    #[error("the path or one of its names is too long")]
    TooLong,
    /// It contains a zero byte.
    #[error("the path contains a zero byte")]
    Zero,
}

/// A relative path inside a volume in normal form: no leading slash, no empty, `.` or `..` component, no zero
/// byte. The volume's root is the empty path. Names are UTF-8, as they travel in control messages.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct VolumePath(String);

impl VolumePath {
    /// Checks and normalises (`a//b/./c/` becomes `a/b/c`).
    ///
    /// # Errors
    /// See [`PathError`]. `..` is refused rather than resolved: what it means depends on symlinks.
    pub fn parse(path: &str) -> Result<Self, PathError> {
        if path.starts_with('/') {
            return Err(PathError::Absolute);
        }
        if path.len() > PATH_BYTES_MAX {
            return Err(PathError::TooLong);
        }
        let mut normal = String::with_capacity(path.len());
        for name in path.split('/').filter(|name| !name.is_empty() && *name != ".") {
            if name == ".." {
                return Err(PathError::Parent);
            }
            if name.len() > NAME_BYTES_MAX {
                return Err(PathError::TooLong);
            }
            if name.contains('\0') {
                return Err(PathError::Zero);
            }
            if !normal.is_empty() {
                normal.push('/');
            }
            normal.push_str(name);
        }
        Ok(Self(normal))
    }

    /// The path; empty for the root.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The volume's root.
    pub const fn root() -> Self {
        Self(String::new())
    }

    /// True for the volume's root.
    pub fn is_root(&self) -> bool {
        self.0.is_empty()
    }

    /// (directory, last name); `None` for the root.
    pub fn split(&self) -> Option<(&str, &str)> {
        if self.0.is_empty() {
            return None;
        }
        Some(self.0.rsplit_once('/').unwrap_or(("", &self.0)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn normal_form() {
        let parse = |p: &str| VolumePath::parse(p).map(|p| p.as_str().to_owned());
        assert_eq!(parse("a//b/./c/").unwrap(), "a/b/c");
        assert_eq!(parse(".").unwrap(), "");
        assert_eq!(parse("/etc/passwd"), Err(PathError::Absolute));
        assert_eq!(parse("a/../../b"), Err(PathError::Parent));
        assert_eq!(parse("a\0b"), Err(PathError::Zero));
        assert_eq!(parse(&"x".repeat(256)), Err(PathError::TooLong));
        assert_eq!(parse(&"x/".repeat(3000)), Err(PathError::TooLong));
        assert_eq!(VolumePath::parse("a/b").unwrap().split(), Some(("a", "b")));
        assert_eq!(VolumePath::parse("b").unwrap().split(), Some(("", "b")));
    }
}
