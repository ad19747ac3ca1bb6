//! What goes in front of every payload: a header that says which operation the bytes belong to. Ranks that disagree
//! see each other's [`Stamp`] and get [`crate::Error::Diverged`], not garbage and not a hang.

use fabric_kernels::Dtype;

/// Bytes of a header.
pub const HEADER_BYTES: usize = 48;

const MAGIC: u32 = u32::from_le_bytes(*b"FBR1");

/// The operations, as they are named on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
#[allow(missing_docs)] // the names are the field's own
pub enum OpCode {
    AllReduce = 1,
    ReduceScatter = 2,
    AllGather = 3,
    Broadcast = 4,
    Barrier = 5,
    Reduce = 6,
    Gather = 7,
    Scatter = 8,
    AllToAll = 9,
    SendRecv = 10,
}

impl OpCode {
    const ALL: [Self; 10] = [
        Self::AllReduce,
        Self::ReduceScatter,
        Self::AllGather,
        Self::Broadcast,
        Self::Barrier,
        Self::Reduce,
        Self::Gather,
        Self::Scatter,
        Self::AllToAll,
        Self::SendRecv,
    ];

    /// "all_reduce", ...
    pub fn name(self) -> &'static str {
        match self {
            Self::AllReduce => "all_reduce",
            Self::ReduceScatter => "reduce_scatter",
            Self::AllGather => "all_gather",
            Self::Broadcast => "broadcast",
            Self::Barrier => "barrier",
            Self::Reduce => "reduce",
            Self::Gather => "gather",
            Self::Scatter => "scatter",
            Self::AllToAll => "all_to_all",
            Self::SendRecv => "send_recv",
        }
    }
}

/// The reductions, as they are named on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
#[allow(missing_docs)] // the names are the field's own
pub enum ReduceCode {
    None = 0,
    Sum = 1,
    Avg = 2,
    Prod = 3,
    Min = 4,
    Max = 5,
    PreMulSum = 6,
    BitAnd = 7,
    BitOr = 8,
    BitXor = 9,
}

impl ReduceCode {
    const ALL: [Self; 10] = [
        Self::None,
        Self::Sum,
        Self::Avg,
        Self::Prod,
        Self::Min,
        Self::Max,
        Self::PreMulSum,
        Self::BitAnd,
        Self::BitOr,
        Self::BitXor,
    ];

    /// "sum", "avg", ...
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Sum => "sum",
            Self::Avg => "avg",
            Self::Prod => "prod",
            Self::Min => "min",
            Self::Max => "max",
            Self::PreMulSum => "premul_sum",
            Self::BitAnd => "band",
            Self::BitOr => "bor",
            Self::BitXor => "bxor",
        }
    }
}

/// What an operation is for, in eight bytes, so that a message can say "bucket 3" and not "1.2 MB of f32".
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Label {
    /// Nothing in particular: a call of the user's.
    #[default]
    User,
    /// Bucket `k` of a model's gradients.
    Bucket(u32),
    /// The control word at the end of a backward.
    Control(u32),
    /// Parameters `k` in plan order, on their way from rank 0.
    Params(u32),
    /// A piece of the facade's own: an object, a checkpoint's barrier, ...
    Facade(u32),
}

impl Label {
    fn code(self) -> u64 {
        let (kind, index) = match self {
            Self::User => (0, 0),
            Self::Bucket(index) => (1, index),
            Self::Control(index) => (2, index),
            Self::Params(index) => (3, index),
            Self::Facade(index) => (4, index),
        };
        (kind << 32) | u64::from(index)
    }

    fn from_code(code: u64) -> Self {
        let index = code as u32;
        match code >> 32 & 0xff {
            1 => Self::Bucket(index),
            2 => Self::Control(index),
            3 => Self::Params(index),
            4 => Self::Facade(index),
            _ => Self::User,
        }
    }
}

impl std::fmt::Display for Label {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::User => Ok(()),
            Self::Bucket(index) => write!(f, "gradient bucket {index}, "),
            Self::Control(_) => write!(f, "control word, "),
            Self::Params(index) => write!(f, "parameter group {index}, "),
            Self::Facade(_) => write!(f, "object, "),
        }
    }
}

/// One operation, as all ranks must agree on it: the fingerprint in every frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Stamp {
    /// The how-manieth operation of the communicator.
    pub sequence: u64,
    /// What is done.
    pub op: OpCode,
    /// With which reduction.
    pub reduce: ReduceCode,
    /// On elements of which type.
    pub dtype: Dtype,
    /// From which root, where there is one.
    pub root: u32,
    /// Elements of the full vector.
    pub numel: u64,
    /// What for.
    pub label: Label,
    /// A fingerprint of uneven slices, in 24 bits; 0 where all are alike.
    pub cut: u32,
}

