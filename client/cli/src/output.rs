//! How sizes, times and attributes are shown.

use holdfast_client::{Attributes, FileKind, FileTime};
use serde_json::{Value, json};
use std::io::Write;

/// Prints a line; a reader that went away (`| head`) is an error the caller ends with quietly.
pub(crate) fn line(text: impl std::fmt::Display) -> anyhow::Result<()> {
    Ok(writeln!(std::io::stdout(), "{text}")?)
}

/// Text of a server or another user, made safe to show: what would drive the terminal or reorder the text is escaped.
pub(crate) fn shown(text: &str) -> String {
    text.chars().fold(String::with_capacity(text.len()), |mut safe, c| {
        if drives_terminal(c) {
            safe.extend(c.escape_debug())
        } else {
            safe.push(c)
        }
        safe
    })
}

/// As [`shown`], for text of ours that may hold such text and has several lines.
pub(crate) fn shown_lines(text: &str) -> String {
    text.split('\n').map(shown).collect::<Vec<_>>().join("\n")
}

fn drives_terminal(c: char) -> bool {
    let reorders =
        matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    c.is_control() || reorders
}

/// One word for a kind.
pub(crate) fn kind(kind: FileKind) -> &'static str {
    match kind {
        FileKind::File => "file",
        FileKind::Directory => "directory",
        FileKind::Symlink => "symlink",
        FileKind::Other => "other",
    }
}

/// As `ls -l` writes it: `-rw-r--r--`.
pub(crate) fn permissions(attributes: &Attributes) -> String {
    let mut text = String::from(match attributes.kind {
        FileKind::File => "-",
        FileKind::Directory => "d",
        FileKind::Symlink => "l",
        FileKind::Other => "?",
    });
    for bit in (0..9).rev() {
        let letter = ["x", "w", "r"][bit % 3];
        text.push_str(if attributes.mode >> bit & 1 == 1 { letter } else { "-" });
    }
    text
}

/// A size for people: `1.5 MiB`.
pub(crate) fn size(bytes: u64) -> String {
    indicatif::HumanBytes(bytes).to_string()
}

/// UTC: `2026-01-31 12:00:00`.
pub(crate) fn time(time: FileTime) -> String {
    let (days, seconds) = (time.seconds.div_euclid(86_400), time.seconds.rem_euclid(86_400));
    let (year, month, day) = civil(days);
    format!(
        "{year:04}-{month:02}-{day:02} {:02}:{:02}:{:02}",
        seconds / 3600,
        seconds / 60 % 60,
        seconds % 60
    )
}

/// The Gregorian date of a day counted from 1970-01-01 (Howard Hinnant's `civil_from_days`).
fn civil(days: i64) -> (i64, i64, i64) {
    let shifted = days.saturating_add(719_468);
    let era = shifted.div_euclid(146_097);
    let day_of_era = shifted.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_index = (5 * day_of_year + 2) / 153;
    let month = if month_index < 10 { month_index + 3 } else { month_index - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    (year, month, day_of_year - (153 * month_index + 2) / 5 + 1)
}

/// Attributes as JSON.
pub(crate) fn attributes(attributes: &Attributes) -> Value {
    let time = |t: FileTime| json!({ "seconds": t.seconds, "nanos": t.nanos });
    json!({
        "kind": kind(attributes.kind),
        "size": attributes.size,
        "allocated": attributes.allocated,
        "mode": format!("{:04o}", attributes.mode & 0o7777),
        "inode": attributes.inode,
        "links": attributes.links,
        "uid": attributes.uid,
        "gid": attributes.gid,
        "accessed": time(attributes.accessed),
        "modified": time(attributes.modified),
        "changed": time(attributes.changed),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_servers_text_never_drives_the_terminal() {
        let hostile = "a\u{1b}[2J\u{7}\u{9b}31m\r\u{202e}b";
        for safe in [shown(hostile), shown_lines(hostile)] {
            assert!(!safe.chars().any(drives_terminal), "{safe:?}");
            assert!(safe.starts_with("a\\u{1b}[2J") && safe.ends_with('b'), "{safe}");
        }
        assert_eq!(shown("ä 'b' \\ c\nd"), "ä 'b' \\ c\\nd");
        assert_eq!(shown_lines("a\nb"), "a\nb");
    }

    #[test]
    fn times_are_utc_dates() {
        for (seconds, wanted) in [
            (0, "1970-01-01 00:00:00"),
            (951_827_696, "2000-02-29 12:34:56"),
            (1_767_225_599, "2025-12-31 23:59:59"),
            (-1, "1969-12-31 23:59:59"),
        ] {
            assert_eq!(time(FileTime { seconds, nanos: 0 }), wanted);
        }
        // A hostile server's time must not panic.
        time(FileTime { seconds: i64::MAX, nanos: 0 });
        time(FileTime { seconds: i64::MIN, nanos: 0 });
    }
}
