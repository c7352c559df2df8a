//! How opens and sessions are shown: row by row as they come, so that a million of them need no memory here.

use crate::output::{line, shown};
use serde_json::Value;
use std::io::Write;
use std::time::Duration;

/// Digits of an id that a table shows.
const SHORT: usize = 8;

/// A column: its head, its width (0 for the last, which has as much as it needs), and what stands in it.
pub(super) type Column = (&'static str, usize, fn(&Value) -> String);

pub(super) const OPENS: &[Column] = &[
    ("open", SHORT, |v| short(&v["open"])),
    ("state", 8, |v| text(&v["state"])),
    ("hold left", 9, hold_left),
    ("access", 6, |v| text(&v["access"])),
    ("share", 6, |v| text(&v["share"])),
    ("bindings", 8, |v| text(&v["bindings"])),
    ("locks", 5, |v| text(&v["locks"])),
    ("principal", 16, |v| text(&v["principal"])),
    ("file", 0, |v| format!("{}:/{}", text(&v["volume"]), text(&v["path"]).trim_start_matches('/'))),
];

pub(super) const SESSIONS: &[Column] = &[
    ("session", SHORT, |v| short(&v["session"])),
    ("opens", 6, |v| text(&v["opens"])),
    ("process", 10, |v| text(&v["process"])),
    ("principal", 16, |v| text(&v["principal"])),
    ("from", 0, |v| text(&v["address"])),
];

/// A list under way.
pub(super) struct List {
    json: bool,
    columns: &'static [Column],
    rows: u64,
}

impl List {
    pub(super) fn new(json: bool, columns: &'static [Column]) -> Self {
        Self { json, columns, rows: 0 }
    }

    /// The next one.
    pub(super) fn row(&mut self, value: &Value) -> anyhow::Result<()> {
        let first = self.rows == 0;
        self.rows += 1;
        if self.json {
            write!(std::io::stdout(), "{}{value}", if first { "[" } else { ",\n" })?;
            return Ok(());
        }
        if first {
            line(self.cells(|column| column.0.to_owned()))?;
        }
        line(self.cells(|column| column.2(value)))
    }

    fn cells(&self, cell: impl Fn(&Column) -> String) -> String {
        let cells: Vec<String> =
            self.columns.iter().map(|column| format!("{:<width$}", cell(column), width = column.1)).collect();
        cells.join("  ")
    }

    /// After the last; `none` says what there is none of.
    pub(super) fn end(self, none: &str) -> anyhow::Result<()> {
        match (self.json, self.rows) {
            (true, 0) => line("[]"),
            (true, _) => line("]"),
            (false, 0) => {
                eprintln!("{none}");
                Ok(())
            }
            (false, _) => Ok(()),
        }
    }
}

/// Everything that is known of one open.
pub(super) fn whole(open: &Value) -> anyhow::Result<()> {
    for (name, value) in open.as_object().into_iter().flatten() {
        line(format_args!("{name:<16} {}", text(value)))?;
    }
    Ok(())
}

/// A value as people read it, and safe for their terminal.
pub(super) fn text(value: &Value) -> String {
    match value {
        Value::Null => "-".into(),
        Value::String(text) if text.is_empty() => "-".into(),
        Value::String(text) => shown(text),
        other => shown(&other.to_string()),
    }
}

fn short(id: &Value) -> String {
    text(id).chars().take(SHORT).collect()
}

/// How long a detached open is still protected.
fn hold_left(open: &Value) -> String {
    match (open["state"].as_str(), open["hold_left_ms"].as_u64()) {
        (Some("expired"), _) => "over".into(),
        (Some("detached"), Some(ms)) if ms < 10_000 => {
            format!("{:.1} s", Duration::from_millis(ms).as_secs_f64())
        }
        (Some("detached"), Some(ms)) => format!("{} s", ms / 1000),
        _ => "-".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_row_says_what_there_is_and_nothing_drives_the_terminal() {
        let open = json!({
            "open": "0123456789abcdef", "state": "detached", "hold_left_ms": 1500, "access": "rw", "share": "",
            "bindings": 2, "locks": 1, "principal": "p\u{1b}[2J", "volume": "data", "path": "a/b",
        });
        let list = List::new(false, OPENS);
        let row = list.cells(|column| column.2(&open));
        assert!(row.starts_with("01234567  detached  1.5 s      rw      -       2         1      "), "{row}");
        assert!(row.ends_with("  data:/a/b") && !row.contains('\u{1b}'), "{row}");
    }

    #[test]
    fn only_detached_opens_have_time_left() {
        let left = |state: &str| hold_left(&json!({ "state": state, "hold_left_ms": 61_000 }));
        assert_eq!(["active", "detached", "expired"].map(left), ["-", "61 s", "over"]);
    }
}
