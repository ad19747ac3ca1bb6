//! What a communicator over devices shares with the one over hosts that stands beside it: one order, one record of who is
//! where, one first error.

use std::sync::Arc;

use super::{Host, Shared};
use crate::{
    comm::Call,
    error::{Error, Result},
    wire::{frame::Stamp, ledger::Ledger},
};

impl Host {
    /// The number of the next operation, of either: one order for both.
    pub(in crate::comm) fn next_number(&mut self, call: &Call) -> u64 {
        let number = self.sequence;
        self.sequence += u64::from(call.op.kind().is_some());
        number
    }

    /// Has somebody failed?
    pub(in crate::comm) fn check(&self, stamp: &Stamp) -> Result<()> {
        self.shared.check(stamp)
    }

    /// Keep the first error, and tell everybody.
    pub(in crate::comm) fn fail(&self, error: Error) -> Error {
        self.shared.fail(error)
    }

    /// Who was last seen where.
    pub(in crate::comm) fn ledger(&self) -> &Ledger {
        &self.shared.ledger
    }

    /// A handle that tells failures, for another thread.
    pub(in crate::comm) fn reporter(&self) -> Reporter {
        Reporter(self.shared.clone())
    }
}

/// Tells everybody of a failure.
pub(in crate::comm) struct Reporter(Arc<Shared>);

impl Reporter {
    /// Keep the first error, and tell everybody.
    pub(in crate::comm) fn fail(&self, error: Error) -> Error {
        self.0.fail(error)
    }
}
