//! One row's collective on one rank: its memory between guard zones, and how it is filled, run and checked.

use fabric_engine::{
    Result,
    buffer::Slab,
    comm::{Call, Communicator, Data, host::Host},
    kernels::Dtype,
};

use super::{
    check::{self, GUARD_BYTES, Wrong},
    collective::{Collective, Layout, Place},
    inputs::Recipe,
    redop::Redop,
};

/// What is done.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    /// The collective.
    pub collective: Collective,
    /// The reduction, where there is one.
    pub op: Option<Redop>,
    /// The elements' type.
    pub dtype: Dtype,
    /// The call's count.
    pub count: usize,
    /// This rank, the ranks, the root.
    pub place: Place,
    /// Input and output in one slab.
    pub is_in_place: bool,
}

/// How memory is made.
#[derive(Clone, Copy, Debug, Default)]
pub struct Memory {
    /// Outside the communicator's own.
    pub is_private: bool,
    /// So many elements after an aligned address.
    pub unalign: usize,
}

/// A case's memory: one set of buffers, and the guards around them.
pub struct Buffers {
    data: Option<Data>,
    guards: Vec<Slab>,
    layout: Layout,
    call: Call,
}

impl Case {
    /// Whether there is such a form.
    pub fn exists(&self) -> bool {
        let layout = self.collective.layout(0, self.place);
        !self.is_in_place || layout.in_place.is_some()
    }

    /// The engine's call.
    pub fn call(&self) -> Call {
        self.collective.call(self.op, self.count, self.place)
    }

    /// Elements of the full vector.
    pub fn full_elems(&self) -> usize {
        self.collective.full_elems(self.count, self.place)
    }

    /// The values for `seed`.
    pub fn recipe(&self, seed: u32) -> Recipe {
        Recipe {
            dtype: self.dtype,
            op: self.op,
            ranks: self.place.ranks,
            seed,
        }
    }

    /// Zeroed buffers.
    ///
    /// # Errors
    /// When the communicator refuses memory.
    pub fn buffers(&self, host: &Host, memory: Memory) -> Result<Buffers> {
        let layout = self.collective.layout(self.count, self.place);
        let mut guards = Vec::new();
        let mut slab = |numel| self.guarded(host, memory, numel, &mut guards);
        let data = match (self.collective, self.is_in_place, layout.in_place) {
            (Collective::Barrier, ..) => Data::None,
            (_, true, Some((numel, _, _))) => Data::InPlace(slab(numel)?),
            _ => Data::Out {
                from: slab(layout.input)?,
                into: slab(layout.output_elems())?,
            },
        };
        Ok(Buffers {
            data: Some(data),
            guards,
            layout,
            call: self.call(),
        })
    }

    fn guarded(
        &self,
        host: &Host,
        memory: Memory,
        numel: usize,
        guards: &mut Vec<Slab>,
    ) -> Result<Slab> {
        let zone = GUARD_BYTES / self.dtype.size();
        let all = zone + memory.unalign + numel + zone;
        let slab = match memory.is_private {
            true => Slab::zeroed(self.dtype, all),
            false => host.alloc(self.dtype, all)?,
        };
        let (before, rest) = slab.split_at(zone + memory.unalign);
        let (inside, after) = rest.split_at(numel);
        for mut zone in [before, after] {
            check::guard(zone.as_bytes_mut());
            guards.push(zone);
        }
        Ok(inside)
    }
}

impl Buffers {
    /// Put this rank's exact values in, and poison where the output will be.
    pub fn fill(&mut self, case: &Case, seed: u32) {
        let (recipe, rank) = (case.recipe(seed), case.place.rank);
        let poison = 0x5a ^ seed as u8;
        match self.data.as_mut().expect("memory between two calls") {
            Data::None | Data::Many(_) => {}
            Data::InPlace(slab) => {
                let from = self.layout.in_place.map_or(0, |(_, from, _)| from);
                slab.as_bytes_mut().fill(poison);
                let range = from..from + self.layout.input;
                recipe.write(rank, 0, slab.bytes_of_mut(&range));
            }
            Data::Out { from, into } => {
                recipe.write(rank, 0, from.as_bytes_mut());
                into.as_bytes_mut().fill(poison);
            }
        }
    }

    /// Rewrite the input with some number of the type; which, depends on `turn`.
    pub fn rewrite(&mut self, dtype: Dtype, turn: usize) {
        let (slab, range) = match self.data.as_mut().expect("memory between two calls") {
            Data::None | Data::Many(_) => return,
            Data::InPlace(slab) => {
                let from = self.layout.in_place.map_or(0, |(_, from, _)| from);
                (slab, from..from + self.layout.input)
            }
            Data::Out { from, .. } => {
                let range = 0..from.numel();
                (from, range)
            }
        };
        let bytes = slab.bytes_of_mut(&range);
        let value = 1 + (turn % 2) as u8;
        match dtype {
            Dtype::F32 => bytemuck::cast_slice_mut(&mut *bytes).fill(f32::from(value)),
            Dtype::F64 => bytemuck::cast_slice_mut(&mut *bytes).fill(f64::from(value)),
            _ => bytes.fill(value),
        }
        std::hint::black_box(bytes); // the next rewrite does not make this one needless
    }

    /// Run the collective and wait for it.
    ///
    /// # Errors
    /// The collective's.
    pub fn run(&mut self, host: &mut Host) -> Result<()> {
        let data = self.data.as_mut().expect("memory between two calls");
        host.run(&self.call, data)
    }

    /// Run the collective on all `sets` at once.
    ///
    /// # Errors
    /// The collective's.
    pub fn run_together(sets: &mut [Self], host: &mut Host) -> Result<()> {
        let mut works = Vec::with_capacity(sets.len());
        for set in &mut *sets {
            let data = set.data.take().expect("memory between two calls");
            works.push(host.submit(set.call.clone(), data)?);
        }
        for (set, work) in sets.iter_mut().zip(works) {
            set.data = Some(work.wait()?);
        }
        Ok(())
    }

    /// What is wrong after a run on [`Buffers::fill`]'s values.
    pub fn check(&self, case: &Case, seed: u32) -> Wrong {
        let recipe = case.recipe(seed);
        let mut wrong = Wrong {
            elements: 0,
            outside: self
                .guards
                .iter()
                .map(|zone| check::broken(zone.as_bytes()))
                .sum(),
        };
        let output = &self.layout.output;
        match self.data.as_ref().expect("memory between two calls") {
            Data::None | Data::Many(_) => {}
            Data::InPlace(slab) => {
                let into = self.layout.in_place.map_or(0, |(_, _, into)| into);
                let range = into..into + self.layout.output_elems();
                wrong.elements += check::wrong_elements(&recipe, output, slab.bytes_of(&range));
            }
            Data::Out { from, into } => {
                wrong.elements += check::wrong_elements(&recipe, output, into.as_bytes());
                let own = super::collective::Segment {
                    of: Some(case.place.rank),
                    range: 0..from.numel(),
                };
                let changed = check::wrong_elements(&recipe, &[own], from.as_bytes());
                wrong.outside += changed * case.dtype.size() as u64;
            }
        }
        wrong
    }
}
