//! How a program becomes N ranks: as processes under a supervisor ([`supervise()`]), or as threads of one process
//! ([`threads`]), for tests and notebooks.
//!
//! ```text
//! supervisor --starts, watches, passes signals on--> rank 0, rank 1, ... (this program again)
//!     ^                                                 |
//!     +---- exit status, last words, output ------------+      the supervisor dies => the kernel kills the ranks
//! ```

mod child;
mod ending;
mod inbox;
mod job;
mod output;
mod supervise;
mod terminate;
pub mod threads;
mod words;

pub use child::{die_with_supervisor, inherited_listener, report_failure};
pub use ending::RankFailed;
pub use job::{DEFAULT_PORT, Job, Program, suggested_max_num_threads};
pub use output::Output;
pub use supervise::supervise;
pub use terminate::on_terminate;
pub(crate) use terminate::{before_exit, is_interruption};
pub(crate) use threads::panic_text;
