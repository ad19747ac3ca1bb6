//! Why a kernel refused: nothing has been written when one of these comes back.

use crate::device::Device;
use crate::dtype::{Dtype, Memory};

/// What was wrong with a call. Kernels check everything before they touch the first element.
#[derive(thiserror::Error, Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum KernelError {
    /// Two spans of one call differ in length.
    #[error(
        "{op}: the target has {into} elements and the source {from}; \
         kernels pair element i with element i, so slice both to one length"
    )]
    Length {
        /// The verb that was called.
        op: &'static str,
        /// Elements in the span that is written.
        into: usize,
        /// Elements in the other span.
        from: usize,
    },
    /// No conversion is defined between these two.
    #[error(
        "no kernel takes {from} into {into}: floats go into floats, every other dtype only into itself; \
         convert in the tensor library first"
    )]
    Cast {
        /// Dtype of the source.
        from: Dtype,
        /// Dtype of the target.
        into: Dtype,
    },
    /// This verb has no meaning for this dtype.
    #[error(
        "{op} is not defined for {dtype}; cast to a dtype that has it, or choose another operation"
    )]
    Unsupported {
        /// The verb that was called.
        op: &'static str,
        /// The dtype it met.
        dtype: Dtype,
    },
    /// The elements are not where this kernel can reach them.
    #[error(
        "{op}: the elements lie in {memory} memory and this kernel runs on the host; copy them to the host first"
    )]
    Device {
        /// The verb that was called.
        op: &'static str,
        /// Where the elements lie.
        memory: Memory,
    },
    /// A number that the target dtype cannot hold exactly, where exactness is asked for.
    #[error(
        "{op}: {value} is not a whole number that {dtype} can hold; pass one, or use a floating-point dtype"
    )]
    Value {
        /// The verb that was called.
        op: &'static str,
        /// The dtype that should hold it.
        dtype: Dtype,
        /// The number.
        value: f64,
    },
    /// Spans of several dtypes, where all must have one.
    #[error(
        "{op}: one span has {first} elements and another {other}; all spans of one {op} have one dtype"
    )]
    Mixed {
        /// The verb that was called.
        op: &'static str,
        /// Dtype of the first source.
        first: Dtype,
        /// The dtype that differs.
        other: Dtype,
    },
    /// Nothing to fold.
    #[error("{op}: there are no sources; pass at least one span")]
    NoSource {
        /// The verb that was called.
        op: &'static str,
    },
    /// More or fewer factors than sources.
    #[error("{op}: {factors} factors for {sources} sources; pass one for each source, or none")]
    Factors {
        /// The verb that was called.
        op: &'static str,
        /// How many sources were passed.
        sources: usize,
        /// How many factors were passed.
        factors: usize,
    },
    /// Division by nothing.
    #[error("divide: the divisor is 0; divide by the number of contributions, which is at least 1")]
    DivideByZero,
    /// A bound that is no bound.
    #[error("clamp: the limit is {limit}; it must be zero or positive, and a number")]
    Limit {
        /// The limit that was passed.
        limit: f64,
    },
    /// Optimizer state in a dtype other than the one its parameter asks for.
    #[error(
        "{op}: state for {param} parameters is kept in {wanted}, not in {state}; allocate the state as {wanted}"
    )]
    State {
        /// The verb that was called.
        op: &'static str,
        /// Dtype of the parameter.
        param: Dtype,
        /// Dtype of the state as passed.
        state: Dtype,
        /// Dtype the state must have.
        wanted: Dtype,
    },
    /// More or fewer states than the rule has.
    #[error(
        "{op}: {passed} state buffers were passed and this step needs {wanted:?}; \
         pass these, in this order, each as long as the parameter"
    )]
    States {
        /// The verb that was called.
        op: &'static str,
        /// Names of the states that the rule has.
        wanted: &'static [&'static str],
        /// How many were passed.
        passed: usize,
    },
    /// Spans of one call lie in different memories.
    #[error(
        "{op}: one span lies in {memory} memory and another in {other}; bring them to one place first"
    )]
    Apart {
        /// The verb that was called.
        op: &'static str,
        /// Where the first lies.
        memory: Memory,
        /// Where the other lies.
        other: Memory,
    },
    /// The driver of a device refused.
    #[error("{memory}: {doing}: {what}")]
    Driver {
        /// The device.
        memory: Memory,
        /// What was asked of it.
        doing: String,
        /// Its answer: name, code and words, and what to try.
        what: String,
    },
    /// Hyperparameters that contradict each other or the spans.
    #[error("{op}: {reason}")]
    Step {
        /// The verb that was called.
        op: &'static str,
        /// What is wrong and what to do.
        reason: &'static str,
    },
}

/// Refuses a pair of spans of different lengths.
pub(crate) fn same_length(op: &'static str, into: usize, from: usize) -> Result<(), KernelError> {
    if into == from {
        Ok(())
    } else {
        Err(KernelError::Length { op, into, from })
    }
}

/// Refuses memories that are not all one.
pub(crate) fn together<const N: usize>(
    op: &'static str,
    memories: [Memory; N],
) -> Result<(), KernelError> {
    let memory = memories[0];
    match memories.into_iter().find(|other| *other != memory) {
        None => Ok(()),
        Some(other) => Err(KernelError::Apart { op, memory, other }),
    }
}

/// Refuses the first span that does not lie on the host.
pub(crate) fn on_host<const N: usize>(
    op: &'static str,
    devices: [Option<&dyn Device>; N],
) -> Result<(), KernelError> {
    match devices.into_iter().flatten().next() {
        None => Ok(()),
        Some(device) => Err(KernelError::Device {
            op,
            memory: device.memory(),
        }),
    }
}
