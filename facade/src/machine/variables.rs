//! The variables that decide what a job does: Fabric's own, and those of launchers and libraries. Secrets are not shown.

use super::Section;

/// Beginnings of the names that are shown.
const STARTS: [&str; 18] = [
    "FABRIC_",
    "TORCHELASTIC_",
    "GROUP_",
    "ROLE_",
    "MASTER_",
    "SLURM_",
    "OMPI_COMM_WORLD_",
    "PMI_",
    "PMIX_",
    "MPI_LOCAL",
    "MV2_COMM_WORLD_",
    "JSM_",
    "LSB_",
    "JOB_COMPLETION_",
    "NCCL_",
    "OMP_",
    "KMP_",
    "MKL_",
];

const NAMES: [&str; 12] = [
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "NODE_RANK",
    "RAYON_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
    "HIP_VISIBLE_DEVICES",
    "KUBERNETES_SERVICE_HOST",
    "LD_LIBRARY_PATH",
    "LD_PRELOAD",
    "RUST_LOG",
];

/// Parts of names whose values are nobody's business.
const SECRETS: [&str; 6] = ["SECRET", "TOKEN", "PASSW", "JWT", "CREDENTIAL", "_KEY"];

pub(super) fn variables(all: &[(String, String)]) -> Section {
    let mut section = Section::new("variables");
    let is_shown =
        |name: &str| NAMES.contains(&name) || STARTS.iter().any(|start| name.starts_with(start));
    let mut shown: Vec<_> = all.iter().filter(|(name, _)| is_shown(name)).collect();
    shown.sort();
    for (name, value) in shown {
        let upper = name.to_ascii_uppercase();
        let text = match SECRETS.iter().any(|part| upper.contains(part)) {
            true => format!("set, {} characters", value.chars().count()),
            false => one_line(value),
        };
        section.say(name, text);
    }
    section
}

/// A value that would break the table is quoted.
fn one_line(value: &str) -> String {
    match value.chars().any(char::is_control) {
        true => format!("{value:?}"),
        false => value.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_are_counted_and_never_shown() {
        let all = [
            ("FABRIC_SECRET", "5ec2e75ec2e75ec2"),
            ("SLURM_JWT", "eyJ-private"),
            ("FABRIC_WIRE", "tcp\n[rank 0] fake"),
            ("SLURM_PROCID", "3"),
            ("HOME", "/home/somebody"),
            ("AWS_SECRET_ACCESS_KEY", "private"),
        ];
        let all = all.map(|(name, value)| (name.to_string(), value.to_string()));
        let section = variables(&all);
        assert_eq!(
            section.find("FABRIC_SECRET").unwrap(),
            ["set, 16 characters"]
        );
        assert_eq!(section.find("SLURM_JWT").unwrap(), ["set, 11 characters"]);
        assert_eq!(section.find("SLURM_PROCID").unwrap(), ["3"]);
        assert_eq!(
            section.find("FABRIC_WIRE").unwrap(),
            ["\"tcp\\n[rank 0] fake\""]
        );
        assert_eq!(section.facts.len(), 4, "nothing else is anybody's business");
        let text = format!("{section:?}");
        assert!(
            !text.contains("5ec2e7") && !text.contains("private"),
            "{text}"
        );
    }
}
