//! Parameters that are kept in one type and computed with in another: the update writes both, wherever their memory lies.

use std::{
    ops::Range,
    sync::{Arc, Mutex, OnceLock},
};

use fabric::{
    Result,
    model::{Events, Model, ParamId, ParamMeta, UpdateParam},
    optim::{ByElement, Elementwise},
};
use fabric_engine::{
    Result as EngineResult,
    buffer::Buffer,
    kernels::{Dtype, Span, SpanMut},
};
use half::bf16;

use super::{Signum, fabric, grad, rules};
use crate::puppet::Script;

/// A model that is kept in f32 and computes in bf16, like one in mixed precision. Its memory is lent, or only copied.
struct Mixed {
    params: Vec<ParamMeta>,
    main: Mutex<Vec<f32>>,
    copy: Mutex<Vec<bf16>>,
    lends: bool,
    calls: usize,
    events: OnceLock<Arc<dyn Events>>,
}

/// A buffer that copies and does not lend.
struct Shy<'a>(&'a mut dyn Buffer);

impl Buffer for Shy<'_> {
    fn dtype(&self) -> Dtype {
        self.0.dtype()
    }
    fn numel(&self) -> usize {
        self.0.numel()
    }
    fn read(&self, range: Range<usize>, into: SpanMut<'_>) -> EngineResult<()> {
        self.0.read(range, into)
    }
    fn write(&mut self, range: Range<usize>, from: Span<'_>) -> EngineResult<()> {
        self.0.write(range, from)
    }
}

impl Model for Mixed {
    fn params(&self) -> &[ParamMeta] {
        &self.params
    }
    fn with(
        &self,
        _: ParamId,
        f: &mut dyn FnMut(&mut dyn Buffer) -> EngineResult<()>,
    ) -> EngineResult<()> {
        f(&mut *self.main.lock().unwrap())
    }
    fn update(&self, _: ParamId, f: &mut UpdateParam<'_>) -> EngineResult<()> {
        let (mut main, mut copy) = (self.main.lock().unwrap(), self.copy.lock().unwrap());
        for _ in 0..self.calls {
            match self.lends {
                true => f(&mut *main, Some(&mut *copy))?,
                false => f(&mut Shy(&mut *main), Some(&mut Shy(&mut *copy)))?,
            }
        }
        Ok(())
    }
    fn attach(&self, events: Arc<dyn Events>) {
        assert!(self.events.set(events).is_ok());
    }
}

fn mixed(lends: bool, calls: usize) -> Mixed {
    Mixed {
        params: vec![ParamMeta::new("w", &[50], Dtype::F32)],
        main: Mutex::new(vec![1.0; 50]),
        copy: Mutex::new(vec![bf16::ZERO; 50]),
        lends,
        calls,
        events: OnceLock::new(),
    }
}

/// Three steps of a mixed model: what it is kept in, and what it computes with.
fn train_mixed<E: Elementwise + Sync>(rule: &E, model: Mixed) -> Result<(Vec<f32>, Vec<bf16>)> {
    let model = Mutex::new(Some(model));
    let ranks = fabric("single", 1).launch_threads(|fabric| {
        let model = model.lock().unwrap().take().unwrap();
        let (model, mut optimizer) = fabric.setup(model, ByElement::of(rule.clone()))?;
        for step in 0..3 {
            let grads = (0..50)
                .map(|element| grad(step, 0, element))
                .collect::<Vec<_>>();
            let events = model.events.get().unwrap().clone();
            fabric.backward(Script(|| events.ready(ParamId(0), &grads).map(drop)))?;
            optimizer.step()?;
            optimizer.zero_grad();
        }
        let (main, copy) = (model.main.lock().unwrap(), model.copy.lock().unwrap());
        Ok((main.clone(), copy.clone()))
    });
    Ok(ranks?.remove(0))
}

#[test]
fn the_copy_that_a_model_computes_with_is_the_cast_parameter() {
    fn holds<E: Elementwise + Sync>(rule: &E) {
        let lent = train_mixed(rule, mixed(true, 1)).unwrap();
        let cast = lent.0.iter().map(|value| bf16::from_f32(*value));
        assert_eq!(lent.1, cast.collect::<Vec<_>>());
        assert_ne!(lent.0[0], 1.0);
        let copied = train_mixed(rule, mixed(false, 1)).unwrap();
        assert_eq!(copied, lent);
    }
    rules().iter().for_each(holds);
    holds(&Signum {
        lr: 0.07,
        beta: 0.9,
    });
}

#[test]
fn a_model_that_calls_back_twice_or_never_is_told_so() {
    for (calls, how) in [(0, "not at all"), (2, "more than once")] {
        let text = train_mixed(&rules()[0], mixed(true, calls))
            .unwrap_err()
            .to_string();
        assert!(
            text.contains("has called back") && text.contains(how),
            "{text}"
        );
    }
}
