//! Memory: how much there is, how much this process may take, and of which pages it is made.

use std::path::Path;

use fabric_engine::shard::plan::bytes_text;
use rustix::fs::statvfs;

use super::{Section, cgroup, read};

pub(super) fn memory(root: &Path) -> Section {
    let mut section = Section::new("memory");
    let info = read(root.join("proc/meminfo")).unwrap_or_default();
    let number = |name: &str| {
        let line = info.lines().find_map(|line| line.strip_prefix(name))?;
        let number = line.trim_start_matches(':').split_whitespace().next();
        number?.parse::<u64>().ok()
    };
    let kib = |name: &str| number(name).map(|kib| bytes_text(kib as f64 * 1024.0));
    section.say_if("total", kib("MemTotal"));
    section.say_if("available", kib("MemAvailable"));
    section.say_if("swap", kib("SwapTotal"));
    let limit = cgroup::memory(root);
    let limit = limit.map_or("none".into(), |bytes| bytes_text(bytes as f64));
    section.say("cgroup limit", limit);
    section.say_if("/dev/shm", disk(&root.join("dev/shm")));
    if let (Some(count), Some(size)) = (number("HugePages_Total"), kib("Hugepagesize")) {
        section.say("hugepages", format!("{count} reserved, of {size}"));
    }
    let huge = root.join("sys/kernel/mm/transparent_hugepage");
    section.say_if("transparent hugepages", choice(read(huge.join("enabled"))));
    section.say_if("of shared memory", choice(read(huge.join("shmem_enabled"))));
    section.say_if(
        "overcommit",
        read(root.join("proc/sys/vm/overcommit_memory")),
    );
    section
}

fn disk(path: &Path) -> Option<String> {
    let disk = statvfs(path).ok()?;
    let text = |blocks: u64| bytes_text(blocks as f64 * disk.f_frsize as f64);
    Some(format!(
        "{}, {} free",
        text(disk.f_blocks),
        text(disk.f_bavail)
    ))
}

/// "always [madvise] never" is madvise.
fn choice(text: Option<String>) -> Option<String> {
    let text = text?;
    let chosen = text.split_once('[')?.1.split_once(']')?.0;
    Some(chosen.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_pages_are_read_from_what_the_kernel_lists() {
        let room = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            let path = room.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        write(
            "proc/meminfo",
            "MemTotal:        2097152 kB\nMemAvailable:    1048576 kB\nHugePages_Total:       4\nHugepagesize:       2048 kB\n",
        );
        write(
            "sys/kernel/mm/transparent_hugepage/enabled",
            "always [madvise] never\n",
        );
        write("proc/self/cgroup", "0::/\n");
        write("sys/fs/cgroup/memory.max", "1073741824\n");
        let section = memory(room.path());
        let says = |fact: &str| section.find(fact).unwrap()[0].clone();
        assert_eq!(says("total"), bytes_text(f64::from(1u32 << 31)));
        assert_eq!(says("cgroup limit"), bytes_text(f64::from(1u32 << 30)));
        assert_eq!(
            says("hugepages"),
            format!("4 reserved, of {}", bytes_text(f64::from(2u32 << 20)))
        );
        assert_eq!(says("transparent hugepages"), "madvise");
        assert!(section.find("/dev/shm").is_none());
    }
}
