//! What pods are given: Kubeflow's PyTorchJob (`RANK`, `WORLD_SIZE`, ...) and Kubernetes' indexed jobs.

use super::{
    Applies, ClusterEnvironment, Lookup, Place,
    address::{meeting, resolve},
    variables::{Number, Numbers, Variables},
};
use crate::Result;

/// The environment of pods with one rank each.
///
/// Kubeflow's PyTorchJob sets all that is needed: `RANK`, `WORLD_SIZE`, `MASTER_ADDR`, `MASTER_PORT` (and no `LOCAL_RANK`,
/// by which it is told from torchrun). The same four, set by hand, start ranks anywhere.
///
/// An indexed job of Kubernetes sets `JOB_COMPLETION_INDEX` alone. Add `WORLD_SIZE`, `MASTER_ADDR`, `MASTER_PORT`, a headless
/// service by which pods have names, and the secret:
///
/// ```yaml
/// # kubectl create secret generic train --from-literal=secret=$(openssl rand -hex 32)
/// apiVersion: v1
/// kind: Service
/// metadata: {name: train}
/// spec: {clusterIP: None, publishNotReadyAddresses: true, selector: {job-name: train}}
/// ---
/// apiVersion: batch/v1
/// kind: Job
/// metadata: {name: train}
/// spec:
///   completionMode: Indexed
///   completions: 4
///   parallelism: 4
///   template:
///     spec:
///       subdomain: train
///       restartPolicy: Never
///       containers:
///       - name: train
///         image: registry.example/train
///         env:
///         - {name: WORLD_SIZE, value: "4"}
///         - {name: MASTER_ADDR, value: train-0.train}
///         - {name: MASTER_PORT, value: "29400"}
///         - name: FABRIC_SECRET
///           valueFrom: {secretKeyRef: {name: train, key: secret}}
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Kubernetes;

const INDEX: &str = "JOB_COMPLETION_INDEX";

fn rank_name(get: Lookup<'_>) -> &'static str {
    match get("RANK").is_none() && get(INDEX).is_some() {
        true => INDEX,
        false => "RANK",
    }
}

impl ClusterEnvironment for Kubernetes {
    fn name(&self) -> &'static str {
        "kubernetes"
    }

    fn applies(&self, get: Lookup<'_>) -> Applies {
        let name = rank_name(get);
        let rank = get(name).unwrap_or_default();
        match (name, get("WORLD_SIZE").is_some()) {
            (INDEX, true) => Applies::Yes(format!("a Kubernetes job ({INDEX}={rank})")),
            (INDEX, false) => Applies::Not(format!(
                "this is pod {rank} of a Kubernetes job, and without WORLD_SIZE it is on its own"
            )),
            (_, false) if get("RANK").is_none() => Applies::No,
            _ if get("KUBERNETES_SERVICE_HOST").is_some() => {
                Applies::Yes(format!("a PyTorchJob (RANK={rank})"))
            }
            _ => Applies::Yes(format!("RANK and WORLD_SIZE (RANK={rank})")),
        }
    }

    fn place(&self, get: Lookup<'_>) -> Result<Place> {
        let name = rank_name(get);
        let required = [name, "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"];
        let variables = Variables::new(get, "a PyTorchJob", &required)?;
        let (rank, world) = (variables.number(name)?, variables.number("WORLD_SIZE")?);
        let numbers = Numbers {
            rank,
            world,
            local_rank: Number::new("ranks before this one in its pod", 0),
            local_world: Number::new("ranks in a pod", 1),
            node_rank: Number::new(name, rank.value),
            nodes: Number::new("pods", world.value),
        };
        let ports = ["FABRIC_PORT", "MASTER_PORT"];
        let port = variables.first_port(&ports)?.unwrap_or_default(); // MASTER_PORT is there
        let one_pod = world.value == 1;
        let hosts = [("MASTER_ADDR", variables.text("MASTER_ADDR"))];
        let mut address = meeting(&variables, one_pod, &hosts, port)?;
        // Old operators tell the master that it is "localhost", and the others its name.
        let in_pod = get("KUBERNETES_SERVICE_HOST").is_some() && rank.value == 0 && !one_pod;
        if in_pod
            && address.ip().is_loopback()
            && let Some(host) = variables.text("HOSTNAME")
        {
            address = resolve(&host, port, false)
                .map_err(|why| variables.refuse("HOSTNAME", &host, why))?;
        }
        variables.place(numbers, address, "kubernetes")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::environment::table::{lookup, place, refusal};

    const POD: &[(&str, &str)] = &[
        ("RANK", "2"),
        ("WORLD_SIZE", "4"),
        ("MASTER_ADDR", "10.0.0.7"),
        ("MASTER_PORT", "23456"),
        ("FABRIC_SECRET", "s"),
    ];

    fn applies(base: &[(&str, &str)], changes: &[(&str, &str)]) -> Applies {
        lookup(base, changes, |get| Kubernetes.applies(get))
    }

    // ENV-06, line 5
    #[test]
    fn a_pytorch_jobs_pods_are_machines_of_one_rank() {
        let place = place(&Kubernetes, POD, &[]).unwrap();
        assert_eq!((place.rank, place.world), (2, 4));
        assert_eq!((place.local_rank, place.local_world), (0, 1));
        assert_eq!((place.node_rank, place.nodes), (2, 4));
        assert_eq!(place.address, "10.0.0.7:23456".parse().unwrap());
        let pod = [("KUBERNETES_SERVICE_HOST", "10.0.0.1")];
        assert_eq!(
            applies(POD, &pod),
            Applies::Yes("a PyTorchJob (RANK=2)".into())
        );
    }

    #[test]
    fn a_master_that_is_told_localhost_listens_at_its_own_address() {
        let master = [
            ("RANK", "0"),
            ("MASTER_ADDR", "localhost"),
            ("KUBERNETES_SERVICE_HOST", "10.0.0.1"),
            ("HOSTNAME", "10.0.0.7"),
        ];
        let address = place(&Kubernetes, POD, &master).unwrap().address;
        assert_eq!(address, "10.0.0.7:23456".parse().unwrap());
        // By hand, on one machine, localhost is what it says.
        let address = place(&Kubernetes, POD, &master[..2]).unwrap().address;
        assert!(address.ip().is_loopback());
    }

    #[test]
    fn an_indexed_job_needs_to_be_told_of_its_world() {
        let index = [(INDEX, "1")];
        assert!(matches!(applies(&index, &[]), Applies::Not(_)));
        let job = [POD, &index].concat();
        let place = place(&Kubernetes, &job, &[("RANK", "")]).unwrap();
        assert_eq!((place.rank, place.world), (1, 4));
        let text = refusal(&Kubernetes, &job, &[("RANK", ""), ("MASTER_ADDR", "")]);
        assert!(text.contains("MASTER_ADDR is not"), "{text}");
    }

    #[test]
    fn half_a_set_names_what_misses() {
        for name in ["RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"] {
            let text = refusal(&Kubernetes, POD, &[(name, "")]);
            assert!(text.contains(&format!("{name} is not")), "{text}");
        }
        assert_eq!(applies(&[("MASTER_ADDR", "h")], &[]), Applies::No);
    }
}
