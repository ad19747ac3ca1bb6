//! Every verb on a device against the same verb on the host, which its own tests hold to the oracle: bit for bit, over
//! lengths around a chunk and at places that are aligned to nothing but an element.

use std::{error::Error, sync::Arc};

use fabric_engine::buffer::Slab;
use fabric_kernels::{
    self as kernels, Adam, Dtype, Fold, KernelError, Lion, Rule, Sgd, SquareBins, cuda::Queue,
};

use crate::operands::{difference, down, on, typed, up, wild};

const FLOATS: [Dtype; 6] = [
    Dtype::F64,
    Dtype::F32,
    Dtype::F16,
    Dtype::BF16,
    Dtype::F8E4M3,
    Dtype::F8E5M2,
];
const PARAMS: [Dtype; 4] = [Dtype::F64, Dtype::F32, Dtype::F16, Dtype::BF16];
/// Length, and how many elements the source and the target are moved.
const PLACES: [(usize, usize, usize); 7] = [
    (1, 0, 0),
    (257, 1, 0),
    (8192, 0, 0),
    (8191, 3, 3),
    (8193, 1, 2),
    (20_000, 7, 5),
    (100_003, 2, 1),
];

/// One place in both memories.
struct Case {
    len: usize,
    from: usize,
    into: usize,
}

impl Case {
    fn all() -> impl Iterator<Item = Self> {
        PLACES
            .into_iter()
            .map(|(len, from, into)| Self { len, from, into })
    }
}

/// Counts what was compared, and what was wrong.
#[derive(Default)]
struct Tally {
    compared: usize,
    wrong: Vec<String>,
}

impl Tally {
    fn compare(&mut self, what: &str, device: &Slab, host: &Slab) -> Result<(), KernelError> {
        self.compared += 1;
        if let Some(where_) = difference(&down(device)?, host)? {
            self.wrong.push(format!("{what}: {where_}"));
        }
        Ok(())
    }

    fn report(&mut self, name: &str) {
        println!(
            "  {name:<34} {:>6} compared, {:>3} wrong",
            self.compared,
            self.wrong.len()
        );
        for text in self.wrong.iter().take(5) {
            println!("      {text}");
        }
    }
}

pub fn check() -> Result<(), Box<dyn Error>> {
    let queue = Queue::open(0)?;
    println!("kernels against the host, bit for bit");
    let mut wrong = 0;
    for (name, run) in [
        (
            "casts and factors, 36 pairs",
            casts as fn(&Arc<Queue>, &mut Tally) -> _,
        ),
        ("folds, 36 pairs, 4 operations", folds),
        ("fill, clamp, scale", in_place),
        ("rounding by chance", chance),
        ("f8 with scaled blocks", blocks),
        ("sums of squares", squares),
        ("sgd, adam, adamw, lion", updates),
    ] {
        let mut tally = Tally::default();
        run(&queue, &mut tally)?;
        tally.report(name);
        wrong += tally.wrong.len();
    }
    match wrong {
        0 => Ok(()),
        wrong => Err(format!("{wrong} results differ from the host's").into()),
    }
}

fn casts(queue: &Arc<Queue>, tally: &mut Tally) -> Result<(), KernelError> {
    for (from, into) in pairs() {
        for Case {
            len,
            from: skip,
            into: place,
        } in Case::all()
        {
            let source = typed(&wild(len + skip, 1), from)?;
            let there = up(queue, &source)?;
            for factor in [1.0, 0.37] {
                let mut host = Slab::zeroed(into, len + place);
                let mut device = on(queue, into, len + place)?;
                let (part, target) = (skip..skip + len, place..place + len);
                kernels::cast_scaled(
                    source.part(part.clone()),
                    host.part_mut(target.clone()),
                    factor,
                )?;
                kernels::cast_scaled(there.part(part), device.part_mut(target), factor)?;
                tally.compare(
                    &format!("{from} to {into} times {factor}, {len}"),
                    &device,
                    &host,
                )?;
            }
        }
    }
    Ok(())
}

fn pairs() -> impl Iterator<Item = (Dtype, Dtype)> {
    FLOATS
        .into_iter()
        .flat_map(|from| FLOATS.into_iter().map(move |into| (from, into)))
}

