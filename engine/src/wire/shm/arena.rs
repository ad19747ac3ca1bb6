//! Arenas: a rank's own memory that all its peers have mapped, and a peer's, as it is mapped here.
#![allow(unsafe_code)]

use std::{
    io,
    ops::Range,
    os::fd::{AsFd, OwnedFd},
    ptr::NonNull,
    sync::{Arc, Mutex},
};

use fabric_kernels::{Dtype, Span, SpanMut};
use memmap2::{MmapOptions, MmapRaw};
use rustix::{
    fs::{
        FileType, MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, fstat, ftruncate,
        memfd_create,
    },
    process::{Resource, getrlimit},
};

use super::{
    flags::{Control, LINES},
    space::Space,
};
use crate::buffer::Slab;

const PAGE_BYTES: usize = 4 << 10;
const CHANNELS: usize = PAGE_BYTES; // where the channels lie, one a peer
const CHANNELS_BYTES: usize = 252 << 10;

/// Ranks that a group can have here: each has room for so many channels.
pub(crate) const MOST_RANKS: usize = CHANNELS_BYTES / size_of::<Channel>();

/// Bytes that a rank can post with a step.
pub(crate) const POST_BYTES: usize = 16 << 10;

const EXPECTED_BYTES: usize = 2 << 10; // of a post, that are fetched before they are needed: as many lines as a core waits for at once

const POSTS: u64 = (CHANNELS + CHANNELS_BYTES) as u64;

/// Bytes of a stage: about as much as a core's nearest large cache keeps beside other work.
pub(crate) const STAGE_BYTES: usize = 256 << 10;

/// Where the stages of collectives lie in every arena, which take turns.
pub(crate) const STAGES: [u64; 2] = [STAGE, STAGE + STAGE_BYTES as u64];

/// Where the stage of messages lies, which peers may need while others still load from the last collective's.
pub(crate) const SENT: u64 = STAGES[1] + STAGE_BYTES as u64;

const STAGE: u64 = POSTS + (LINES * POST_BYTES) as u64;

const HEAP: usize = SENT as usize + STAGE_BYTES;
const SMALLEST: usize = HEAP + (1 << 20); // an arena of less is of no use

const _: () = assert!(size_of::<Control>() <= PAGE_BYTES);

/// Where in an arena post number `post` of its rank lies.
fn place_of(post: u32) -> usize {
    POSTS as usize + post as usize % LINES * POST_BYTES
}

/// What a rank says to one peer alone: what it sends, and what it has received.
#[repr(C)]
pub(super) struct Channel {
    pub(super) sent: Control<1>,
    pub(super) received: Control<1>,
}

/// A whole arena, mapped into this process.
pub(crate) struct Mapping {
    map: MmapRaw,
}

impl Mapping {
    /// Map a peer's arena, if it is one: a sealed file of a believable size.
    pub(crate) fn of_peer(fd: &OwnedFd) -> Result<Self, String> {
        let stat = fstat(fd).map_err(|e| format!("its arena cannot be examined: {e}"))?;
        let seals = fcntl_get_seals(fd).map_err(|e| format!("its arena has no seals: {e}"))?;
        if !seals.contains(SealFlags::SHRINK | SealFlags::GROW) {
            return Err("its arena is not sealed against changes of its size".into());
        }
        let bytes = usize::try_from(stat.st_size)
            .ok()
            .filter(|bytes| *bytes >= SMALLEST && isize::try_from(*bytes).is_ok());
        let regular = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile;
        let Some(bytes) = bytes.filter(|_| regular) else {
            return Err(format!(
                "its arena is no file of a believable size ({} bytes)",
                stat.st_size
            ));
        };
        map(fd, bytes).map_err(|e| format!("its arena of {bytes} bytes cannot be mapped: {e}"))
    }

    /// How many bytes.
    pub(crate) fn bytes(&self) -> usize {
        self.map.len()
    }

    /// The flags at the arena's start.
    pub(super) fn control(&self) -> &Control {
        // SAFETY: the mapping starts at a page, is at least SMALLEST long, which is more than a `Control`, and sealed
        // against shrinking (`of_peer` and `Arena::new` see to it); all its fields are atomics, for which any bytes
        // are a value and which any process may change at any time. Test: `two_mappings_of_an_arena_share_its_flags`.
        unsafe { &*self.map.as_ptr().cast::<Control>() }
    }

