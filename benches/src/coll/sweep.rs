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
/// Up to -e bytes with one op each: a 16th of it, and for the first type all of it.
const LARGE_TYPES: [Dtype; 2] = [Dtype::F32, Dtype::BF16];

/// How long a vector is, and how much is tried with it.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Length {
    /// All forms and roots.
    Short,
    /// In place and out of place.
    Long,
    /// One of the two: which, changes with the number of ranks.
    Largest,
}

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
    stage.all(&[])?; // the first failure ends all ranks, and this one may still be printing
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
        "# {} (sum, or no op): {} bytes too, and {}: {} bytes",
        names(&LARGE_TYPES).join(", "),
        args.maxbytes / 16,
        type_name(LARGE_TYPES[0]),
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
    for (elements, length) in lengths(args, collective, op, dtype, stage.ranks()) {
        sizes += 1;
        // All roots at short lengths only, and each form once.
        let roots = match collective.is_rooted() && length == Length::Short {
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
                let wanted = match length {
                    Length::Short => collective.is_cut() || !is_uneven,
                    Length::Long => number < 2,
                    Length::Largest => number == usize::from(form_of_largest(collective, stage)),
                };
                if case.exists() && wanted {
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

/// Whether the largest length is tried in place.
fn form_of_largest(collective: Collective, stage: &Stage) -> bool {
    let in_place = collective.layout(0, place_of_first(stage)).in_place;
    in_place.is_some() && stage.ranks().is_multiple_of(2)
}

fn place_of_first(stage: &Stage) -> Place {
    Place {
        rank: 0,
        ranks: stage.ranks(),
        root: 0,
        is_uneven: false,
    }
}

/// The lengths for a type, in elements of the full vector.
fn lengths(
    args: &Args,
    collective: Collective,
    op: Option<Redop>,
    dtype: Dtype,
    ranks: usize,
) -> Vec<(usize, Length)> {
    if collective == Collective::Barrier {
        return vec![(0, Length::Short)];
    }
    let mut lengths = SHORT.map(|elements| (elements, Length::Short)).to_vec();
    if LONG_TYPES.contains(&dtype) {
        lengths.extend(LONG.map(|elements| (elements, Length::Long)));
    }
    if LARGE_TYPES.contains(&dtype) && op.is_none_or(|op| op == Redop::Sum) {
        let most = args.maxbytes / dtype.size() / ranks * ranks;
        lengths.push((most / 16, Length::Long));
        if dtype == LARGE_TYPES[0] {
            lengths.push((most, Length::Largest));
        }
    }
    lengths.retain(|(elements, _)| elements * dtype.size() <= args.maxbytes);
    lengths
}

fn once(host: &mut Host, case: &Case, memory: Memory, seed: u32) -> Result<Wrong> {
    let mut buffers = case.buffers(host, memory)?;
    buffers.fill(case, seed);
    buffers.run(host)?;
    Ok(buffers.check(case, seed))
}