fn folds(queue: &Arc<Queue>, tally: &mut Tally) -> Result<(), KernelError> {
    for (from, into) in pairs() {
        for Case {
            len,
            from: skip,
            into: place,
        } in Case::all()
        {
            for op in [Fold::Sum, Fold::Prod, Fold::Min, Fold::Max] {
                let with = typed(&wild(len + skip, 2), from)?;
                let mut host = typed(&wild(len + place, 3), into)?;
                let (with_there, mut device) = (up(queue, &with)?, up(queue, &host)?);
                let (part, target) = (skip..skip + len, place..place + len);
                kernels::fold(op, host.part_mut(target.clone()), with.part(part.clone()))?;
                kernels::fold(op, device.part_mut(target), with_there.part(part))?;
                tally.compare(&format!("{op} {from} into {into}, {len}"), &device, &host)?;
            }
        }
    }
    Ok(())
}

fn in_place(queue: &Arc<Queue>, tally: &mut Tally) -> Result<(), KernelError> {
    for dtype in FLOATS {
        for Case {
            len, into: place, ..
        } in Case::all()
        {
            let mut host = typed(&wild(len + place, 4), dtype)?;
            let mut device = up(queue, &host)?;
            let all = place..place + len;
            kernels::scale(host.part_mut(all.clone()), 0.7)?;
            kernels::scale(device.part_mut(all.clone()), 0.7)?;
            tally.compare(&format!("scale {dtype}, {len}"), &device, &host)?;
            kernels::clamp(host.part_mut(all.clone()), 0.5)?;
            kernels::clamp(device.part_mut(all.clone()), 0.5)?;
            tally.compare(&format!("clamp {dtype}, {len}"), &device, &host)?;
            kernels::fill(host.part_mut(all.clone()), -1.25)?;
            kernels::fill(device.part_mut(all), -1.25)?;
            tally.compare(&format!("fill {dtype}, {len}"), &device, &host)?;
        }
    }
    Ok(())
}

fn chance(queue: &Arc<Queue>, tally: &mut Tally) -> Result<(), KernelError> {
    let small = [Dtype::F16, Dtype::BF16, Dtype::F8E4M3, Dtype::F8E5M2];
    let pairs = [Dtype::F32, Dtype::F16, Dtype::BF16].into_iter();
    let pairs = pairs.flat_map(|from| small.into_iter().map(move |into| (from, into)));
    let narrows =
        |(from, into): &(Dtype, Dtype)| from != into && (*from, *into) != (Dtype::BF16, Dtype::F16);
    for (from, into) in pairs.filter(narrows) {
        for Case {
            len,
            from: skip,
            into: place,
        } in Case::all()
        {
            let source = typed(&wild(len + skip, 5), from)?;
            let (there, mut host) = (up(queue, &source)?, Slab::zeroed(into, len + place));
            let mut device = on(queue, into, len + place)?;
            let (part, target) = (skip..skip + len, place..place + len);
            let pair = (source.part(part.clone()), host.part_mut(target.clone()));
            kernels::cast_stochastic(vec![pair], 0.9, 77)?;
            let pair = (there.part(part), device.part_mut(target));
            kernels::cast_stochastic(vec![pair], 0.9, 77)?;
            tally.compare(
                &format!("{from} to {into} by chance, {len}"),
                &device,
                &host,
            )?;
        }
    }
    Ok(())
}

fn blocks(queue: &Arc<Queue>, tally: &mut Tally) -> Result<(), KernelError> {
    for small in [Dtype::F8E4M3, Dtype::F8E5M2] {
        for wide in [Dtype::F32, Dtype::F16, Dtype::BF16] {
            for Case {
                len,
                from: skip,
                into: place,
            } in Case::all()
            {
                let blocks = 0..len.div_ceil(128);
                let source = typed(&wild(len + skip, 6), wide)?;
                let there = up(queue, &source)?;
                let (part, target) = (skip..skip + len, place..place + len);
                let mut host = Slab::zeroed(small, len + place);
                let mut scales = Slab::zeroed(Dtype::F32, blocks.end);
                kernels::quantize(
                    source.part(part.clone()),
                    host.part_mut(target.clone()),
                    scales.part_mut(blocks.clone()),
                )?;
                let mut device = on(queue, small, len + place)?;
                let mut device_scales = on(queue, Dtype::F32, blocks.end)?;
                kernels::quantize(
                    there.part(part),
                    device.part_mut(target.clone()),
                    device_scales.part_mut(blocks.clone()),
                )?;
                tally.compare(
                    &format!("quantize {wide} to {small}, {len}"),
                    &device,
                    &host,
                )?;
                tally.compare(
                    &format!("scales of {wide} to {small}, {len}"),
                    &device_scales,
                    &scales,
                )?;
                let (mut back, mut device_back) = (Slab::zeroed(wide, len), on(queue, wide, len)?);
                kernels::dequantize(
                    host.part(target.clone()),
                    scales.part(blocks.clone()),
                    back.part_mut(0..len),
                )?;
                kernels::dequantize(
                    device.part(target),
                    device_scales.part(blocks),
                    device_back.part_mut(0..len),
                )?;
                tally.compare(
                    &format!("dequantize {small} to {wide}, {len}"),
                    &device_back,
                    &back,
                )?;
            }
        }
    }
    Ok(())
}