    /// The flags with which its rank and `peer` speak.
    pub(super) fn channel(&self, peer: usize) -> &Channel {
        assert!(peer < MOST_RANKS, "groups are no larger than that");
        let at = CHANNELS + peer * size_of::<Channel>();
        // SAFETY: inside the mapping by the assertion and SMALLEST, aligned as CHANNELS starts a page and a `Channel`'s size
        // is a multiple of its alignment; otherwise as `control`. Test: `two_mappings_of_an_arena_share_its_flags`.
        unsafe { &*self.map.as_ptr().wrapping_add(at).cast::<Channel>() }
    }

    /// Whether `numel` elements of `dtype` may lie `at` bytes from the start: what a peer announces is asked this.
    pub(crate) fn holds(&self, at: u64, dtype: Dtype, numel: usize) -> bool {
        let end = numel
            .checked_mul(dtype.size())
            .and_then(|bytes| usize::try_from(at).ok()?.checked_add(bytes));
        at >= POSTS
            && at & (dtype.size() as u64 - 1) == 0 // sizes are powers of two
            && end.is_some_and(|end| end <= self.bytes())
    }

    /// Elements to load, `at` bytes from the start.
    ///
    /// # Panics
    /// When the arena does not hold them: whoever takes a place from a peer asks [`Mapping::holds`] first.
    pub(crate) fn span(&self, at: u64, dtype: Dtype, numel: usize) -> Span<'_> {
        let start = self.start(at, dtype, numel);
        // SAFETY: inside the mapping and aligned, by `start`; mapped for as long as `self`; initialised, as a memfd is
        // zero at first. Nobody writes it while a kernel runs: [Note: whose memory]; a breach would show in the parity
        // tests of `comm::host`.
        unsafe { Span::from_raw(start, dtype, numel, None) }
    }

    /// Copy `bytes` into post number `post` of this arena's rank, `skip` bytes from the start of it.
    ///
    /// # Panics
    /// When there is no room for so many.
    #[inline]
    pub(crate) fn post(&self, post: u32, skip: usize, bytes: &[u8]) {
        let target = self.posted_at(post, skip, bytes.len());
        // SAFETY: inside the mapping by `posted_at`; `bytes` are a reference's, and none lies over posts. Nobody reads this
        // post before its step is published, and nobody still reads what was here before: `flags`, [Note: lines]. A breach
        // would show in the parity tests of `comm::host`.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), target, bytes.len()) };
    }

    /// Elements that this arena's rank has posted, to load, `skip` bytes from the start of the post.
    ///
    /// # Panics
    /// When a post has not so many, or they are not aligned.
    #[inline]
    pub(crate) fn posted(&self, post: u32, skip: usize, dtype: Dtype, numel: usize) -> Span<'_> {
        let start = self.posted_at(post, skip, numel.saturating_mul(dtype.size()));
        // SAFETY: inside the mapping, by `posted_at`; mapped for as long as `self`; initialised, as a memfd is zero at first.
        // Nobody writes it before this rank has come to the step after: `flags`, [Note: lines]. A breach would show in the
        // parity tests of `comm::host`.
        unsafe { Span::from_raw(start, dtype, numel, None) }
    }

    /// Copy what this arena's rank has posted, `skip` bytes from the start of the post, into `target`.
    ///
    /// # Panics
    /// When a post has not so many.
    #[inline]
    pub(crate) fn take(&self, post: u32, skip: usize, target: &mut [u8]) {
        let start = self.posted_at(post, skip, target.len());
        // SAFETY: `start` as in `posted`; `target` is a reference's, and none lies over posts.
        unsafe { std::ptr::copy_nonoverlapping(start, target.as_mut_ptr(), target.len()) };
    }

    /// These bytes of post number `post` are likely to be written soon: a hint to the processor to fetch the first lines of
    /// them from those who have read them, so that the write need not wait for that.
    ///
    /// # Panics
    /// When a post has not so many.
    #[inline]
    pub(crate) fn expect(&self, post: u32, bytes: Range<usize>) {
        const LINE_BYTES: usize = 64;
        let few = bytes.len().min(EXPECTED_BYTES);
        let start = self.posted_at(post, bytes.start, few);
        for line in (0..few).step_by(4 * LINE_BYTES) {
            let line = start.wrapping_add(line);
            #[cfg(target_arch = "x86_64")]
            // SAFETY: a hint changes no memory, faults on none (a few lines beyond the post among them), and is ignored by
            // processors that do not know it.
            unsafe {
                std::arch::asm!(
                    "prefetchw [{0}]", "prefetchw [{0} + 64]", "prefetchw [{0} + 128]", "prefetchw [{0} + 192]",
                    in(reg) line, options(nostack, preserves_flags)
                )
            };
            #[cfg(not(target_arch = "x86_64"))]
            let _ = line;
        }
    }

    #[inline]
    fn posted_at(&self, post: u32, skip: usize, bytes: usize) -> *mut u8 {
        let fits = skip <= POST_BYTES && bytes <= POST_BYTES - skip;
        assert!(fits, "posts are small");
        self.map.as_mut_ptr().wrapping_add(place_of(post) + skip)
    }

    /// Elements to store, `at` bytes from the start.
    ///
    /// # Panics
    /// As [`Mapping::span`].
    pub(crate) fn span_mut(&self, at: u64, dtype: Dtype, numel: usize) -> SpanMut<'_> {
        let start = self.start(at, dtype, numel);
        // SAFETY: bounds, alignment and lifetime as in `span`. Nobody else touches it while a kernel runs, and this
        // thread makes no other span over it: [Note: whose memory], and the executor goes through scratch memory
        // wherever source and target may be the same; a breach would show in the parity tests of `comm::host`.
        unsafe { SpanMut::from_raw(start, dtype, numel, None) }
    }

    fn start(&self, at: u64, dtype: Dtype, numel: usize) -> *mut u8 {
        assert!(
            self.holds(at, dtype, numel),
            "{numel} x {dtype} at {at} of an arena of {} bytes",
            self.bytes()
        );
        self.map.as_mut_ptr().wrapping_add(at as usize)
    }
}

