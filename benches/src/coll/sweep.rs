//! Correctness over everything: every collective, op and type, at lengths that are awkward, in memory that is.
//!
//! The whole product is tried at few and short lengths, in both forms, in the communicator's memory and in private memory,
//! aligned and not; a few types are tried at longer ones, and two at the largest size. What was covered is printed.

use fabric_engine::{Result, comm::host::Host, kernels::Dtype};

use super::{
    args::{Args, type_name},
    case::{Case, Memory},
    cases,
    check::Wrong,
    collective::{Collective, Place},
    place,
    redop::Redop,
    stage::Stage,
    table::say,
    verdict,
};

/// Elements for every type: none, one, fewer than ranks, odd, past a page, past shared memory's small slots.
const SHORT: [usize; 6] = [0, 1, 5, 257, 4_099, 35_021];
/// Elements for some types: past windows and segments.
const LONG: [usize; 2] = [300_007, 1_048_583];
const LONG_TYPES: [Dtype; 4] = [Dtype::F32, Dtype::BF16, Dtype::I64, Dtype::U8];
/// Bytes for one op each: -e, and some in between.
const LARGEST_TYPES: [Dtype; 2] = [Dtype::F32, Dtype::BF16];

/// How a length is tried: in place, private, unaligned by so many elements, cut unevenly (where it is cut at all).
const FORMS: [(bool, bool, usize, bool); 6] = [
    (false, false, 0, false),
    (true, false, 1, false),
    (false, true, 3, false),
    (true, true, 0, false),
    (false, false, 1, true),
    (true, true, 3, true),
];

/// Check everything that `args` names, on this rank.
///
/// # Errors
/// When a rank fails, and when anything was wrong.
pub fn run(stage: &Stage, args: &Args) -> fabric::Result<()> {
    if stage.is_first() && args.ranks.first() == Some(&stage.ranks()) {
        explain(args);
    }
    let mut wrong = Wrong::default();
    for wire in &args.wire {
        let mut host = stage.connect(wire, args)?;
        for collective in args.collectives.iter() {
            for (op, dtype) in cases(args, *collective, stage.ranks()) {
                wrong += one_line(stage, &mut host, args, *collective, op, dtype)?;
            }
        }
    }
    verdict(wrong)
}

fn explain(args: &Args) {
    let names = |types: &[Dtype]| {
        types
            .iter()
            .map(|dtype| type_name(*dtype))
            .collect::<Vec<_>>()
    };
    say!("# every type: {SHORT:?} elements");
    say!("# {}: {LONG:?} elements too", names(&LONG_TYPES).join(", "));
    say!(
        "# {} (sum, or no op): up to {} bytes too",
        names(&LARGEST_TYPES).join(", "),
        args.maxbytes
    );
    say!(
        "# each: in place and out of place, in the communicator's memory and in private, aligned and 1 or 3 elements off; \
         cut evenly and not, and all roots, at the short lengths"
    );
    say!(
        "# guards of 128 bytes around each buffer, and inputs apart from outputs, must not change"
    );
    say!("#   collective      op       type   ranks    wire   sizes    runs  #wrong  outside");
}

fn one_line(
    stage: &Stage,
    host: &mut Host,
    args: &Args,
    collective: Collective,
    op: Option<Redop>,
    dtype: Dtype,
) -> Result<Wrong> {
    let (mut wrong, mut sizes, mut runs) = (Wrong::default(), 0, 0);
    for (elements, is_short) in lengths(args, collective, op, dtype, stage.ranks()) {
        sizes += 1;
        // All roots at short lengths only, and each form once.
        let roots = match collective.is_rooted() && is_short {
            true => 0..stage.ranks(),
            false => 0..1,
        };
        let count = match collective {
            Collective::AllReduce | Collective::Broadcast | Collective::Reduce => elements,
            Collective::SendRecv => elements,
            _ => elements.div_ceil(stage.ranks()),
        };
        for root in roots {
            for (number, (is_in_place, is_private, unalign, is_uneven)) in
                FORMS.into_iter().enumerate()
            {
                let place = Place {
                    is_uneven,
                    ..place(stage, args, root)
                };
                let case = Case {
                    collective,
                    op,
                    dtype,
                    count,
                    place,
                    is_in_place,
                };
                let cut = collective.is_cut() || !is_uneven;
                if case.exists() && cut && (is_short || number < 2) {
                    let memory = Memory {
                        is_private,
                        unalign,
                    };
                    wrong += once(host, &case, memory, 1 + sizes + number as u32)?;
                    runs += 1;
                }
            }
        }
    }
    let everywhere = stage.sum(&[wrong.elements as f64, wrong.outside as f64])?;
    let wrong = Wrong {
        elements: everywhere[0] as u64,
        outside: everywhere[1] as u64,
    };
    if stage.is_first() {
        say!(
            "{:>14}  {:>6}  {:>9}  {:>6}  {:>6}  {sizes:>6}  {runs:>6}  {:>6}  {:>7}",
            collective.name(),
            op.map_or("none", Redop::name),
            type_name(dtype),
            stage.ranks(),
            host.wire(),
            wrong.elements,
            wrong.outside
        );
    }
    Ok(wrong)
}

/// The lengths for a type, in elements of the full vector, and whether they are of the short ones.
fn lengths(
    args: &Args,
    collective: Collective,
    op: Option<Redop>,
    dtype: Dtype,
    ranks: usize,
) -> Vec<(usize, bool)> {
    if collective == Collective::Barrier {
        return vec![(0, true)];
    }
    let fits = |elements: &usize| elements * dtype.size() <= args.maxbytes;
    let mut lengths: Vec<_> = SHORT.into_iter().map(|elements| (elements, true)).collect();
    if LONG_TYPES.contains(&dtype) {
        lengths.extend(LONG.into_iter().map(|elements| (elements, false)));
    }
    if LARGEST_TYPES.contains(&dtype) && op.is_none_or(|op| op == Redop::Sum) {
        let largest = args.maxbytes / dtype.size() / ranks * ranks;
        lengths.extend([largest / 16, largest].map(|elements| (elements, false)));
    }
    lengths.retain(|(elements, _)| fits(elements));
    lengths
}

fn once(host: &mut Host, case: &Case, memory: Memory, seed: u32) -> Result<Wrong> {
    let mut buffers = case.buffers(host, memory)?;
    buffers.fill(case, seed);
    buffers.run(host)?;
    Ok(buffers.check(case, seed))
}
