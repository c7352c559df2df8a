//! The last events of a run, in words. Words cost time, so they are made only when a run is repeated to be read.

use std::collections::VecDeque;

/// Lines that are kept.
const LINES: usize = 200;

#[derive(Debug, Default)]
pub(crate) struct Trace {
    on: bool,
    lines: VecDeque<String>,
}

impl Trace {
    pub(crate) fn new(on: bool) -> Self {
        Self { on, lines: VecDeque::new() }
    }

    /// Notes a line, if anybody wants it.
    pub(crate) fn note(&mut self, now: u64, words: impl FnOnce() -> String) {
        if self.on {
            if self.lines.len() == LINES {
                self.lines.pop_front();
            }
            self.lines.push_back(format!("{:>12.3} ms  {}", now as f64 / 1e6, words()));
        }
    }

    pub(crate) fn text(&self) -> String {
        self.lines.iter().fold(String::new(), |text, line| text + line + "\n")
    }
}
