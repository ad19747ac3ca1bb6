//! One test binary: the rooms' tests against each other.

mod exhaustive;
mod parity;
mod ranks;
mod sim;
mod strangers;
mod tidy;
