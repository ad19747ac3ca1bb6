//! What kernels promise, checked against the oracle and against arithmetic that is neither's.
