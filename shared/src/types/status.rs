//! The closed set of answers to a request, on both planes.

macro_rules! statuses {
    ($($(#[$doc:meta])* $name:ident = $number:literal, $errno:ident, $text:literal, $hint:literal;)*) => {
        /// How a request ended. The numbers are fixed for ever; new ones are added, none is reused.
        ///
        /// | number | name | errno | meaning | what the client should do |
        /// |---|---|---|---|---|
        $(#[doc = concat!("| ", $number, " | `", stringify!($name), "` | ", stringify!($errno), " | ", $text, " | ", $hint, " |")])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
        #[repr(u16)]
        pub enum Status {
            $($(#[$doc])* #[doc = $text] $name = $number,)*
        }

        impl Status {
            /// Every status, in the order of its number.
            pub const ALL: &'static [Self] = &[$(Self::$name),*];

            /// The number as it travels.
            pub const fn number(self) -> u16 {
                self as u16
            }

            /// Reads a number as it travelled; `None` if this version does not know it.
            pub const fn from_number(number: u16) -> Option<Self> {
                match number {
                    $($number => Some(Self::$name),)*
                    _ => None,
                }
            }

            /// What happened, in words.
            pub const fn text(self) -> &'static str {
                match self { $(Self::$name => $text,)* }
            }

            /// What the client should do next, in words.
            pub const fn hint(self) -> &'static str {
                match self { $(Self::$name => $hint,)* }
            }

            /// The closest Linux errno, for mounts and the C API. Total by construction.
            pub const fn errno(self) -> i32 {
                match self { $(Self::$name => errno::$errno,)* }
            }
        }
    };
}

/// Linux errno values (asm-generic), so that the core needs no libc.
mod errno {
    pub(super) const OK: i32 = 0;
    pub(super) const EPERM: i32 = 1;
    pub(super) const ENOENT: i32 = 2;
    pub(super) const EIO: i32 = 5;
    pub(super) const EBADF: i32 = 9;
    pub(super) const EAGAIN: i32 = 11;
    pub(super) const EACCES: i32 = 13;
    pub(super) const EBUSY: i32 = 16;
    pub(super) const EEXIST: i32 = 17;
    pub(super) const EXDEV: i32 = 18;
    pub(super) const ENOTDIR: i32 = 20;
    pub(super) const EISDIR: i32 = 21;
    pub(super) const EINVAL: i32 = 22;
    pub(super) const EFBIG: i32 = 27;
    pub(super) const ENOSPC: i32 = 28;
    pub(super) const EROFS: i32 = 30;
    pub(super) const ENAMETOOLONG: i32 = 36;
    pub(super) const ENOTEMPTY: i32 = 39;
    pub(super) const ELOOP: i32 = 40;
    pub(super) const EPROTO: i32 = 71;
    pub(super) const EBADMSG: i32 = 74;
    pub(super) const EMSGSIZE: i32 = 90;
    pub(super) const EOPNOTSUPP: i32 = 95;
    pub(super) const ESTALE: i32 = 116;
    pub(super) const EDQUOT: i32 = 122;
    pub(super) const ETIMEDOUT: i32 = 110;
    pub(super) const ECONNRESET: i32 = 104;
    pub(super) const ECANCELED: i32 = 125;
}

statuses! {
    Ok = 0, OK, "the request succeeded", "go on";
    Invalid = 1, EINVAL, "a field of the request is not valid", "mend the request";
    Protocol = 2, EPROTO, "the peer broke the protocol", "the connection ends; report it";
    Unsupported = 3, EOPNOTSUPP, "this server does not do that", "do without, or update the server";
    Version = 4, EPROTO, "no common protocol version", "update the older side";
    AccessDenied = 5, EACCES, "the principal or the open lacks the right", "ask the operator for the right, or open with it";
    ReadOnly = 6, EROFS, "the volume is read-only for this principal", "ask the operator for write access";
    NotFound = 7, ENOENT, "no such file, volume or open", "check the name";
    Exists = 8, EEXIST, "the name exists already", "choose another name or disposition";
    NotDirectory = 9, ENOTDIR, "a component of the path is not a directory", "check the path";
    IsDirectory = 10, EISDIR, "it is a directory", "name a file, or list the directory";
    NotEmpty = 11, ENOTEMPTY, "the directory is not empty", "empty it first";
    PathEscape = 12, EXDEV, "the path leads out of the volume", "use a path inside the volume";
    NameTooLong = 13, ENAMETOOLONG, "the path or a name in it is too long", "shorten it";
    SymlinkLoop = 14, ELOOP, "too many symbolic links on the path", "mend the links";
    ShareConflict = 15, EBUSY, "another open's share mode denies this access", "wait until it is closed, or ask for less";
    Busy = 16, EBUSY, "a detached open is kept for its owner", "try again after the time given";
    BadKey = 17, ESTALE, "the resume key cannot be verified", "open the file again";
    BadProof = 18, EPERM, "the server's proof is wrong: it is not the server that issued the key", "do not send data; report it";
    NotBound = 19, EBADF, "there is no such binding on this channel", "bind first";
    Fenced = 20, ESTALE, "the binding was fenced", "bind again, or resume";
    Closed = 21, EBADF, "the open is closed", "open the file again";
    BadRange = 22, EINVAL, "offset and length are not a range of a file", "mend the request";
    BadRegion = 23, EINVAL, "the region descriptor is too small for the request", "mend the request";
    TooLong = 24, EMSGSIZE, "the request is longer than the limit", "split it";
    OverCredit = 25, EPROTO, "more requests in flight than credits", "the channel ends; honour the credits";
    BadMac = 26, EBADMSG, "a frame's MAC or sequence is wrong", "the channel ends; bind on a new one";
    Integrity = 27, EBADMSG, "the payload does not match its digest", "repeat the request";
    TooMany = 28, EDQUOT, "a limit of the server or of this principal is reached", "close something, or ask the operator";
    NoSpace = 29, ENOSPC, "the file system is full", "free space";
    FileTooBig = 30, EFBIG, "the file would exceed the file system's limit", "write less";
    Io = 31, EIO, "the storage failed", "see the server's log";
    Unavailable = 32, ECONNRESET, "the other plane is away for the moment", "try again shortly";
    TimedOut = 33, ETIMEDOUT, "the deadline passed", "try again";
    DuplicateCreate = 34, EEXIST, "the create id was used for another open", "choose a new create id";
    SessionGone = 35, ESTALE, "the session has ended", "connect again";
    Internal = 36, EIO, "a fault in the server itself", "see the server's log; report it";
    LockConflict = 37, EAGAIN, "a byte-range lock of another open forbids this", "wait until it is unlocked";
    LockNotGranted = 38, EAGAIN, "a byte-range lock in the way was not given up in time", "wait, or lock another range";
    NotLocked = 39, EINVAL, "that range is not locked by this owner", "unlock exactly what was locked";
    Cancelled = 40, ECANCELED, "the waiting request was cancelled", "go on";
    ForceClosed = 41, ESTALE, "the operator closed the open", "ask the operator, then open the file again";
    Evicted = 42, ESTALE, "the hold time was over and another client wanted the file", "open the file again";
    FileLost = 43, ESTALE, "the file could not be found again after a restart", "open the file again, if it is there";
    Superseded = 44, ESTALE, "a later session of the client took the open over", "go on in that session";
}

impl std::fmt::Display for Status {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} ({self:?})", self.text())
    }
}

impl<C> minicbor::Encode<C> for Status {
    fn encode<W: minicbor::encode::Write>(
        &self,
        e: &mut minicbor::Encoder<W>,
        _: &mut C,
    ) -> Result<(), minicbor::encode::Error<W::Error>> {
        e.u16(self.number())?.ok()
    }
}

impl<'b, C> minicbor::Decode<'b, C> for Status {
    fn decode(d: &mut minicbor::Decoder<'b>, _: &mut C) -> Result<Self, minicbor::decode::Error> {
        Self::from_number(d.u16()?).ok_or_else(|| minicbor::decode::Error::message("unknown status"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_dense_fixed_and_reversible() {
        for (n, status) in Status::ALL.iter().enumerate() {
            assert_eq!(usize::from(status.number()), n);
            assert_eq!(Status::from_number(status.number()), Some(*status));
            assert_eq!(status.errno() == 0, *status == Status::Ok);
        }
        assert_eq!(Status::from_number(9999), None);
        // Golden: these travel, so a change here is a change of the protocol.
        assert_eq!((Status::BadKey.number(), Status::Fenced.number(), Status::BadMac.number()), (17, 20, 26));
    }
}
