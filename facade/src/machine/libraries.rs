//! Libraries that other wires would be built on, found by their names where the linker looks; none is opened.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
};

use super::Section;

const WANTED: [(&str, &str); 7] = [
    ("MPI", "libmpi.so"),
    ("NCCL", "libnccl.so"),
    ("RCCL", "librccl.so"),
    ("CUDA driver", "libcuda.so"),
    ("CUDA runtime", "libcudart.so"),
    ("UCX", "libucp.so"),
    ("InfiniBand verbs", "libibverbs.so"),
];

const USUAL: [&str; 12] = [
    "/lib",
    "/lib64",
    "/usr/lib",
    "/usr/lib64",
    "/usr/local/lib",
    "/usr/lib/x86_64-linux-gnu",
    "/usr/lib/aarch64-linux-gnu",
    "/usr/local/cuda/lib64",
    "/usr/lib64/openmpi/lib",
    "/usr/lib64/mpich/lib",
    "/opt/openmpi/lib",
    "/opt/mpich/lib",
];

/// Where the linker looks: LD_LIBRARY_PATH first.
pub(super) fn folders(variables: &[(String, String)]) -> Vec<PathBuf> {
    let paths = variables.iter().find(|(name, _)| name == "LD_LIBRARY_PATH");
    let own = paths.map(|(_, paths)| std::env::split_paths(paths).collect::<Vec<_>>());
    let own = own.unwrap_or_default().into_iter();
    own.chain(USUAL.map(PathBuf::from)).collect()
}

pub(super) fn libraries(folders: &[PathBuf]) -> Section {
    let mut section = Section::new("libraries");
    // One folder may be reached by several names.
    let mut places = BTreeSet::new();
    let folders = folders
        .iter()
        .filter_map(|folder| folder.canonicalize().ok());
    let mut files = BTreeSet::new();
    for folder in folders.filter(|folder| places.insert(folder.clone())) {
        let entries = std::fs::read_dir(&folder).into_iter().flatten().flatten();
        files.extend(entries.map(|entry| entry.path()));
    }
    for (name, start) in WANTED {
        let found = files.iter().filter(|path| is_called(path, start));
        section.list(name, found.map(|path| path.display().to_string()).collect());
    }
    section
}

/// "libmpi.so" and "libmpi.so.40", and not "libmpi.sol".
fn is_called(path: &Path, start: &str) -> bool {
    let name = path.file_name().map(|name| name.to_string_lossy());
    let rest = name.as_deref().and_then(|name| name.strip_prefix(start));
    rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_are_found_by_name_once() {
        let room = tempfile::tempdir().unwrap();
        for name in ["libmpi.so.40", "libmpi.sol", "libmpi_cxx.so", "libncclx.so"] {
            std::fs::write(room.path().join(name), b"").unwrap();
        }
        let link = room.path().join("again");
        std::os::unix::fs::symlink(room.path(), &link).unwrap();
        let section = libraries(&[room.path().into(), link, "/nowhere".into()]);
        let found = section.find("MPI").unwrap();
        assert_eq!(found.len(), 1);
        assert!(found[0].ends_with("libmpi.so.40"));
        assert!(section.find("NCCL").unwrap().is_empty());
        let own = [("LD_LIBRARY_PATH".to_string(), "/a:/b".to_string())];
        assert_eq!(folders(&own)[..2], [PathBuf::from("/a"), "/b".into()]);
    }
}
