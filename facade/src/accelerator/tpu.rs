//! Google's TPUs: known by name, and found; what it would take to run on one is said.

use std::{fs, path::Path};

use super::Accelerator;

/// "tpu".
pub struct Tpu;

impl Accelerator for Tpu {
    fn name(&self) -> &str {
        "tpu"
    }

    fn devices(&self) -> Result<Vec<String>, String> {
        find(Path::new("/dev"))
    }

    fn backend(&self) -> Result<(), String> {
        Err(
            "this build cannot compute on them: that needs a tensor library over PJRT (libtpu.so), \
             and an adapter for its buffers"
                .into(),
        )
    }
}

/// The chips whose device files are in `folder`.
fn find(folder: &Path) -> Result<Vec<String>, String> {
    let is_chip = |name: &str| {
        let number = name.strip_prefix("accel").filter(|rest| !rest.is_empty());
        number.is_some_and(|rest| rest.bytes().all(|byte| byte.is_ascii_digit()))
    };
    let files = fs::read_dir(folder).into_iter().flatten().flatten();
    let names = files.map(|file| file.file_name().to_string_lossy().into_owned());
    let mut chips: Vec<_> = names.filter(|name| is_chip(name)).collect();
    chips.sort();
    match chips.len() {
        0 => Err(format!("no TPU was found (no {}/accel0)", folder.display())),
        _ => Ok(chips
            .iter()
            .map(|chip| format!("TPU chip {chip}"))
            .collect()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chips_are_device_files() {
        let folder = tempfile::tempdir().unwrap();
        assert!(find(folder.path()).unwrap_err().contains("no TPU"));
        for name in ["accel", "accel1", "accel0", "accelerometer"] {
            fs::write(folder.path().join(name), "").unwrap();
        }
        let chips = ["TPU chip accel0", "TPU chip accel1"];
        assert_eq!(find(folder.path()).unwrap(), chips);
    }
}