/// Sums of whole numbers, which no order rounds; then that infinities and NaN are counted.
fn squares(queue: &Arc<Queue>, tally: &mut Tally) -> Result<(), KernelError> {
    for dtype in FLOATS {
        for Case {
            len, from: skip, ..
        } in Case::all()
        {
            let mut values: Vec<f32> = (0..len + skip)
                .map(|index| (index % 5) as f32 - 2.0)
                .collect();
            let (finite, _) = (typed(&values, dtype)?, ());
            values[skip] = f32::NAN;
            let odd = typed(&values, dtype)?;
            for slab in [finite, odd] {
                let (mut host, mut device) = (SquareBins::new(), SquareBins::new());
                host.add(slab.part(skip..skip + len))?;
                device.add(up(queue, &slab)?.part(skip..skip + len))?;
                tally.compared += 1;
                if host != device {
                    tally.wrong.push(format!(
                        "{dtype}, {len}: {device:?}, and {host:?} on the host"
                    ));
                }
            }
        }
    }
    Ok(())
}

fn updates(queue: &Arc<Queue>, tally: &mut Tally) -> Result<(), KernelError> {
    let adam = Adam {
        lr: 1e-2,
        beta1: 0.9,
        beta2: 0.99,
        eps: 1e-8,
        weight_decay: 0.1,
    };
    let sgd = Sgd {
        lr: 0.1,
        momentum: 0.9,
        dampening: 0.1,
        weight_decay: 0.01,
        nesterov: false,
        maximize: false,
    };
    let rules = [
        Rule::AdamW(adam),
        Rule::Adam(adam),
        Rule::Sgd(sgd),
        Rule::Sgd(Sgd {
            dampening: 0.0,
            nesterov: true,
            maximize: true,
            ..sgd
        }),
        Rule::Sgd(Sgd {
            momentum: 0.0,
            ..sgd
        }),
        Rule::Lion(Lion {
            lr: 1e-3,
            beta1: 0.9,
            beta2: 0.99,
            weight_decay: 0.1,
        }),
    ];
    for rule in rules {
        for param in PARAMS {
            for grad in FLOATS {
                for Case {
                    len, into: place, ..
                } in Case::all()
                {
                    update(queue, tally, &rule, param, grad, len, place)?;
                }
            }
        }
    }
    Ok(())
}

fn update(
    queue: &Arc<Queue>,
    tally: &mut Tally,
    rule: &Rule,
    param: Dtype,
    grad: Dtype,
    len: usize,
    place: usize,
) -> Result<(), KernelError> {
    let all = place..place + len;
    let state = param.accumulator();
    let count = rule.states().len();
    let mut host = typed(&wild(len + place, 7), param)?;
    let mut device = up(queue, &host)?;
    let mut states: Vec<Slab> = (0..count)
        .map(|_| Slab::zeroed(state, len + place))
        .collect();
    let mut device_states = states
        .iter()
        .map(|state| up(queue, state))
        .collect::<Result<Vec<_>, _>>()?;
    let mut copy = Slab::zeroed(Dtype::BF16, len + place);
    let mut device_copy = on(queue, Dtype::BF16, len + place)?;
    for step in 1..=2 {
        let grads = typed(&wild(len + place, 8 + step), grad)?;
        let there = up(queue, &grads)?;
        let mut spans: Vec<_> = states
            .iter_mut()
            .map(|state| state.part_mut(all.clone()))
            .collect();
        let target = Some(copy.part_mut(all.clone()));
        kernels::update(
            rule,
            step,
            0.5,
            host.part_mut(all.clone()),
            grads.part(all.clone()),
            &mut spans,
            target,
        )?;
        let mut spans: Vec<_> = device_states
            .iter_mut()
            .map(|state| state.part_mut(all.clone()))
            .collect();
        let target = Some(device_copy.part_mut(all.clone()));
        kernels::update(
            rule,
            step,
            0.5,
            device.part_mut(all.clone()),
            there.part(all.clone()),
            &mut spans,
            target,
        )?;
    }
    let what = format!("{} of {param} by {grad}, {len}", rule.name());
    tally.compare(&what, &device, &host)?;
    tally.compare(&format!("{what}: copy"), &device_copy, &copy)?;
    for (ours, theirs) in device_states.iter().zip(&states) {
        tally.compare(&format!("{what}: state"), ours, theirs)?;
    }
    Ok(())
}
