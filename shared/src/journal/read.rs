//! Reads one segment's frames, and tells a write that a crash cut short from damage.
//!
//! ```text
//!  header | whole | whole | whole | bad ........................ end of file
//!                                  ^
//!        all zeros from here       : the end
//!        a whole frame further on, of a batch that began after `bad` : damage, since `bad` was durable before it
//!        anything else             : the last write, cut short
//! ```

use super::disk::{Disk, DiskError};
use super::layout::{ALIGNMENT, FRAME_HEAD_BYTES, FrameHead, HEADER_BYTES, Header, is_whole};

/// Bytes read at once.
const CHUNK: usize = 1 << 20;

/// A file seen through a window that slides over it: memory does not grow with the file.
struct Window<'d, D: Disk> {
    disk: &'d D,
    file: D::File,
    length: u64,
    start: u64,
    buffer: Vec<u8>,
}

impl<D: Disk> Window<'_, D> {
    /// The bytes at `at`: fewer than `wanted` only where the file ends.
    fn get(&mut self, at: u64, wanted: usize) -> Result<&[u8], DiskError> {
        let left = usize::try_from(self.length.saturating_sub(at)).unwrap_or(usize::MAX);
        let wanted = wanted.min(left);
        let inside = |start: u64, held: usize| {
            let skip = usize::try_from(at.checked_sub(start)?).ok()?;
            (skip.checked_add(wanted)? <= held).then_some(skip)
        };
        let skip = match inside(self.start, self.buffer.len()) {
            Some(skip) => skip,
            None => {
                self.buffer.resize(CHUNK.max(wanted).min(left), 0);
                self.start = at;
                let mut filled = 0;
                while filled < self.buffer.len() {
                    let from = at + filled as u64;
                    match self.disk.read_at(&self.file, from, &mut self.buffer[filled..])? {
                        0 => {
                            return Err(DiskError::Failed(
                                "the file became shorter while it was read".into(),
                            ));
                        }
                        got => filled += got,
                    }
                }
                0
            }
        };
        Ok(&self.buffer[skip..skip + wanted])
    }
}

/// The next thing in a segment.
pub(super) enum Step<'b> {
    /// A whole frame, and where it begins.
    Frame { at: u64, head: FrameHead, payload: &'b [u8] },
    /// Nothing more was written: from `at` on there are at most zeros.
    End { at: u64 },
    /// Something else than a frame.
    Bad { at: u64, problem: &'static str },
}

/// The frames of one segment, in order.
pub(super) struct Frames<'d, D: Disk> {
    window: Window<'d, D>,
    salt: u32,
    at: u64,
}

/// What is at the beginning of a segment file.
pub(super) enum Beginning {
    /// All 64 bytes of it.
    Header([u8; HEADER_BYTES]),
    /// The file is shorter than that.
    Short,
}

impl<'d, D: Disk> Frames<'d, D> {
    /// Opens a file and reads its first bytes, not judged yet.
    pub(super) fn open(disk: &'d D, name: &str) -> Result<(Beginning, Self), DiskError> {
        let file = disk.open(name)?;
        let length = disk.length(&file)?;
        let mut window = Window { disk, file, length, start: 0, buffer: Vec::new() };
        let beginning = match <[u8; HEADER_BYTES]>::try_from(window.get(0, HEADER_BYTES)?) {
            Ok(header) => Beginning::Header(header),
            Err(_) => Beginning::Short,
        };
        let salt = match &beginning {
            Beginning::Header(header) => Header::salt(header),
            Beginning::Short => 0,
        };
        Ok((beginning, Self { window, salt, at: HEADER_BYTES as u64 }))
    }

    /// The next frame. After an end or something bad it says the same again.
    pub(super) fn step(&mut self) -> Result<Step<'_>, DiskError> {
        let at = self.at;
        let head = match <[u8; FRAME_HEAD_BYTES]>::try_from(self.window.get(at, FRAME_HEAD_BYTES)?) {
            Ok(head) => FrameHead::decode(&head),
            Err(_) => Err("the file ends within a frame"),
        };
        let head = match head {
            Ok(head) => head,
            Err(problem) => return self.no_frame(at, problem),
        };
        let framed = head.framed();
        let salt = self.salt;
        let frame = self.window.get(at, framed)?;
        if frame.len() < framed {
            return Ok(Step::Bad { at, problem: "the file ends within a frame" });
        }
        if !is_whole(frame, salt) {
            return Ok(Step::Bad { at, problem: "the frame's checksum is wrong" });
        }
        self.at = at + framed as u64;
        // Once more, since a borrow cannot be both judged and given away; it is in the window already.
        let frame = self.window.get(at, framed)?;
        Ok(Step::Frame { at, head, payload: &frame[FRAME_HEAD_BYTES..FRAME_HEAD_BYTES + head.length] })
    }

    fn no_frame(&mut self, at: u64, problem: &'static str) -> Result<Step<'_>, DiskError> {
        let written = self.written_until(at)?;
        Ok(if written <= at { Step::End { at } } else { Step::Bad { at, problem } })
    }

    /// The end of the last byte from `from` on that is not zero; `from` if there is none.
    pub(super) fn written_until(&mut self, from: u64) -> Result<u64, DiskError> {
        let (mut at, mut last) = (from, from);
        while at < self.window.length {
            let bytes = self.window.get(at, CHUNK)?;
            if let Some(place) = bytes.iter().rposition(|byte| *byte != 0) {
                last = at + place as u64 + 1;
            }
            at += bytes.len() as u64;
        }
        Ok(last)
    }

    /// Where a whole frame of a batch begins that was begun after `bad`; none if there is none.
    pub(super) fn later_batch(&mut self, bad: u64) -> Result<Option<u64>, DiskError> {
        let salt = self.salt;
        let mut at = bad + ALIGNMENT as u64;
        while at < self.window.length {
            let Ok(head) = <[u8; FRAME_HEAD_BYTES]>::try_from(self.window.get(at, FRAME_HEAD_BYTES)?) else {
                break;
            };
            if let Ok(head) = FrameHead::decode(&head)
                && head.batch > bad
                && head.batch <= at
            {
                let framed = head.framed();
                let frame = self.window.get(at, framed)?;
                if frame.len() == framed && is_whole(frame, salt) {
                    return Ok(Some(at));
                }
            }
            at += ALIGNMENT as u64;
        }
        Ok(None)
    }
}
