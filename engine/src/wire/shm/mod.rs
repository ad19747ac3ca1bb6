//! Memory that all ranks of one machine have mapped: arenas, and the flags by which ranks meet. Nothing is copied
//! through it: a collective loads the peers' bytes where they lie and stores into their outputs.
//!
//! ```text
//! a rank's arena, a sealed memfd:
//!   0         control: lines and a bell (flags.rs), written by its owner alone
//!   4 KiB     channels: the same for each peer, for messages between the two
//!   256 KiB   posts       small inputs, one slot a line
//!   320 KiB   stage, in   what a rank with private buffers lends the peers, a window at a time
//!   576 KiB   stage, out  what the peers store for it
//!   832 KiB   heap        slabs (space.rs)
//! ```
//! An arena has no name in any file system: its descriptor is passed to authenticated peers of the same user, and the
//! memory is gone with the last process that has it mapped. It is sealed against shrinking, so that no peer can make an
//! access fail.
//!
//! [Note: whose memory] A *peer's* arena is never lent out as a slab here, so no Rust reference of this process ever
//! lies over it, only spans, element by element. Our *own* arena's bytes belong to exactly one slab each; peers touch
//! them only between the submission that takes the slab and the completion that gives it back. `schedule::check` proves
//! for all ranks at once that between two syncs nobody touches what another writes. What a peer announces is checked
//! against its arena's bounds before use; a peer that breaks the protocol can spoil values, not reach other memory.

mod arena;
mod channel;
mod flags;
mod group;
mod space;
mod sync;
mod wait;

pub(crate) use arena::{Arena, MOST_RANKS, Mapping, POST_BYTES, SENT, STAGE_BYTES, STAGES};
pub(crate) use channel::Letter;
pub(crate) use flags::WORDS;
pub(crate) use group::{Group, Needs, PRIVATE};
