//! Remote paths as people type them: `VOLUME:/path`.

use holdfast_client::Place;
use holdfast_shared::types::{VOLUME_NAME_BYTES_MAX, VolumePath};
use std::fmt;
use std::str::FromStr;

/// A path in a volume.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) struct Remote {
    pub(crate) volume: String,
    /// Normal form, without a leading slash; empty for the root.
    pub(crate) path: String,
    /// True if it was typed with a slash at its end: then it must be a directory.
    pub(crate) directory: bool,
}

impl Remote {
    /// As requests name it.
    pub(crate) fn place(&self) -> Place {
        Place { volume: self.volume.clone(), path: self.path.clone() }
    }

    /// True if text looks like a remote path: a volume name, a colon, and a slash or nothing. Anything else is a
    /// local path; write `./a:/b` for a local file of such a name.
    pub(crate) fn looks_remote(text: &str) -> bool {
        text.split_once(':').is_some_and(|(volume, path)| {
            volume_is_valid(volume) && (path.is_empty() || path.starts_with('/'))
        })
    }

    /// The entry `name` in this directory.
    pub(crate) fn join(&self, name: &str) -> Self {
        let path = if self.path.is_empty() { name.to_owned() } else { format!("{}/{name}", self.path) };
        Self { volume: self.volume.clone(), path, directory: false }
    }

    /// The directory it is in; `None` for the root.
    pub(crate) fn parent(&self) -> Option<Self> {
        if self.path.is_empty() {
            return None;
        }
        let path = self.path.rsplit_once('/').map_or("", |(parent, _)| parent).to_owned();
        Some(Self { volume: self.volume.clone(), path, directory: true })
    }

    /// The last component; `None` for the root.
    pub(crate) fn name(&self) -> Option<&str> {
        (!self.path.is_empty())
            .then(|| self.path.rsplit_once('/').map_or(self.path.as_str(), |(_, name)| name))
    }
}

fn volume_is_valid(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= VOLUME_NAME_BYTES_MAX
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
        && !name.starts_with('.')
}

/// Checks a volume's name.
pub(crate) fn check_volume_name(name: &str) -> Result<(), String> {
    if volume_is_valid(name) {
        Ok(())
    } else {
        Err(format!(
            "'{name}' is not a volume name: letters, digits, '-', '_' and '.', at most {VOLUME_NAME_BYTES_MAX}, not beginning with '.'"
        ))
    }
}

impl FromStr for Remote {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let Some((volume, path)) = text.split_once(':') else {
            return Err(format!(
                "'{text}' is not a remote path; write VOLUME:/path, such as data:/{}",
                text.trim_start_matches('/')
            ));
        };
        check_volume_name(volume)?;
        let inside = match path.strip_prefix('/') {
            Some(inside) => inside.trim_start_matches('/'),
            None if path.is_empty() => "",
            None => return Err(format!("the path of '{text}' begins with a slash: {volume}:/{path}")),
        };
        let normal = VolumePath::parse(inside).map_err(|error| format!("'{text}': {error}"))?;
        Ok(Self {
            volume: volume.to_owned(),
            path: normal.as_str().to_owned(),
            directory: path.is_empty() || path.ends_with('/'),
        })
    }
}

impl fmt::Display for Remote {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:/{}", self.volume, self.path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Remote, String> {
        text.parse()
    }

    #[test]
    fn paths_take_their_normal_form() {
        for (text, wanted, directory) in [
            ("data:/", "data:/", true),
            ("data:", "data:/", true),
            ("data:/a/b", "data:/a/b", false),
            ("data://a//./b/", "data:/a/b", true),
            ("my-vol_1.x:/ä b", "my-vol_1.x:/ä b", false),
        ] {
            let remote = parse(text).unwrap();
            assert_eq!((remote.to_string().as_str(), remote.directory), (wanted, directory), "{text}");
        }
    }

    #[test]
    fn mistakes_say_what_to_write() {
        assert!(parse("a/b").unwrap_err().contains("data:/a/b"));
        assert!(parse("/tmp").unwrap_err().ends_with("data:/tmp"));
        assert!(parse("data:a").unwrap_err().contains("data:/a"));
        for wrong in [":/a", "da ta:/a", "data:/../x", "data:/a/../../x", ".x:/a"] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
        assert!(parse(&format!("{}:/a", "v".repeat(65))).is_err());
    }

    #[test]
    fn local_and_remote_are_told_apart() {
        for remote in ["data:/x", "data:", "v1:/"] {
            assert!(Remote::looks_remote(remote), "{remote}");
        }
        for local in ["a", "./data:/x", "/data:/x", "a b:/x", "x:y"] {
            assert!(!Remote::looks_remote(local), "{local}");
        }
    }

    #[test]
    fn families() {
        let remote = parse("data:/a/b").unwrap();
        assert_eq!(remote.name(), Some("b"));
        assert_eq!(remote.parent().unwrap().to_string(), "data:/a");
        assert_eq!(remote.join("c").to_string(), "data:/a/b/c");
        let root = parse("data:/").unwrap();
        assert_eq!((root.name(), root.parent()), (None, None));
        assert_eq!(root.join("a").to_string(), "data:/a");
    }
}
