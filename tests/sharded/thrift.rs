//! Saving and loading copy a few megabytes at a time, whatever a model's size. Method: a model whose memory notes how much
//! is asked of it at once.

use std::{
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use fabric::{
    State,
    engine::{
        Result,
        buffer::Buffer,
        kernels::{Dtype, Span, SpanMut},
    },
    model::{Events, Model, ParamId, ParamMeta},
    vec::VecModel,
};

use super::{builder, place};

/// One large parameter, and a small one.
struct Watched {
    inner: VecModel,
    most_bytes: AtomicUsize,
}

/// Memory that is not lent, only copied.
struct Memory<'a> {
    inner: &'a mut dyn Buffer,
    most_bytes: &'a AtomicUsize,
}

impl Buffer for Memory<'_> {
    fn dtype(&self) -> Dtype {
        self.inner.dtype()
    }
    fn numel(&self) -> usize {
        self.inner.numel()
    }
    fn read(&self, range: Range<usize>, into: SpanMut<'_>) -> Result<()> {
        self.most_bytes.fetch_max(into.bytes(), Ordering::Relaxed);
        self.inner.read(range, into)
    }
    fn write(&mut self, range: Range<usize>, from: Span<'_>) -> Result<()> {
        self.most_bytes.fetch_max(from.bytes(), Ordering::Relaxed);
        self.inner.write(range, from)
    }
}

impl Model for Watched {
    fn params(&self) -> &[ParamMeta] {
        self.inner.params()
    }
    fn with(&self, param: ParamId, f: &mut dyn FnMut(&mut dyn Buffer) -> Result<()>) -> Result<()> {
        self.inner.with(param, &mut |inner| {
            let most_bytes = &self.most_bytes;
            f(&mut Memory { inner, most_bytes })
        })
    }
    fn attach(&self, events: Arc<dyn Events>) {
        self.inner.attach(events);
    }
}

#[test]
fn a_large_parameter_is_copied_a_part_at_a_time() {
    const NUMEL: usize = 3_000_001;
    for form in ["sharded", "full"] {
        let (_room, path) = place();
        let fabric = builder("ddp", 2, "32-true", form).build().unwrap();
        let watched = |first: f32| Watched {
            inner: VecModel::new([
                ("large", (0..NUMEL).map(|at| at as f32 * first).collect()),
                ("small", vec![first; 3]),
            ]),
            most_bytes: AtomicUsize::new(0),
        };
        fabric
            .launch_threads(|fabric| {
                let saved = fabric.setup_module(watched(1.5))?;
                saved.most_bytes.store(0, Ordering::Relaxed);
                fabric.save(&path, State::new().model("model", &saved))?;
                let loaded = fabric.setup_module(watched(0.5))?;
                loaded.most_bytes.store(0, Ordering::Relaxed);
                fabric.load(&path, State::new().model("model", &loaded))?;
                for model in [&saved, &loaded] {
                    let most = model.most_bytes.load(Ordering::Relaxed);
                    assert!(most <= 4 << 20, "{most} bytes at once, {form}");
                }
                assert!(loaded.inner.read("large") == saved.inner.read("large"));
                assert_eq!(loaded.inner.read("small"), [1.5; 3]);
                Ok(())
            })
            .unwrap();
    }
}
