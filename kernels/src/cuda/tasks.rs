//! What a queue does of each [`Task`]: which kernel, over which addresses, and what goes through the host.

use std::ffi::c_void;
use std::sync::Arc;

use cudarc::driver::{result, sys};

use super::abi;
use super::driver::refused;
use super::memory::Piece;
use super::pending::{Entry, Kernel, upload};
use super::queue::Queue;
use crate::device::{Block, Device, Squares, Task};
use crate::dtype::Dtype;
use crate::error::KernelError;
use crate::fold::Fold;
use crate::optim::Rule;
use crate::scalar::power;
use crate::span::{Span, SpanMut};
use crate::{cast_scaled, fill};

impl Queue {
    /// Put a task in line.
    pub(super) fn enter(&self, task: Task<'_>) -> Result<(), KernelError> {
        match task {
            Task::Move { from, into, factor } => self.enter_move(from, into, factor),
            Task::Round {
                pairs,
                factor,
                seed,
            } => self.round(pairs, factor, seed),
            Task::Quantize { from, into, scales } => {
                let name = format!("quantize_{}_{}", from.dtype(), into.dtype());
                self.in_blocks(&name, from, into.as_span(), scales.as_span())
            }
            Task::Dequantize { from, scales, into } => {
                let name = format!("dequantize_{}_{}", from.dtype(), into.dtype());
                self.in_blocks(&name, from, into.as_span(), scales)
            }
            Task::Scale { x, factor } => {
                let (from, into) = (x.dtype(), x.dtype());
                let kernel = Kernel::Move { from, into, factor };
                self.enter_pair(kernel, x.as_span(), &x)
            }
            Task::Fold { op, into, with } => self.enter_fold(op, into, with),
            Task::Fill { into, value } => {
                let kernel = Kernel::Fill {
                    bytes: into.dtype().size(),
                    bits: bits(into.dtype(), value)?,
                };
                self.enter_pair(kernel, into.as_span(), &into)
            }
            Task::Clamp { x, limit } => {
                let dtype = x.dtype();
                self.enter_pair(Kernel::Clamp { dtype, limit }, x.as_span(), &x)
            }
            Task::Update {
                rule,
                step,
                grad_scale,
                param,
                grad,
                states,
                copy,
            } => {
                let mut numbers = numbers(rule, step);
                numbers.grad_scale = grad_scale;
                self.enter_update(formula(rule), numbers, param, grad, states, copy)
            }
        }
    }

    fn enter_move(
        &self,
        from: Span<'_>,
        mut into: SpanMut<'_>,
        factor: f64,
    ) -> Result<(), KernelError> {
        if into.is_empty() {
            return Ok(());
        }
        if factor != 1.0 && !into.dtype().is_float() {
            let (op, dtype) = ("cast_scaled", into.dtype());
            return Err(KernelError::Unsupported { op, dtype });
        }
        match (from.device(), into.device()) {
            (None, _) => {
                self.launch_pending()?;
                self.bring(from, into.as_mut_ptr(), into.dtype(), factor)
            }
            (_, None) => self.fetch(from, into, factor),
            _ => {
                let (source, target) = (from.dtype(), into.dtype());
                let kernel = match source == target && factor == 1.0 {
                    true => Kernel::Copy,
                    false => Kernel::Move {
                        from: source,
                        into: target,
                        factor,
                    },
                };
                self.enter_pair(kernel, from, &into)
            }
        }
    }

    fn enter_fold(&self, op: Fold, into: SpanMut<'_>, with: Span<'_>) -> Result<(), KernelError> {
        let unsupported = |dtype| KernelError::Unsupported {
            op: op.name(),
            dtype,
        };
        let number = match op {
            Fold::Sum => 0,
            Fold::Prod => 1,
            Fold::Min => 2,
            Fold::Max => 3,
            Fold::And | Fold::Or | Fold::Xor => return Err(unsupported(into.dtype())),
        };
        if !into.dtype().is_float() {
            return Err(unsupported(into.dtype()));
        }
        if into.device().is_none() {
            // The host folds: what lies here comes there.
            return self.fetched(with, |with| crate::fold(op, into, with));
        }
        let kernel = Kernel::Fold {
            from: with.dtype(),
            into: into.dtype(),
            op: number,
        };
        self.present(with, |with| self.enter_pair(kernel, with, &into))
    }

