//! A plan from a description alone: how many parameters in how many layers, on how many ranks. No model, no ranks, no
//! device: the same [`Plan`] that a set-up makes, and the same words about it.

mod count;
pub mod published;

use fabric_engine::{
    comm::Link,
    shard::{
        ParamMeta, UnitId,
        mesh::Mesh,
        placement::{Row, SINGLE},
        plan::{Forecast, Least, Options, Plan, Reshard},
    },
};

pub use count::{parse_bytes, parse_count};

use crate::{error::Result, precision::Precision, strategy::Preset};

const MOST_LAYERS: usize = 10_000;

/// What is known of a training job before there is one.
///
/// ```
/// use fabric::planner::Description;
///
/// let plan = Description::new(70_000_000_000, 80, 64, "fsdp")?.precision("bf16-mixed")?;
/// let bytes = plan.footprint()?;
/// assert!(bytes.total() < 80_000_000_000, "it fits");
/// println!("{}", plan.explain(None)?);
/// # Ok::<(), fabric::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Description {
    params: usize,
    layers: usize,
    world: usize,
    row: Row,
    preset: Preset,
    precision: Precision,
    states: usize,
    options: Options,
}

impl Description {
    /// `params` parameters, spread evenly over `layers` layers, each a unit, on `world` ranks under a strategy.
    ///
    /// # Errors
    /// When the strategy is unknown, a number is zero, or there are more than 10,000 layers.
    pub fn new(params: usize, layers: usize, world: usize, strategy: &str) -> Result<Self> {
        for (name, number) in [("parameters", params), ("layers", layers), ("ranks", world)] {
            if number == 0 {
                return Err(crate::Error::argument(
                    format!("a plan for 0 {name}"),
                    "Give a positive number",
                ));
            }
        }
        if layers > MOST_LAYERS {
            return Err(crate::Error::argument(
                format!("a plan for {layers} layers"),
                format!(
                    "Give at most {MOST_LAYERS}: a layer is a block of the model, not one of its parameters"
                ),
            ));
        }
        let preset = crate::strategy::named(strategy)?;
        let row = preset.row();
        if row == SINGLE && world > 1 {
            return Err(crate::Error::argument(
                format!("strategy 'single' with {world} ranks"),
                "Choose a strategy for several ranks, or one rank",
            ));
        }
        Ok(Self {
            params,
            layers: layers.min(params),
            world,
            row,
            preset,
            precision: Precision::F32,
            states: 2,
            options: Options::default(),
        })
    }

    /// In this precision; 32-true if not given.
    ///
    /// # Errors
    /// When it is unknown.
    pub fn precision(mut self, name: &str) -> Result<Self> {
        self.precision = Precision::parse(name)?;
        Ok(self)
    }

    /// With an optimizer that keeps this many vectors beside each parameter: AdamW 2, the default.
    pub fn states(self, states: usize) -> Self {
        Self { states, ..self }
    }

    /// Cut by these options. The types are those of the precision, unless they are given.
    pub fn options(self, options: Options) -> Self {
        Self { options, ..self }
    }

    /// The plan.
    ///
    /// # Errors
    /// When the ranks do not divide into groups, or the strategy has none.
    pub fn plan(&self) -> Result<Plan> {
        crate::resolve::check_group(&self.row, self.options.group)?;
        let policy = self.precision.policy();
        let mut options = self.options.clone();
        self.preset.apply(&mut options);
        if policy.is_mixed() {
            options.main_dtype.get_or_insert(policy.main);
        }
        let (each, rest) = (self.params / self.layers, self.params % self.layers);
        let param = |layer: usize| {
            let numel = each + usize::from(layer < rest);
            ParamMeta::new(format!("layer.{layer}"), &[numel], policy.param).in_unit(UnitId(layer))
        };
        let params = (0..self.layers).map(param).collect();
        let units = (0..self.layers).map(|layer| format!("layer.{layer}"));
        let plan = Plan::with_units(self.row, self.world, params, units.collect(), &options)?;
        Ok(plan)
    }

    /// Bytes on the rank that needs most.
    ///
    /// # Errors
    /// As [`Description::plan`].
    pub fn footprint(&self) -> Result<fabric_engine::shard::plan::Footprint> {
        Ok(self.plan()?.largest_footprint(self.states))
    }

    /// What a rank sends at least, whatever the algorithms.
    ///
    /// # Errors
    /// As [`Description::plan`].
    pub fn forecast(&self) -> Result<Forecast> {
        let plan = self.plan()?;
        Ok(plan.forecast(&self.least(plan.mesh())))
    }

    fn least(&self, mesh: Mesh) -> Least {
        let near = match self.options.reshard_after_forward {
            Reshard::Within(ranks) => ranks,
            _ => mesh.shards,
        };
        Least { mesh, near }
    }

    /// All of it in words; `link` is what the wire is like.
    ///
    /// # Errors
    /// As [`Description::plan`].
    pub fn explain(&self, link: Option<Link>) -> Result<String> {
        let plan = self.plan()?;
        let forecast = plan.forecast(&self.least(plan.mesh()));
        Ok(plan.explain(&forecast, self.states, link))
    }
}
