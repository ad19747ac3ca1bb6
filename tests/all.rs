//! One test binary: the rooms' tests against each other.

mod ddp;
mod exhaustive;
mod parity;
mod process;
mod ranks;
mod sim;
mod strangers;
mod tidy;