    fn enter_update(
        &self,
        formula: &'static str,
        mut rule: abi::Rule,
        param: SpanMut<'_>,
        grad: Span<'_>,
        states: [Option<SpanMut<'_>>; 2],
        copy: Option<SpanMut<'_>>,
    ) -> Result<(), KernelError> {
        if param.is_empty() {
            return Ok(());
        }
        rule.grad_dtype = u32::from(grad.dtype().code());
        // Without a copy its dtype is nothing: updates with and without one share a launch where the others agree.
        let copy_dtype = copy.as_ref().map_or(Dtype::F32, |copy| copy.dtype());
        rule.copy_dtype = u32::from(copy_dtype.code());
        let kernel = Kernel::Update {
            formula,
            param: param.dtype(),
            rule,
        };
        let [state0, state1] = &states;
        let at =
            |span: &Option<SpanMut<'_>>| span.as_ref().map_or(0, |span| address(span.as_span()));
        let mut ranges = vec![range(param.as_span())];
        let others = [state0, state1, &copy].into_iter().flatten();
        ranges.extend(others.map(|span| range(span.as_span())));
        self.present(grad, |grad| {
            let entry = abi::Update {
                param: address(param.as_span()),
                grad: address(grad),
                state0: at(state0),
                state1: at(state1),
                copy: at(&copy),
                numel: param.len() as u64,
                ..abi::Update::default()
            };
            let mut ranges = ranges.clone();
            ranges.push(range(grad));
            let spans = [state0, state1, &copy];
            let [a, b, c] = spans.map(|span| span.as_ref().and_then(SpanMut::device));
            let others = [a, b, c, grad.device()];
            self.enter_entry(kernel, Entry::Update(entry), &ranges, &others)
        })
    }

    fn enter_pair(
        &self,
        kernel: Kernel,
        from: Span<'_>,
        into: &SpanMut<'_>,
    ) -> Result<(), KernelError> {
        if into.is_empty() {
            return Ok(());
        }
        let numel = match kernel {
            Kernel::Copy => into.bytes(),
            _ => into.len(),
        };
        let entry = abi::Move {
            from: address(from),
            into: address(into.as_span()),
            numel: numel as u64,
            first: 0,
        };
        let ranges = [range(from), range(into.as_span())];
        self.enter_entry(kernel, Entry::Move(entry), &ranges, &[from.device()])
    }

    fn enter_entry(
        &self,
        kernel: Kernel,
        entry: Entry,
        ranges: &[(u64, u64)],
        others: &[Option<&dyn Device>],
    ) -> Result<(), KernelError> {
        if self.pending().refuses(ranges) {
            self.launch_pending()?;
        }
        others.iter().try_for_each(|other| self.beside(*other))?;
        self.pending().add(kernel, entry, ranges);
        Ok(())
    }

    /// Round pairs by chance, in one launch: they are numbered by their places in the table.
    fn round(
        &self,
        pairs: Vec<(Span<'_>, SpanMut<'_>)>,
        factor: f64,
        seed: u64,
    ) -> Result<(), KernelError> {
        let Some((from, into)) = pairs.first() else {
            return Ok(());
        };
        self.launch_pending()?;
        let name = format!("stochastic_{}_{}", from.dtype(), into.dtype());
        let (mut table, mut chunks) = (Vec::new(), 0);
        for (from, into) in &pairs {
            self.beside(from.device())?;
            self.beside(into.device())?;
            let numel = from.len() as u64;
            table.push(abi::Move {
                from: address(*from),
                into: address(into.as_span()),
                numel,
                first: chunks,
            });
            chunks += numel.div_ceil(abi::CHUNK);
        }
        let (mut factor, mut seed) = (factor, seed);
        let scalars = [(&raw mut factor).cast(), (&raw mut seed).cast()];
        self.launch_apart(
            &name,
            bytemuck::cast_slice(&table),
            pairs.len(),
            chunks,
            &scalars,
        )
    }

    /// Launch a kernel over elements and their scales.
    fn in_blocks(
        &self,
        name: &str,
        from: Span<'_>,
        into: Span<'_>,
        scales: Span<'_>,
    ) -> Result<(), KernelError> {
        if from.is_empty() {
            return Ok(());
        }
        self.launch_pending()?;
        let spans = [from, into, scales];
        spans
            .iter()
            .try_for_each(|span| self.beside(span.device()))?;
        let numel = from.len() as u64;
        let table = [abi::Blocks {
            from: address(from),
            into: address(into),
            scales: address(scales),
            numel,
            ..abi::Blocks::default()
        }];
        let chunks = numel.div_ceil(abi::CHUNK);
        self.launch_apart(name, bytemuck::cast_slice(&table), 1, chunks, &[])
    }

    /// Launch a kernel over a table of its own, when nothing waits, in order with the queues that were noted.
    fn launch_apart(
        &self,
        name: &str,
        table: &[u8],
        count: usize,
        chunks: u64,
        scalars: &[*mut c_void],
    ) -> Result<(), KernelError> {
        self.launch_then(|| {
            let table = upload(self, table)?;
            let mut address = table.address() as u64;
            let mut count = u32::try_from(count).expect("fewer entries than 2^32");
            let mut chunks = chunks;
            let mut arguments: Vec<*mut c_void> = vec![
                (&raw mut address).cast(),
                (&raw mut count).cast(),
                (&raw mut chunks).cast(),
            ];
            arguments.extend(scalars);
            // SAFETY: these are the kernel's arguments, which live during the call; the memory is lent by spans, and freed in
            // the order of its queues. Test: `tests/gpu`, queues.
            unsafe {
                self.functions()
                    .launch(name, chunks, self.raw(), &mut arguments)
            }
        })
    }

    /// Call `f` with the span in this device's memory: where it lies, or brought there for a moment.
    fn present(
        &self,
        span: Span<'_>,
        f: impl FnOnce(Span<'_>) -> Result<(), KernelError>,
    ) -> Result<(), KernelError> {
        if span.device().is_some() {
            return f(span);
        }
        let piece = Piece::fresh(self, span.bytes().max(1))?;
        let ptr = std::ptr::without_provenance_mut(piece.address());
        self.bring(span, ptr, span.dtype(), 1.0)?;
        // SAFETY: the piece has as many bytes, is filled in stream order, and is kept until the work was launched. Test:
        // `tests/gpu`, host_operands.
        let here = unsafe { Span::from_raw(ptr, span.dtype(), span.len(), Some(self)) };
        f(here)?;
        self.pending().hold(Box::new(piece));
        Ok(())
    }

    /// Note that work touches memory which another queue of this device may work on.
    fn beside(&self, other: Option<&dyn Device>) -> Result<(), KernelError> {
        let own: &dyn Device = self;
        let Some(other) = other.filter(|other| !std::ptr::addr_eq(&raw const **other, own)) else {
            return Ok(());
        };
        if other.memory() != own.memory() {
            return Err(KernelError::Apart {
                op: "work of a device",
                memory: own.memory(),
                other: other.memory(),
            });
        }
        self.pending().beside(other);
        if let Some(host) = other.as_any().downcast_ref::<Queue>() {
            host.pending().receive(self.weak());
        }
        Ok(())
    }

    /// Copy elements of the host to `into`, cast on the way.
    fn bring(
        &self,
        from: Span<'_>,
        into: *mut u8,
        dtype: Dtype,
        factor: f64,
    ) -> Result<(), KernelError> {
        let mut words = Vec::new();
        let from = match from.dtype() == dtype && factor == 1.0 {
            true => from,
            false => {
                let mut here = room(&mut words, dtype, from.len());
                cast_scaled(from, here.reborrow(), factor)?;
                // SAFETY: the room lives as long as `words`, and nobody writes to it any more. Test: `tests/gpu`, bus.
                unsafe { Span::from_raw(here.as_ptr(), dtype, from.len(), None) }
            }
        };
        // SAFETY: a span of the host is valid for its bytes, which nobody writes during the call. As above.
        let bytes = unsafe { std::slice::from_raw_parts(from.as_ptr(), from.bytes()) };
        // SAFETY: `into` has room for as many elements, as `Task` and `present` see to; pageable memory was copied when the
        // call returns, and pinned memory is waited for below. As above.
        let copied = unsafe { result::memcpy_htod_async(into.addr() as u64, bytes, self.raw()) };
        copied.map_err(refused(self.ordinal(), "copy to the device"))?;
        match is_pinned(bytes) {
            true => self.settle(),
            false => Ok(()),
        }
    }

    /// Copy elements of the device to the host, cast there, and wait for them.
    fn fetch(&self, from: Span<'_>, mut into: SpanMut<'_>, factor: f64) -> Result<(), KernelError> {
        if from.dtype() != into.dtype() || factor != 1.0 {
            return self.fetched(from, |here| cast_scaled(here, into, factor));
        }
        self.beside(from.device())?;
        self.launch_pending()?;
        // SAFETY: a span of the host is valid for its bytes, and ours alone. Test: `tests/gpu`, bus.
        let bytes = unsafe { std::slice::from_raw_parts_mut(into.as_mut_ptr(), into.bytes()) };
        // SAFETY: both have as many bytes, as the verbs see to; they are waited for. As above.
        let copied = unsafe { result::memcpy_dtoh_async(bytes, address(from), self.raw()) };
        copied.map_err(refused(self.ordinal(), "copy from the device"))?;
        self.settle()
    }

    /// Call `f` with a copy on the host.
    fn fetched(
        &self,
        from: Span<'_>,
        f: impl FnOnce(Span<'_>) -> Result<(), KernelError>,
    ) -> Result<(), KernelError> {
        let mut words = Vec::new();
        let mut here = room(&mut words, from.dtype(), from.len());
        if !from.is_empty() {
            self.fetch(from, here.reborrow(), 1.0)?;
        }
        f(here.as_span())
    }

    /// [`Device::squares`], of spans of this device.
    pub(super) fn sum_squares(&self, spans: &[Span<'_>]) -> Result<Squares, KernelError> {
        let mut all = Squares::default();
        let mut dtypes: Vec<Dtype> = spans.iter().map(Span::dtype).collect();
        dtypes.sort_unstable();
        dtypes.dedup();
        for dtype in dtypes {
            let of_it = spans
                .iter()
                .filter(|span| span.dtype() == dtype && !span.is_empty());
            let mut table = Vec::new();
            let mut chunks = 0;
            for span in of_it {
                let numel = span.len() as u64;
                table.push(abi::Move {
                    from: address(*span),
                    into: 0,
                    numel,
                    first: chunks,
                });
                chunks += numel.div_ceil(abi::CHUNK);
            }
            if chunks > 0 {
                let found = self.squares_of(dtype, &table, chunks)?;
                all.sum += found.sum;
                all.infinities += found.infinities;
                all.nans += found.nans;
            }
        }
        Ok(all)
    }

    fn squares_of(
        &self,
        dtype: Dtype,
        table: &[abi::Move],
        chunks: u64,
    ) -> Result<Squares, KernelError> {
        let count = u32::try_from(table.len()).expect("fewer spans than 2^32");
        let table = upload(self, bytemuck::cast_slice(table))?;
        let sums = Piece::fresh(self, chunks as usize * size_of::<f64>())?;
        // The sum, then how many infinities, then how many NaNs.
        let found: Arc<Piece> = Arc::new(Piece::zeroed(self.handle(), 3 * size_of::<u64>())?);
        let (mut at_table, mut count, mut chunks) = (table.address() as u64, count, chunks);
        let (mut at_sums, mut at_sum) = (sums.address() as u64, found.address() as u64);
        let mut at_odd = at_sum + size_of::<f64>() as u64;
        let mut arguments: [*mut c_void; 5] = [
            (&raw mut at_table).cast(),
            (&raw mut count).cast(),
            (&raw mut chunks).cast(),
            (&raw mut at_sums).cast(),
            (&raw mut at_odd).cast(),
        ];
        let name = format!("squares_{dtype}");
        // SAFETY: these are the kernel's arguments, and all memory lives until it is freed in stream order. Test: `tests/gpu`,
        // squares.
        unsafe {
            self.functions()
                .launch(&name, chunks, self.raw(), &mut arguments)
        }?;
        let mut arguments: [*mut c_void; 3] = [
            (&raw mut at_sums).cast(),
            (&raw mut chunks).cast(),
            (&raw mut at_sum).cast(),
        ];
        // SAFETY: as above; one block adds up what the first launch left.
        unsafe {
            self.functions()
                .launch("squares_end", 1, self.raw(), &mut arguments)
        }?;
        let mut words = [0u64; 3];
        // SAFETY: both have three words; they are waited for. As above.
        let copied = unsafe { result::memcpy_dtoh_async(&mut words, at_sum, self.raw()) };
        copied.map_err(refused(self.ordinal(), "copy a norm from the device"))?;
        self.settle()?;
        Ok(Squares {
            sum: f64::from_bits(words[0]),
            infinities: words[1],
            nans: words[2],
        })
    }
}

/// The device's address of a span.
fn address(span: Span<'_>) -> u64 {
    span.as_ptr().addr() as u64
}

fn range(span: Span<'_>) -> (u64, u64) {
    let begin = address(span);
    (begin, begin + span.bytes() as u64)
}

/// Room on the host for `len` elements.
fn room(words: &mut Vec<u64>, dtype: Dtype, len: usize) -> SpanMut<'_> {
    words.resize((len * dtype.size()).div_ceil(size_of::<u64>()), 0);
    // SAFETY: there are at least as many bytes, aligned for every dtype, borrowed for as long as the span lives. Test:
    // `tests/gpu`, bus.
    unsafe { SpanMut::from_raw(words.as_mut_ptr().cast(), dtype, len, None) }
}

/// Whether somebody has pinned this memory: then copies from it read it later.
fn is_pinned(bytes: &[u8]) -> bool {
    let mut kind = 0u32;
    let name = sys::CUpointer_attribute::CU_POINTER_ATTRIBUTE_MEMORY_TYPE;
    let into = (&raw mut kind).cast();
    // SAFETY: the driver writes one number, and only looks the address up. Test: `tests/gpu`, bus.
    let answer = unsafe { sys::cuPointerGetAttribute(into, name, bytes.as_ptr().addr() as u64) };
    answer == sys::CUresult::CUDA_SUCCESS
}

/// The bits of one element, as the host would fill it.
fn bits(dtype: Dtype, value: f64) -> Result<u64, KernelError> {
    let mut words = Vec::new();
    fill(room(&mut words, dtype, 1), value)?;
    Ok(words[0]) // little-endian: the element is in the lowest bytes, and the others are zero
}

fn formula(rule: &Rule) -> &'static str {
    match rule {
        Rule::Sgd(_) => "sgd",
        Rule::Adam(_) | Rule::AdamW(_) => "adam",
        Rule::Lion(_) => "lion",
    }
}

/// What the kernels are told of a rule in this step: each constant in f64, as the oracle computes it.
fn numbers(rule: &Rule, step: u64) -> abi::Rule {
    let none = abi::Rule::default();
    let when = |is: bool, flag: u32| if is { flag } else { 0 };
    match rule {
        Rule::Sgd(sgd) => abi::Rule {
            lr: sgd.lr,
            a: sgd.momentum,
            b: 1.0 - sgd.dampening,
            c: sgd.weight_decay,
            flags: when(sgd.maximize, abi::FLAG_MAXIMIZE)
                | when(sgd.nesterov, abi::FLAG_NESTEROV)
                | when(step == 1, abi::FLAG_FIRST)
                | when(sgd.momentum != 0.0, abi::FLAG_MOMENTUM),
            ..none
        },
        Rule::Adam(adam) | Rule::AdamW(adam) => {
            let is_decoupled = matches!(rule, Rule::AdamW(_));
            abi::Rule {
                lr: adam.lr / (1.0 - power(adam.beta1, step)),
                a: adam.beta1,
                a_rest: 1.0 - adam.beta1,
                b: adam.beta2,
                b_rest: 1.0 - adam.beta2,
                c: match is_decoupled {
                    true => 1.0 - adam.lr * adam.weight_decay,
                    false => adam.weight_decay,
                },
                d: (1.0 - power(adam.beta2, step)).sqrt(),
                e: adam.eps,
                flags: when(is_decoupled, abi::FLAG_DECOUPLED),
                ..none
            }
        }
        Rule::Lion(lion) => abi::Rule {
            lr: lion.lr,
            a: lion.beta1,
            a_rest: 1.0 - lion.beta1,
            b: lion.beta2,
            b_rest: 1.0 - lion.beta2,
            c: 1.0 - lion.lr * lion.weight_decay,
            ..none
        },
    }
}
