//! One device: what a rank computes on.

/// A rank's device: `cpu`, or a numbered one, `cuda:1`.
///
/// ```
/// use fabric::{Fabric, accelerator::Device};
///
/// let fabric = Fabric::builder().accelerator("cpu").build()?;
/// assert_eq!(fabric.device().to_string(), "cpu");
/// assert_eq!(Device { accelerator: "cuda".into(), index: Some(1) }.to_string(), "cuda:1");
/// # Ok::<(), fabric::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Device {
    /// The accelerator's name.
    pub accelerator: String,
    /// Its number among this machine's, where ranks have devices of their own; ranks on a CPU share it.
    pub index: Option<usize>,
}

impl std::fmt::Display for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.index {
            Some(index) => write!(f, "{}:{index}", self.accelerator),
            None => f.write_str(&self.accelerator),
        }
    }
}