/// This rank's own arena. Slabs from it keep it mapped.
pub(crate) struct Arena {
    mapping: Mapping,
    fd: OwnedFd,
    space: Mutex<Space>,
}

impl Arena {
    /// An arena of at most `bytes` bytes, or as much as the system lets us reserve, and the descriptor that peers need
    /// to map it. Pages cost memory only once they are touched.
    pub(crate) fn new(bytes: usize) -> io::Result<(Arc<Self>, OwnedFd)> {
        // Beyond this limit a file's size is not only refused: the process gets a signal that ends it.
        let limit = getrlimit(Resource::Fsize).current.unwrap_or(u64::MAX);
        let limit = usize::try_from(limit).unwrap_or(usize::MAX);
        let mut bytes = bytes.max(SMALLEST).min(limit) & !(PAGE_BYTES - 1);
        loop {
            match Self::of_size(bytes) {
                Err(_) if bytes / 2 >= SMALLEST => bytes = (bytes / 2) & !(PAGE_BYTES - 1),
                other => return other,
            }
        }
    }

    fn of_size(bytes: usize) -> io::Result<(Arc<Self>, OwnedFd)> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        // Some systems allow only memory that cannot be executed; kernels before 6.3 do not know the word.
        let fd = memfd_create("fabric-arena", flags | MemfdFlags::NOEXEC_SEAL)
            .or_else(|_| memfd_create("fabric-arena", flags))?;
        if bytes < SMALLEST {
            return Err(io::Error::other(format!(
                "only {bytes} bytes may be reserved"
            )));
        }
        ftruncate(&fd, bytes as u64)?;
        fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        let mapping = map(&fd, bytes)?;
        let space = Mutex::new(Space::new(HEAP, bytes));
        let own = fd.try_clone()?;
        let arena = Self {
            mapping,
            fd: own,
            space,
        };
        Ok((Arc::new(arena), fd))
    }

    /// Bytes of memory that the system has given this arena so far.
    pub(crate) fn resident_bytes(&self) -> u64 {
        const BLOCK_BYTES: u64 = 512; // what stat counts in
        fstat(&self.fd).map_or(0, |stat| stat.st_blocks as u64 * BLOCK_BYTES)
    }

    /// The memory itself.
    pub(crate) fn mapping(&self) -> &Mapping {
        &self.mapping
    }

    /// Where in the arena the `bytes` bytes at this address lie, if they do.
    pub(crate) fn place(&self, address: usize, bytes: usize) -> Option<u64> {
        let at = address.checked_sub(self.mapping.map.as_ptr().addr())?;
        let end = at.checked_add(bytes)?;
        (end <= self.mapping.bytes()).then_some(at as u64)
    }

    /// `numel` zeros of `dtype` in this arena; `None` when it is full.
    pub(crate) fn slab(self: &Arc<Self>, dtype: Dtype, numel: usize) -> Option<Slab> {
        let taken = self.space().take(numel.checked_mul(dtype.size())?)?;
        let lease = Lease {
            arena: self.clone(),
            start: taken.start,
            bytes: taken.bytes,
        };
        let base = self.mapping.map.as_mut_ptr().wrapping_add(taken.start);
        let base = NonNull::new(base).expect("no mapping starts at address zero");
        // SAFETY: the space hands out aligned pieces inside the mapping, each to one lease at a time; the lease keeps
        // the arena mapped; a memfd's bytes are initialised. Tests: `pieces_never_overlap`, and
        // `a_slab_comes_back_zeroed_and_keeps_the_arena`.
        let mut slab = unsafe { Slab::guarded(base, dtype, numel, Box::new(lease)) };
        if taken.used {
            slab.as_bytes_mut().fill(0);
        }
        Some(slab)
    }

    fn space(&self) -> std::sync::MutexGuard<'_, Space> {
        self.space.lock().unwrap_or_else(|held| held.into_inner())
    }
}

