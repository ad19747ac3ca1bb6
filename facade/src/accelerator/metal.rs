//! Apple's GPUs. Memory is unified there: what candle's Metal storage holds is host memory to everybody else, so that
//! buffers need nothing of their own. Compiled for Apple Silicon only, and not tested there.

use super::Accelerator;

/// "metal", or as torch and Lightning have it "mps".
pub struct Metal;

impl Accelerator for Metal {
    fn name(&self) -> &str {
        "metal"
    }

    fn aliases(&self) -> &[&str] {
        &["mps"]
    }

    #[cfg(all(target_os = "macos", target_arch = "aarch64"))]
    fn devices(&self) -> Result<Vec<String>, String> {
        Ok(vec!["Apple GPU".into()])
    }

    #[cfg(not(all(target_os = "macos", target_arch = "aarch64")))]
    fn devices(&self) -> Result<Vec<String>, String> {
        Err(format!(
            "Metal is there on Apple Silicon, and this program was compiled for {} on {}",
            std::env::consts::OS,
            std::env::consts::ARCH
        ))
    }
}
