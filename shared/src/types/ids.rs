//! Identifiers. Those a peer could profit from guessing are 128-bit random; those that only name a place in
//! one connection are small.

use std::fmt;

macro_rules! id128 {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(pub [u8; 16]);

        impl $name {
            /// The id of which every byte is zero: never issued, used where a frame names none.
            pub const NONE: Self = Self([0; 16]);

            /// Makes an id from 16 bytes of the caller's randomness.
            pub const fn from_random(bytes: [u8; 16]) -> Self {
                Self(bytes)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self)
            }
        }

        impl<C> minicbor::Encode<C> for $name {
            fn encode<W: minicbor::encode::Write>(
                &self,
                e: &mut minicbor::Encoder<W>,
                _: &mut C,
            ) -> Result<(), minicbor::encode::Error<W::Error>> {
                e.bytes(&self.0)?.ok()
            }
        }

        impl<'b, C> minicbor::Decode<'b, C> for $name {
            fn decode(d: &mut minicbor::Decoder<'b>, _: &mut C) -> Result<Self, minicbor::decode::Error> {
                let bytes = d.bytes()?;
                bytes.try_into().map(Self).map_err(|_| minicbor::decode::Error::message("an id has 16 bytes"))
            }
        }
    };
}

id128!(
    /// The persistent id of an open: it survives crash, failover and move.
    OpenId
);
id128!(
    /// One handle's volatile id: a client's reference to an open on one channel.
    HandleId
);
id128!(
    /// One session: an authenticated control connection's context.
    SessionId
);
id128!(
    /// The server or cluster that issued a resume key.
    ClusterId
);
id128!(
    /// A volume, stable over renames of the volume.
    VolumeId
);
id128!(
    /// Chosen by the client for each open request, so that a replay returns the same open (design rule 6).
    CreateId
);

/// A binding's number in frames of one channel, given by dataplane with the bind reply. Never 0: a frame with
/// binding 0 belongs to the channel itself.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct BindingId(pub u32);

impl BindingId {
    /// The channel itself: hello, bind and fatal errors.
    pub const CHANNEL: Self = Self(0);
}

/// The client's number for the process that opened the file; part of a lock owner.
#[derive(
    Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default, minicbor::Encode, minicbor::Decode,
)]
#[cbor(transparent)]
pub struct ProcessId(#[n(0)] pub u64);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_print_as_hex_and_survive_the_wire() {
        let id = OpenId::from_random([0xab; 16]);
        assert_eq!(id.to_string(), "ab".repeat(16));
        let bytes = minicbor::to_vec(id).unwrap();
        assert_eq!(minicbor::decode::<OpenId>(&bytes).unwrap(), id);
        assert!(minicbor::decode::<OpenId>(&[0x41, 0x00]).is_err(), "a short id is refused");
    }
}
