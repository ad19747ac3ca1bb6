//! A look at a model that was set up, whatever its type: its parameters as this rank updates them, whole or in pieces.

use std::sync::Arc;

use fabric_engine::{
    buffer::Buffer,
    kernels::{self, Span, SpanMut},
};

use crate::{
    Error, Result,
    model::{Core, FabricModule, Model, ParamId, ParamMeta},
};

/// A model that was set up, as callbacks see it. What a rank can read and write is what it updates: whole parameters under
/// `ddp`, its pieces where ranks update slices, in the type in which they are updated.
///
/// ```
/// use fabric::{Fabric, optim::Sgd, vec::VecModel};
///
/// Fabric::builder().build()?.launch(|fabric| {
///     let (model, _) = fabric.setup(VecModel::new([("w", vec![1f32, 2.0])]), Sgd::new(0.1))?;
///     let view = model.view();
///     let w = view.find("w").next().expect("this rank has it");
///     view.write(w, &[3.0, 4.0])?;
///     view.publish()?;
///     assert_eq!((view.read(w)?, model.read("w")), (vec![3.0, 4.0], vec![3.0, 4.0]));
///     Ok(())
/// })?;
/// # Ok::<(), fabric::Error>(())
/// ```
#[derive(Clone)]
pub struct ModelView(Arc<Core>);

impl<M: Model> FabricModule<M> {
    /// A look at the model that does not know its type.
    pub fn view(&self) -> ModelView {
        ModelView::of(&self.core)
    }
}

impl ModelView {
    pub(crate) fn of(core: &Arc<Core>) -> Self {
        Self(core.clone())
    }

    /// A number that only this model has in this process: models count in the order in which they were set up.
    pub fn id(&self) -> u64 {
        self.0.id
    }

    /// All parameters, the same on all ranks.
    pub fn params(&self) -> &[ParamMeta] {
        self.0.model.params()
    }

    /// What this rank updates: whole parameters, or pieces called `name[start..end]`.
    pub fn pieces(&self) -> &[ParamMeta] {
        self.0.updated().params()
    }

    /// The number of the parameter that a piece is of.
    pub fn whole(&self, piece: ParamId) -> ParamId {
        self.0.updated().whole(piece)
    }

    /// The parameter that a piece is of.
    pub fn param_of(&self, piece: ParamId) -> &ParamMeta {
        &self.params()[self.whole(piece).0]
    }

    /// This rank's pieces that get gradients.
    pub fn trained(&self) -> impl Iterator<Item = ParamId> {
        let pieces = (0..self.pieces().len()).map(ParamId);
        pieces.filter(|piece| self.param_of(*piece).trainable)
    }

    /// This rank's pieces of the parameter called `name`: none, where only others hold it.
    pub fn find(&self, name: &str) -> impl Iterator<Item = ParamId> {
        let pieces = (0..self.pieces().len()).map(ParamId);
        pieces.filter(move |piece| self.param_of(*piece).name == name)
    }

    /// How many ranks update this piece, each the same: sums over ranks count it so often.
    pub fn copies(&self, piece: ParamId) -> usize {
        let sequencer = self.0.sequencer();
        let mesh = sequencer.plan().mesh();
        match &self.0.shards {
            Some(shards) if shards.is_slice(piece.0) => mesh.replicas,
            _ => mesh.world(),
        }
    }

    /// The values of a piece.
    ///
    /// # Errors
    /// When the library refuses.
    pub fn read(&self, piece: ParamId) -> Result<Vec<f32>> {
        let mut values = vec![0f32; self.pieces()[piece.0].numel()];
        self.with(piece, &mut |buffer| {
            buffer.read(0..values.len(), SpanMut::of(&mut values))
        })?;
        Ok(values)
    }

    /// Change the values of a piece. When all are changed, all ranks call [`ModelView::publish`] together.
    ///
    /// # Errors
    /// When the library refuses, or the lengths differ.
    pub fn write(&self, piece: ParamId, values: &[f32]) -> Result<()> {
        let meta = &self.pieces()[piece.0];
        if values.len() != meta.numel() {
            return Err(Error::argument(
                format!(
                    "{} values for '{}', which has {}",
                    values.len(),
                    meta.name,
                    meta.numel()
                ),
                "Write as many values as ModelView::read returns",
            ));
        }
        self.with(piece, &mut |buffer| {
            buffer.write(0..values.len(), Span::of(values))
        })
    }

    /// Bring changed values to where the model computes with them, on all ranks, which call this together.
    ///
    /// # Errors
    /// When a rank is gone.
    pub fn publish(&self) -> Result<()> {
        if self.0.shards.is_some() {
            self.0.sequencer().refresh()?;
        }
        Ok(())
    }

    /// The gradient of a piece, with the loss's scale undone and clipped, if it was; `None` when it has none.
    ///
    /// # Errors
    /// When the arithmetic refuses.
    pub fn gradient(&self, piece: ParamId) -> Result<Option<Vec<f32>>> {
        let sequencer = self.0.sequencer();
        let grad = match &self.0.shards {
            Some(shards) => sequencer.piece(&shards.pieces()[piece.0]),
            None => sequencer.grad(piece),
        };
        let Some(grad) = grad else { return Ok(None) };
        let mut copy = vec![0f32; grad.len()];
        kernels::cast_scaled(grad, SpanMut::of(&mut copy), sequencer.factor())?;
        Ok(Some(copy))
    }

    pub(crate) fn core(&self) -> &Arc<Core> {
        &self.0
    }

    pub(crate) fn with(
        &self,
        piece: ParamId,
        f: &mut dyn FnMut(&mut dyn Buffer) -> fabric_engine::Result<()>,
    ) -> Result<()> {
        Ok(self.0.updated().with(piece, f)?)
    }
}
