//! What `holdfast bench` takes.

use super::parse_count;
use crate::remote::Remote;
use clap::{Args, ValueEnum};
use holdfast_client::{OneSided, Transport};

/// Measure reads or writes of one file: rate, latency, CPU time
///
/// Without a file of that name one is made, filled, and removed at the end. A file that is there is only read, unless
/// --overwrite allows to destroy what it holds. Each job has data channels and a thread of its own; sequential jobs go through
/// parts of the file of their own.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  holdfast bench data:/bench                                  # random 4 KiB reads, 16 in flight, for 5 s
  holdfast bench data:/bench --rw write --bs 1m --depth 8 --size 4g
  holdfast bench data:/bench --rw randwrite --verify --transport tcp --json")]
pub(crate) struct Bench {
    /// VOLUME:/path of the file
    pub(crate) file: Remote,
    /// What to do
    #[arg(long, value_enum, default_value = "randread")]
    pub(crate) rw: Pattern,
    /// Bytes of one read or write: 512 to 64m, a multiple of 512
    #[arg(long, default_value = "4k", value_parser = parse_block, value_name = "SIZE")]
    pub(crate) bs: usize,
    /// Requests in flight in each job
    #[arg(long, default_value = "16", value_parser = parse_count, value_name = "N")]
    pub(crate) depth: usize,
    /// Jobs at once
    #[arg(long, default_value = "1", value_parser = parse_count, value_name = "N")]
    pub(crate) jobs: usize,
    /// Data channels of each job; requests of more than 1 MiB are split over them
    #[arg(long, default_value = "1", value_parser = super::parse_channels, value_name = "N")]
    pub(crate) channels: usize,
    /// How long to measure, seconds
    #[arg(long, default_value = "5", value_parser = clap::value_parser!(u64).range(1..=86_400), value_name = "S")]
    pub(crate) runtime: u64,
    /// How much of the file to use
    #[arg(long, default_value = "256m", value_parser = parse_size, value_name = "SIZE")]
    pub(crate) size: u64,
    /// Check all that is read; after writes, read everything back and check that the last write of each block is there
    #[arg(long)]
    pub(crate) verify: bool,
    /// Allow to write to a file that was there
    #[arg(long)]
    pub(crate) overwrite: bool,
    /// Leave the file that was made for the measurement
    #[arg(long)]
    pub(crate) keep: bool,
    /// How bytes travel: auto, local, verbs or tcp [default: the configuration's]
    #[arg(long)]
    pub(crate) transport: Option<Transport>,
    /// Whether hot parts of the file are read one-sided, where the server grants mappings: auto or off [default: the
    /// configuration's]
    #[arg(long)]
    pub(crate) one_sided: Option<OneSided>,
    /// One JSON object, and no progress bar
    #[arg(long)]
    pub(crate) json: bool,
}

/// In which order a file is gone through, and whether to read or write.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub(crate) enum Pattern {
    /// Reads, one after the other
    Read,
    /// Writes, one after the other
    Write,
    /// Reads of any block
    Randread,
    /// Writes of any block
    Randwrite,
}

impl Pattern {
    pub(crate) fn writes(self) -> bool {
        matches!(self, Self::Write | Self::Randwrite)
    }

    pub(crate) fn is_random(self) -> bool {
        matches!(self, Self::Randread | Self::Randwrite)
    }
}

/// A number of bytes: `4096`, `4k`, `1m`, `2g` (powers of 1024).
fn parse_size(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.as_bytes().last().map(u8::to_ascii_lowercase) {
        Some(b'k') => (&text[..text.len() - 1], 10),
        Some(b'm') => (&text[..text.len() - 1], 20),
        Some(b'g') => (&text[..text.len() - 1], 30),
        _ => (text, 0),
    };
    let number: Option<u64> = digits.parse().ok();
    let bytes = number.and_then(|number| number.checked_mul(1 << shift)).filter(|bytes| *bytes > 0);
    bytes.ok_or_else(|| "a number of bytes, such as 4096, 4k, 1m or 2g".into())
}

fn parse_block(text: &str) -> Result<usize, String> {
    let bytes = parse_size(text)?;
    let fits = (512..=64 << 20).contains(&bytes) && bytes % 512 == 0;
    usize::try_from(bytes).ok().filter(|_| fits).ok_or_else(|| "512 to 64m, a multiple of 512".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_numbers_with_a_unit() {
        for (text, bytes) in [("512", 512), ("4k", 4096), ("4K", 4096), ("3m", 3 << 20), ("2g", 2 << 30)] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        for wrong in ["", "k", "-1", "0", "0k", "4x", "1.5m", "99999999999g", "4é"] {
            assert!(parse_size(wrong).is_err(), "{wrong}");
        }
        assert_eq!(parse_block("1m"), Ok(1 << 20));
        for wrong in ["511", "513", "1000", "65m"] {
            assert!(parse_block(wrong).is_err(), "{wrong}");
        }
    }
}
