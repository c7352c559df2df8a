//! Access (what an open wants) and share mode (what it lets others have), after MS-SMB2 2.2.13.

use std::fmt;

macro_rules! rights {
    ($(#[$doc:meta])* $name:ident { $($(#[$flag_doc:meta])* $flag:ident = $bit:literal, $letter:literal;)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Default, minicbor::Encode)]
        #[cbor(transparent)]
        pub struct $name(#[n(0)] u8);

        /// By hand, so that an unknown bit is refused and never carried on.
        impl<'b, C> minicbor::Decode<'b, C> for $name {
            fn decode(
                decoder: &mut minicbor::Decoder<'b>,
                _: &mut C,
            ) -> Result<Self, minicbor::decode::Error> {
                let at = decoder.position();
                Self::from_bits(decoder.u8()?).ok_or_else(|| {
                    minicbor::decode::Error::message(concat!("unknown bit in ", stringify!($name))).at(at)
                })
            }
        }

        impl $name {
            $($(#[$flag_doc])* pub const $flag: Self = Self($bit);)*
            /// No right at all.
            pub const NONE: Self = Self(0);
            /// Every right.
            pub const ALL: Self = Self($($bit |)* 0);

            /// The bits as they travel.
            pub const fn bits(self) -> u8 {
                self.0
            }

            /// Reads the bits as they travelled; `None` if an unknown bit is set.
            pub const fn from_bits(bits: u8) -> Option<Self> {
                if bits & !Self::ALL.0 == 0 { Some(Self(bits)) } else { None }
            }

            /// True if every right of `other` is in `self`.
            pub const fn contains(self, other: Self) -> bool {
                self.0 & other.0 == other.0
            }

            /// The rights in both.
            #[must_use]
            pub const fn intersection(self, other: Self) -> Self {
                Self(self.0 & other.0)
            }

            /// The rights in either.
            #[must_use]
            pub const fn union(self, other: Self) -> Self {
                Self(self.0 | other.0)
            }

            /// True if there is no right.
            pub const fn is_empty(self) -> bool {
                self.0 == 0
            }
        }

        impl std::ops::BitOr for $name {
            type Output = Self;
            fn bitor(self, other: Self) -> Self {
                self.union(other)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(concat!(stringify!($name), "("))?;
                $(if self.contains(Self::$flag) { f.write_str($letter)?; })*
                f.write_str(")")
            }
        }
    };
}

rights! {
    /// What an open wants of the file.
    Access {
        /// Read the file's data.
        READ = 1, "r";
        /// Write the file's data, and change its size.
        WRITE = 2, "w";
        /// Delete or rename the file.
        DELETE = 4, "d";
    }
}

rights! {
    /// What an open lets *other* opens of the same file have. A missing right is denied to the others.
    ShareMode {
        /// Others may read.
        READ = 1, "r";
        /// Others may write.
        WRITE = 2, "w";
        /// Others may delete or rename.
        DELETE = 4, "d";
    }
}

impl ShareMode {
    /// True if an open with `access` may stand beside one with this share mode.
    pub const fn admits(self, access: Access) -> bool {
        self.0 & access.bits() == access.bits()
    }
}

/// True if two opens of one file exclude each other: one wants what the other denies (MS-FSA 2.1.5.1.2.2). An
/// open without access (metadata only) never conflicts.
pub const fn conflicts(a: (Access, ShareMode), b: (Access, ShareMode)) -> bool {
    if a.0.is_empty() || b.0.is_empty() {
        return false;
    }
    !a.1.admits(b.0) || !b.1.admits(a.0)
}

/// What to do when the file exists, and when it does not (MS-SMB2 CreateDisposition).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default, minicbor::Encode, minicbor::Decode)]
#[cbor(index_only)]
pub enum Disposition {
    /// Open it; an error if it does not exist.
    #[n(0)]
    #[default]
    Open,
    /// Open it, or create it empty.
    #[n(1)]
    OpenOrCreate,
    /// Create it; an error if it exists.
    #[n(2)]
    CreateNew,
    /// Open it and cut it to nothing, or create it.
    #[n(3)]
    OverwriteOrCreate,
    /// Open it and cut it to nothing; an error if it does not exist.
    #[n(4)]
    Overwrite,
}

impl Disposition {
    /// True if a missing file is created.
    pub const fn creates(self) -> bool {
        matches!(self, Self::OpenOrCreate | Self::CreateNew | Self::OverwriteOrCreate)
    }

    /// True if the content of an existing file is discarded.
    pub const fn truncates(self) -> bool {
        matches!(self, Self::OverwriteOrCreate | Self::Overwrite)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// OPN-01: every pair of access and share mode against the definition, 4,096 rows.
    #[test]
    fn opn_01_conflict_is_the_definition() {
        for bits in 0u16..4096 {
            let part = |shift: u16| u8::try_from((bits >> shift) & 7).unwrap();
            let (a1, s1, a2, s2) = (part(0), part(3), part(6), part(9));
            let wanted = a1 != 0 && a2 != 0 && (a1 & !s2 != 0 || a2 & !s1 != 0);
            let got = conflicts(
                (Access::from_bits(a1).unwrap(), ShareMode::from_bits(s1).unwrap()),
                (Access::from_bits(a2).unwrap(), ShareMode::from_bits(s2).unwrap()),
            );
            assert_eq!(got, wanted, "{a1:03b}/{s1:03b} against {a2:03b}/{s2:03b}");
        }
    }

    #[test]
    fn unknown_bits_are_refused() {
        assert_eq!(Access::from_bits(8), None);
        for bits in 0u8..=255 {
            let bytes = minicbor::to_vec(bits).unwrap();
            assert_eq!(minicbor::decode::<Access>(&bytes).ok(), Access::from_bits(bits));
            assert_eq!(minicbor::decode::<ShareMode>(&bytes).ok(), ShareMode::from_bits(bits));
            if let Some(access) = Access::from_bits(bits) {
                assert_eq!(minicbor::to_vec(access).unwrap(), bytes);
            }
        }
        assert_eq!(format!("{:?}", Access::READ | Access::DELETE), "Access(rd)");
    }
}
