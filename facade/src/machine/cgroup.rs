//! What the control group of this process, in either version, leaves it: the tightest limit on the way up to the root.

use std::path::{Path, PathBuf};

use super::read;

/// Cores that may be used at a time, on average.
pub(super) fn cores(root: &Path) -> Option<f64> {
    let v2 = |folder: &Path| {
        let text = read(folder.join("cpu.max"))?;
        let (quota, period) = text.split_once(' ')?;
        Some(quota.parse::<f64>().ok()? / period.parse::<f64>().ok()?)
    };
    let v1 = |folder: &Path| {
        let quota: f64 = read(folder.join("cpu.cfs_quota_us"))?.parse().ok()?;
        let period: f64 = read(folder.join("cpu.cfs_period_us"))?.parse().ok()?;
        (quota > 0.0).then(|| quota / period)
    };
    let limits = folders(root, "")
        .iter()
        .filter_map(|folder| v2(folder))
        .collect::<Vec<_>>();
    let old = folders(root, "cpu")
        .iter()
        .filter_map(|folder| v1(folder))
        .collect::<Vec<_>>();
    limits.into_iter().chain(old).min_by(f64::total_cmp)
}

/// Bytes of memory.
pub(super) fn memory(root: &Path) -> Option<u64> {
    const NONE: u64 = 1 << 60; // version 1 has no word for no limit
    let limit = |folder: PathBuf, file: &str| read(folder.join(file))?.parse::<u64>().ok();
    let new = folders(root, "").into_iter();
    let old = folders(root, "memory").into_iter();
    let new = new.filter_map(|folder| limit(folder, "memory.max"));
    let old = old.filter_map(|folder| limit(folder, "memory.limit_in_bytes"));
    new.chain(old).filter(|bytes| *bytes < NONE).min()
}

/// The folders of this process's group and of those above it. `controller` is empty for version 2.
fn folders(root: &Path, controller: &str) -> Vec<PathBuf> {
    let Some(text) = read(root.join("proc/self/cgroup")) else {
        return Vec::new();
    };
    let own = text.lines().find_map(|line| {
        let mut fields = line.splitn(3, ':').skip(1);
        let (controllers, path) = (fields.next()?, fields.next()?);
        controllers
            .split(',')
            .any(|known| known == controller)
            .then_some(path)
    });
    let Some(own) = own else { return Vec::new() };
    let top = root.join("sys/fs/cgroup").join(controller);
    // In a container the group's path is often the host's, and the group stands at the top.
    let own = Path::new(own.trim_start_matches('/'));
    own.ancestors().map(|path| top.join(path)).collect()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn machine(cgroup: &str, files: &[(&str, &str)]) -> tempfile::TempDir {
        let room = tempfile::tempdir().unwrap();
        let files = files.iter().copied().chain([("proc/self/cgroup", cgroup)]);
        for (name, text) in files {
            let path = room.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        room
    }

    #[test]
    fn the_tightest_limit_on_the_way_up_counts() {
        let room = machine(
            "0::/job/step\n",
            &[
                ("sys/fs/cgroup/job/step/cpu.max", "max 100000\n"),
                ("sys/fs/cgroup/job/cpu.max", "250000 100000\n"),
                ("sys/fs/cgroup/job/step/memory.max", "2147483648\n"),
                ("sys/fs/cgroup/job/memory.max", "1073741824\n"),
                ("sys/fs/cgroup/memory.max", "max\n"),
            ],
        );
        assert_eq!(cores(room.path()), Some(2.5));
        assert_eq!(memory(room.path()), Some(1 << 30));
    }

    #[test]
    fn the_first_version_is_read_too() {
        let room = machine(
            "4:memory:/a\n1:cpu,cpuacct:/a/b\n0::/\n",
            &[
                ("sys/fs/cgroup/cpu/a/b/cpu.cfs_quota_us", "50000"),
                ("sys/fs/cgroup/cpu/a/b/cpu.cfs_period_us", "100000"),
                ("sys/fs/cgroup/cpu/a/cpu.cfs_quota_us", "-1"),
                ("sys/fs/cgroup/cpu/a/cpu.cfs_period_us", "100000"),
                (
                    "sys/fs/cgroup/memory/a/memory.limit_in_bytes",
                    "9223372036854771712",
                ),
            ],
        );
        assert_eq!(cores(room.path()), Some(0.5));
        assert_eq!(memory(room.path()), None, "no limit");
    }

    #[test]
    fn no_groups_no_limits() {
        let room = machine("nonsense\n0::/\n", &[("sys/fs/cgroup/cpu.max", "soon")]);
        assert_eq!((cores(room.path()), memory(room.path())), (None, None));
        assert_eq!(cores(Path::new("/nowhere")), None);
    }
}
