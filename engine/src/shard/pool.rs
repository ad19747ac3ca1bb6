//! Memory that is needed for a moment: a bounded number of equal blocks, each cut to the size of what lies in it. The
//! number needed follows from the plan; when more are wanted at once, the pool grows, and remembers its high-water mark.

use fabric_kernels::Dtype;

use super::SharedComm;
use crate::{
    buffer::{SLAB_ALIGN, Slab},
    error::Result,
};

/// Blocks of one size, lent and given back.
pub struct Pool {
    comm: SharedComm,
    block_bytes: usize,
    free: Vec<Slab>,
    blocks: usize,
}

/// What is left of a block while its first part is in use.
pub struct Rest(Slab);

impl Pool {
    /// A pool of memory that `comm` reaches without a copy; blocks hold `block_bytes`.
    ///
    /// # Errors
    /// When there is no memory for the first `blocks`.
    pub fn new(comm: SharedComm, block_bytes: usize, blocks: usize) -> Result<Self> {
        let mut pool = Self {
            comm,
            block_bytes: block_bytes.next_multiple_of(SLAB_ALIGN),
            free: Vec::new(),
            blocks: 0,
        };
        if block_bytes > 0 {
            for _ in 0..blocks {
                let block = pool.more()?;
                pool.free.push(block);
            }
        }
        Ok(pool)
    }

    /// Whether a block is free.
    pub fn has_free(&self) -> bool {
        !self.free.is_empty()
    }

    /// How many blocks there are.
    pub fn blocks(&self) -> usize {
        self.blocks
    }

    /// `numel` elements of `dtype`, with undefined contents.
    ///
    /// # Errors
    /// When all blocks are lent, and there is no memory for one more.
    ///
    /// # Panics
    /// When they do not fit into a block.
    pub fn take(&mut self, dtype: Dtype, numel: usize) -> Result<(Slab, Rest)> {
        let bytes = numel * dtype.size();
        assert!(
            bytes <= self.block_bytes,
            "{bytes} bytes in a block of {}",
            self.block_bytes
        );
        let block = match self.free.pop() {
            Some(block) => block,
            None => self.more()?,
        };
        let (used, rest) = block.split_at(bytes);
        Ok((used.recast(dtype), Rest(rest)))
    }

    /// Take a block back.
    pub fn give(&mut self, used: Slab, rest: Rest) {
        // Two parts that do not fit together are not of one block: they are freed, and the next take makes a new one.
        match Slab::join(used.recast(Dtype::U8), rest.0) {
            Ok(block) => self.free.push(block),
            Err(_) => self.blocks -= 1,
        }
    }

    fn more(&mut self) -> Result<Slab> {
        let block = self.comm.lock().alloc(Dtype::U8, self.block_bytes)?;
        self.blocks += 1;
        self.free.reserve(self.blocks);
        Ok(block)
    }
}
