//! The communicators of one model: everybody, the ranks that share one replica's work, those that hold the same slice, and
//! one more among the sharers, so that gathers of parameters and reductions of gradients do not wait for one another.

use super::{
    SharedComm,
    mesh::Mesh,
    plan::{Plan, Reshard},
};
use crate::{comm::Spent, error::Result};

/// The communicators by which one model's tensors travel.
#[derive(Clone)]
pub struct Groups {
    mesh: Mesh,
    /// All ranks.
    pub world: SharedComm,
    /// The ranks among which gradients are reduced into slices.
    pub reduce: SharedComm,
    /// The same ranks again, for gathering parameters.
    pub gather: SharedComm,
    /// The neighbours among which a unit is gathered a second time, where they keep slices of their own for it.
    pub regather: Option<SharedComm>,
    /// The ranks that hold the same slice, where there are several replicas.
    pub replica: Option<SharedComm>,
    own: Vec<SharedComm>, // those that were split off for this model
}

impl Groups {
    /// The groups that `plan` needs. All ranks call this in the same order.
    ///
    /// # Errors
    /// When a group cannot be connected.
    pub fn connect(world: SharedComm, plan: &Plan) -> Result<Self> {
        let (mesh, row) = (plan.mesh(), plan.row());
        let rank = world.rank();
        let mut own = Vec::new();
        let mut split = |color: usize| -> Result<SharedComm> {
            let comm = world.lock().split(color as u32, rank as u32)?;
            let comm = SharedComm::new(comm);
            own.push(comm.clone());
            Ok(comm)
        };
        let gathers = row.shard.shards_param();
        let (reduce, replica) = match row.replica {
            Some(_) => (split(mesh.replica(rank))?, Some(split(mesh.shard(rank))?)),
            None => (world.clone(), None),
        };
        let gather = match gathers {
            true => split(mesh.replica(rank))?,
            false => reduce.clone(),
        };
        let regather = match plan.options().reshard_after_forward {
            Reshard::Within(ranks) if gathers => Some(split(rank / ranks)?),
            _ => None,
        };
        Ok(Self {
            mesh,
            world,
            reduce,
            gather,
            regather,
            replica,
            own,
        })
    }

    /// Everybody on one communicator.
    pub fn flat(world: SharedComm) -> Self {
        Self {
            mesh: Mesh::flat(world.size()),
            reduce: world.clone(),
            gather: world.clone(),
            world,
            regather: None,
            replica: None,
            own: Vec::new(),
        }
    }

    /// How the ranks stand.
    pub fn mesh(&self) -> Mesh {
        self.mesh
    }

    /// Bytes of memory that the system has given this rank's communicators for slabs.
    pub fn shared_bytes(&self) -> u64 {
        let own = self.own.iter().map(|comm| comm.lock().shared_bytes());
        self.world.lock().shared_bytes() + own.sum::<u64>()
    }

    /// What this rank has sent on the communicators that belong to this model alone.
    pub fn spent(&self) -> Spent {
        let mut spent = Spent::default();
        for comm in &self.own {
            spent += comm.lock().spent();
        }
        spent
    }
}