impl std::fmt::Display for Stamp {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.op != OpCode::SendRecv {
            write!(f, "#{} ", self.sequence)?; // only what all ranks do is numbered
        }
        f.write_str(self.op.name())?;
        if self.op == OpCode::Barrier {
            return Ok(());
        }
        write!(f, "({}", self.label)?;
        if self.reduce != ReduceCode::None {
            write!(f, "{}, ", self.reduce.name())?;
        }
        match self.op {
            OpCode::Broadcast | OpCode::Scatter => write!(f, "from rank {}, ", self.root)?,
            OpCode::Reduce | OpCode::Gather => write!(f, "to rank {}, ", self.root)?,
            OpCode::SendRecv => return write!(f, "{})", self.dtype),
            _ => {}
        }
        if self.cut != 0 {
            write!(f, "slices {:06x}, ", self.cut)?;
        }
        write!(f, "{} x {})", self.numel, self.dtype)
    }
}

/// A header: the stamp, the round of the schedule, and how many bytes follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// The operation.
    pub stamp: Stamp,
    /// Which round of the operation's schedule.
    pub round: u32,
    /// Bytes that follow.
    pub bytes: u64,
}

impl Header {
    /// Write the header's bytes.
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut out = [0; HEADER_BYTES];
        for (bytes, word) in out.as_chunks_mut::<8>().0.iter_mut().zip(self.to_words()) {
            *bytes = word.to_le_bytes();
        }
        out
    }

    /// The header's bytes as numbers, for memory that is written a word at a time.
    #[inline]
    pub(crate) fn to_words(self) -> [u64; HEADER_BYTES / 8] {
        let Stamp {
            sequence,
            op,
            reduce,
            dtype,
            root,
            numel,
            label,
            cut,
        } = self.stamp;
        let codes = op as u64 | (reduce as u64) << 8 | u64::from(dtype.code()) << 16;
        [
            u64::from(MAGIC) | u64::from(self.round) << 32,
            sequence,
            codes | u64::from(root) << 32,
            numel,
            label.code() | u64::from(cut) << 40,
            self.bytes,
        ]
    }

    /// Read what [`Header::to_words`] gives.
    pub(crate) fn from_words(words: &[u64; HEADER_BYTES / 8]) -> Option<Self> {
        let mut bytes = [0; HEADER_BYTES];
        for (bytes, word) in bytes.as_chunks_mut::<8>().0.iter_mut().zip(words) {
            *bytes = word.to_le_bytes();
        }
        Self::decode(&bytes)
    }

    /// Read a header; `None` when the bytes are none of ours.
    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Option<Self> {
        let u32_at =
            |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
        let u64_at =
            |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
        if u32_at(0) != MAGIC {
            return None;
        }
        let stamp = Stamp {
            sequence: u64_at(8),
            op: OpCode::ALL.into_iter().find(|op| *op as u8 == bytes[16])?,
            reduce: ReduceCode::ALL
                .into_iter()
                .find(|op| *op as u8 == bytes[17])?,
            dtype: Dtype::from_code(bytes[18])?,
            root: u32_at(20),
            numel: u64_at(24),
            label: Label::from_code(u64_at(32)),
            cut: (u64_at(32) >> 40) as u32,
        };
        Some(Self {
            stamp,
            round: u32_at(4),
            bytes: u64_at(40),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn stamp() -> Stamp {
        Stamp {
            sequence: 42,
            op: OpCode::AllReduce,
            reduce: ReduceCode::Avg,
            dtype: Dtype::BF16,
            root: 0,
            numel: 1000,
            label: Label::Bucket(3),
            cut: 0,
        }
    }

    #[test]
    fn a_header_survives_the_wire() {
        let header = Header {
            stamp: stamp(),
            round: 7,
            bytes: 2000,
        };
        assert_eq!(Header::decode(&header.encode()), Some(header));
        assert_eq!(
            header.stamp.to_string(),
            "#42 all_reduce(gradient bucket 3, avg, 1000 x bf16)"
        );
    }

    proptest! {
        #[test]
        fn any_bytes_decode_to_nothing_or_to_themselves(mut bytes in prop::array::uniform32(any::<u8>()), ours: bool) {
            if ours {
                bytes[0..4].copy_from_slice(b"FBR1");
            }
            let mut whole = [0; HEADER_BYTES];
            whole[..32].copy_from_slice(&bytes);
            if let Some(header) = Header::decode(&whole) {
                prop_assert_eq!(Header::decode(&header.encode()), Some(header));
            }
        }
    }
}
