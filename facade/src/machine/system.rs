//! How this program was built, and the system that it runs on.

use std::path::Path;

use rustix::system::uname;

use super::{Section, read};

/// The build. A packager may say from which commit: `FABRIC_COMMIT=$(git rev-parse HEAD) cargo build`.
pub(super) fn build() -> Section {
    let mut section = Section::new("fabric");
    section.say("version", env!("CARGO_PKG_VERSION"));
    section.say_if("commit", option_env!("FABRIC_COMMIT"));
    section.say("rustc", env!("FABRIC_RUSTC"));
    section.say("target", env!("FABRIC_TARGET"));
    section.say("profile", env!("FABRIC_PROFILE"));
    section
}

/// The system.
pub(super) fn system(root: &Path) -> Section {
    let mut section = Section::new("system");
    let release = read(root.join("etc/os-release")).unwrap_or_default();
    let pretty = release
        .lines()
        .find_map(|line| line.strip_prefix("PRETTY_NAME="));
    section.say_if("name", pretty.map(|name| name.trim_matches('"')));
    let kernel = uname();
    let [name, release, machine] =
        [kernel.sysname(), kernel.release(), kernel.machine()].map(|text| text.to_string_lossy());
    section.say("kernel", format!("{name} {release} {machine}"));
    section.say_if("container", container(root));
    section
}

/// What this process is shut in, as far as that leaves traces.
fn container(root: &Path) -> Option<&'static str> {
    let there = |name: &str| root.join(name).exists();
    let groups = read(root.join("proc/1/cgroup")).unwrap_or_default();
    match () {
        () if there("var/run/secrets/kubernetes.io") || groups.contains("kubepods") => {
            Some("Kubernetes")
        }
        () if there("run/.containerenv") => Some("Podman"),
        () if there(".dockerenv") || groups.contains("docker") => Some("Docker"),
        () if there(".singularity.d") => Some("Singularity or Apptainer"),
        () => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_system_is_named_and_so_is_its_container() {
        let room = tempfile::tempdir().unwrap();
        assert!(system(room.path()).find("name").is_none());
        std::fs::create_dir_all(room.path().join("etc")).unwrap();
        std::fs::write(
            room.path().join("etc/os-release"),
            "ID=x\nPRETTY_NAME=\"X 12\"\n",
        )
        .unwrap();
        std::fs::write(room.path().join(".dockerenv"), "").unwrap();
        let section = system(room.path());
        assert_eq!(section.find("name").unwrap(), ["X 12"]);
        assert_eq!(section.find("container").unwrap(), ["Docker"]);
        assert!(section.find("kernel").unwrap()[0].starts_with("Linux "));
        assert_eq!(
            build().find("version").unwrap(),
            [env!("CARGO_PKG_VERSION")]
        );
    }
}
