//! Who holds a block's value: the map that makes one reduction into halving, tree or doubling.
//!
//! Six ranks, six pieces, [`Owners::Strided`]; each column is a rank, with the pieces it holds at each level:
//!
//! ```text
//!  rank        0        1        2        3        4        5
//!  level 0   012345   012345   012345   012345   012345   012345
//!  level 1   0 2 4     1 3 5   0 2 4     1 3 5   0 2 4     1 3 5
//!  level 2   0   4     1   5     2        3      0 2 4     1 3 5
//!  level 3   0        1          2        3          4         5
//! ```
//!
//! For powers of two this is recursive halving with the pairs r, r^1 first (Thakur, Rabenseifner and Gropp 2005).
//! For other worlds those authors fold the extra ranks into neighbours first; here the owner map alone answers, at the
//! price that a new owner may have held neither half.

use super::tree::Block;
use super::{Algorithm, Rank};

/// Who holds a block's value of a piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Owners {
    /// The block's first rank: a binomial tree.
    First,
    /// Rank `lo + piece % len`: halving.
    Strided,
    /// Every member: doubling.
    Every,
}

impl Owners {
    /// The map that makes `algorithm`.
    pub(super) fn of(algorithm: Algorithm) -> Owners {
        match algorithm {
            Algorithm::Tree => Owners::First,
            Algorithm::Halving => Owners::Strided,
            Algorithm::Doubling => Owners::Every,
            Algorithm::Direct | Algorithm::Ring | Algorithm::Post | Algorithm::Load => {
                unreachable!("{algorithm} does not climb the tree level by level")
            }
        }
    }

    /// The one owner of a piece; for `Every`, the first.
    pub(super) fn owner(self, block: Block, piece: usize) -> Rank {
        match self {
            Owners::First | Owners::Every => block.lo,
            Owners::Strided => block.lo + piece % block.len,
        }
    }

    /// Whether `rank`, a member of `block`, holds its value of `piece`. A block of one holds all it has.
    pub(super) fn holds(self, block: Block, piece: usize, rank: Rank) -> bool {
        self == Owners::Every || self.owner(block, piece) == rank
    }

    /// Which member of `half` gives its value of `piece` to `to`; `other` is the half beside it.
    pub(super) fn source(self, half: Block, other: Block, piece: usize, to: Rank) -> Rank {
        match self {
            Owners::First | Owners::Strided => self.owner(half, piece),
            Owners::Every if half.ranks().contains(&to) => to,
            // The right half may be the smaller one: its members then serve several of the left.
            Owners::Every => half.lo + (to - other.lo) % half.len,
        }
    }

    /// To whom `rank`, who holds `piece` for `mine`, gives it when `block` is folded from `mine` and `other`.
    pub(super) fn targets(
        self,
        block: Block,
        mine: Block,
        other: Block,
        piece: usize,
        rank: Rank,
    ) -> Vec<Rank> {
        match self {
            Owners::First | Owners::Strided => {
                let owner = self.owner(block, piece);
                if owner == rank {
                    Vec::new()
                } else {
                    vec![owner]
                }
            }
            Owners::Every => other
                .ranks()
                .filter(|&to| self.source(mine, other, piece, to) == rank)
                .collect(),
        }
    }
}
