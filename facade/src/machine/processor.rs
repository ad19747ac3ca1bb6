//! The processor, and how much of it this process may use.

use std::path::Path;

use fabric_engine::kernels::instruction_set;
use rustix::thread::sched_getaffinity;

use super::{Section, cgroup, read};

pub(super) fn processor(root: &Path) -> Section {
    let mut section = Section::new("processor");
    let info = read(root.join("proc/cpuinfo")).unwrap_or_default();
    section.say_if("model", field(&info, &["model name", "Hardware", "cpu"]));
    let count = info
        .lines()
        .filter(|line| line.starts_with("processor"))
        .count();
    section.say_if("cores online", (count > 0).then(|| count.to_string()));
    section.say("cores allowed", allowed(root));
    section.say_if("NUMA nodes", nodes(root));
    section.say("kernels", instruction_set());
    section
}

/// What std divides among ranks, and whence that number comes.
fn allowed(root: &Path) -> String {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let affinity = sched_getaffinity(None).map_or_else(
        |why| format!("affinity cannot be read: {why}"),
        |set| format!("affinity {}", set.count()),
    );
    let quota = match cgroup::cores(root) {
        Some(quota) => format!("cgroup quota {quota:.2}"),
        None => "no cgroup quota".into(),
    };
    format!("{cores} ({affinity}, {quota})")
}

/// The value of the first of `names` that stands in a file of `name : value` lines.
fn field(text: &str, names: &[&str]) -> Option<String> {
    names.iter().find_map(|name| {
        let mut pairs = text.lines().filter_map(|line| line.split_once(':'));
        let (_, value) = pairs.find(|(key, _)| key.trim() == *name)?;
        Some(value.trim().to_string())
    })
}

fn nodes(root: &Path) -> Option<String> {
    let folder = std::fs::read_dir(root.join("sys/devices/system/node")).ok()?;
    let names = folder.flatten().map(|entry| entry.file_name());
    let is_node = |name: &std::ffi::OsString| {
        let name = name.to_string_lossy();
        let number = name.strip_prefix("node");
        number.is_some_and(|number| number.parse::<u32>().is_ok())
    };
    Some(names.filter(is_node).count().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_model_and_its_cores_are_read_from_what_the_kernel_lists() {
        let room = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(room.path().join("proc")).unwrap();
        for node in ["node0", "node1", "power"] {
            let folder = room.path().join("sys/devices/system/node").join(node);
            std::fs::create_dir_all(folder).unwrap();
        }
        let one = "processor\t: 0\nmodel name\t: A CPU @ 2 GHz\n\n";
        std::fs::write(room.path().join("proc/cpuinfo"), one.repeat(3)).unwrap();
        let section = processor(room.path());
        assert_eq!(section.find("model").unwrap(), ["A CPU @ 2 GHz"]);
        assert_eq!(section.find("cores online").unwrap(), ["3"]);
        assert_eq!(section.find("NUMA nodes").unwrap(), ["2"]);
        assert!(section.find("cores allowed").unwrap()[0].contains("no cgroup quota"));
        assert_eq!(section.find("kernels").unwrap(), [instruction_set()]);
    }
}