/// Gives a slab's bytes back.
struct Lease {
    arena: Arc<Arena>,
    start: usize,
    bytes: usize,
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.arena.space().give(self.start, self.bytes);
    }
}

fn map(fd: &OwnedFd, bytes: usize) -> io::Result<Mapping> {
    let map = MmapOptions::new().len(bytes).map_raw(&fd.as_fd())?;
    Ok(Mapping { map })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::shm::flags::Note;

    #[test]
    fn a_slab_comes_back_zeroed_and_keeps_the_arena() {
        let (arena, _) = Arena::new(SMALLEST).unwrap();
        let mut slab = arena.slab(Dtype::U32, 100).unwrap();
        slab.as_mut_slice::<u32>().fill(7);
        let address = slab.address();
        drop(slab);
        let slab = arena.slab(Dtype::F64, 50).unwrap();
        assert_eq!(slab.address(), address);
        drop(arena);
        assert_eq!(slab.as_slice::<f64>(), [0.0; 50]);
    }

    #[test]
    fn a_full_arena_says_so() {
        let (arena, _) = Arena::new(0).unwrap();
        let all = arena.slab(Dtype::U8, 1 << 20).unwrap();
        assert!(arena.slab(Dtype::U8, 1).is_none());
        drop(all);
        assert!(arena.slab(Dtype::U8, 1).is_some());
    }

    #[test]
    fn two_mappings_of_an_arena_share_its_flags() {
        let (arena, fd) = Arena::new(SMALLEST).unwrap();
        let peer = Mapping::of_peer(&fd).unwrap();
        let note = Note {
            print: 4,
            words: [5; 6],
        };
        arena.mapping().control().publish(1, &note, &[6; 6]);
        assert_eq!(peer.control().arrived(1), Some(note));
        let channel = |arena: &Mapping| arena.channel(MOST_RANKS - 1).received.arrived(3);
        arena
            .mapping()
            .channel(MOST_RANKS - 1)
            .received
            .publish(3, &note, &[6; 6]);
        assert_eq!(channel(&peer), Some(note));
        let slab = arena.slab(Dtype::F32, 4).unwrap();
        let at = arena.place(slab.address(), slab.bytes()).unwrap();
        fabric_kernels::cast(
            Span::of(&[1.0f32, 2.0, 3.0, 4.0]),
            peer.span_mut(at, Dtype::F32, 4),
        )
        .unwrap();
        assert_eq!(slab.as_slice::<f32>(), [1.0, 2.0, 3.0, 4.0]);
    }

    #[test]
    fn places_outside_an_arena_are_refused() {
        let (arena, _) = Arena::new(SMALLEST).unwrap();
        let holds = |at, numel| arena.mapping().holds(at, Dtype::F64, numel);
        let end = arena.mapping().bytes() as u64;
        assert!(holds(POSTS, 1) && holds(end - 8, 1) && holds(end, 0));
        assert!(!holds(0, 1), "the flags are nobody's buffer");
        assert!(!holds(end - 8, 2) && !holds(end + 8, 0) && !holds(STAGE + 4, 1));
        assert!(!holds(u64::MAX - 7, 1) && !holds(STAGE, usize::MAX));
        assert_eq!(arena.place(8, 8), None);
    }

    #[test]
    fn a_file_that_can_shrink_is_no_arena() {
        let fd = memfd_create("other", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
        ftruncate(&fd, SMALLEST as u64).unwrap();
        assert!(Mapping::of_peer(&fd).err().unwrap().contains("not sealed"));
        fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW).unwrap();
        assert!(Mapping::of_peer(&fd).is_ok());
        let small = memfd_create("small", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
        fcntl_add_seals(&small, SealFlags::SHRINK | SealFlags::GROW).unwrap();
        assert!(
            Mapping::of_peer(&small)
                .err()
                .unwrap()
                .contains("believable")
        );
    }
}
