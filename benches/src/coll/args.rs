//! The command line: nccl-tests' flags, except that `-n` is the number of ranks.

use std::path::PathBuf;

use clap::{Parser, builder::ArgPredicate};
use fabric_engine::{comm::host::Security, kernels::Dtype};

use super::{collective::Collective, redop::Redop};

const EXAMPLES: &str = "\
Examples:
  coll all_reduce -n 2 -b 1K -e 256M -f 4
      the table of nccl-tests, two processes, shared memory
  coll all_reduce -n 2,4 --wire shm -b 1K -e 64M -f 4 -z 1 -I --limit -J out.json --plot out.svg
      isolated latencies with percentiles, beside the limit; JSON and a plot
  coll all -n 1-8 --wire shm,tcp -o all -d all --sweep -e 256M
      correctness only: every collective, op and dtype, odd lengths, unaligned, guards checked

Ranks are processes of this machine (--threads: threads). Under a launcher such as torchrun the ranks that it has started are
used. The exit status is 0 only when nothing was wrong.";

/// Collectives: how long they take, and whether what they deliver is right, with the conventions of nccl-tests.
#[derive(Parser, Clone, Debug)]
#[command(name = "coll", after_help = EXAMPLES)]
pub struct Args {
    /// all_reduce, all_gather, reduce_scatter, broadcast, reduce, alltoall, alltoallv, sendrecv, gather, scatter, barrier; or
    /// all, or several with commas.
    #[arg(value_parser = Collective::parse_list, required = false, required_unless_present = "tune", default_value_if("tune", ArgPredicate::IsPresent, Some("all")))]
    pub collectives: Collectives,
    /// Ranks (nccl-tests: -t x -g): a number, a range, or a list, like 2, 1-8, 2,4. One table for each.
    #[arg(short = 'n', long, default_value = "2", value_parser = parse_ranks)]
    #[arg(default_value_if("tune", ArgPredicate::IsPresent, Some(tuned_ranks())))]
    pub ranks: Ranks,
    /// shm, tcp, unix, or best; a list for one table each.
    #[arg(long, default_value = "best", value_delimiter = ',')]
    #[arg(default_values_if("tune", ArgPredicate::IsPresent, ["shm", "unix", "tcp"]))]
    pub wire: Vec<String>,
    /// What is done for what travels over sockets: plain, authenticated, encrypted. Unless given, what the engine does:
    /// nothing on one machine, encryption between machines.
    #[arg(long, value_parser = parse_security)]
    pub security: Option<Security>,
    /// Smallest size in bytes; K, M and G are binary.
    #[arg(short = 'b', long, default_value = "32M", value_parser = parse_bytes)]
    #[arg(default_value_if("tune", ArgPredicate::IsPresent, Some("256")))]
    pub minbytes: usize,
    /// Largest size.
    #[arg(short = 'e', long, default_value = "32M", value_parser = parse_bytes)]
    #[arg(default_value_if("tune", ArgPredicate::IsPresent, Some("4M")))]
    pub maxbytes: usize,
    /// From one size to the next: this many bytes more, unless a factor is given.
    #[arg(short = 'i', long, default_value = "1M", value_parser = parse_bytes)]
    pub stepbytes: usize,
    /// From one size to the next: this factor.
    #[arg(
        short = 'f',
        long,
        default_value_if("tune", ArgPredicate::IsPresent, Some("4"))
    )]
    pub stepfactor: Option<usize>,
    /// Iterations that are timed (nccl-tests: -n). Unless given, 20, or as many as fill 20 ms.
    #[arg(long)]
    pub iters: Option<usize>,
    /// Iterations before.
    #[arg(short = 'w', long, default_value_t = 1)]
    pub warmup_iters: usize,
    /// Operations in flight at once in an iteration, each on memory of its own.
    #[arg(short = 'm', long, default_value_t = 1)]
    pub agg_iters: usize,
    /// How often everything runs; 0 is for ever.
    #[arg(short = 'N', long, default_value_t = 1)]
    pub run_cycles: usize,
    /// How often each row's result is checked, on inputs of their own; 0 is never.
    #[arg(short = 'c', long, default_value_t = 1)]
    pub check: usize,
    /// sum, prod, min, max, avg, mulsum, band, bor, bxor; or all, or several with commas.
    #[arg(short = 'o', long, default_value = "sum", value_parser = parse_ops)]
    pub op: Ops,
    /// int8, uint8, int16, ..., uint64, half, bfloat16, float, double, f8e4m3, f8e5m2, bool, or our names (i8, f32, ...); or
    /// all, or several with commas.
    #[arg(short = 'd', long, default_value = "float", value_parser = parse_dtypes)]
    pub datatype: Dtypes,
    /// The root's rank, or all.
    #[arg(short = 'r', long, default_value = "0", value_parser = parse_root)]
    pub root: Root,
    /// 0: operations back to back, the time is the loop's over its iterations. 1: a barrier before each, not timed, and the
    /// time is the median of the slowest rank's.
    #[arg(short = 'z', long, default_value_t = 0, value_parser = clap::value_parser!(u8).range(0..=1))]
    pub blocking: u8,
    /// Fail when an operation takes longer, in seconds.
    #[arg(short = 'T', long)]
    pub timeout: Option<f64>,
    /// Whose time: 0 rank 0's, 1 the ranks' mean, 2 the smallest, 3 the largest. Times with a barrier (-z 1, --dirty, -I) are
    /// always the slowest rank's.
    #[arg(short = 'a', long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(0..=3))]
    pub average: u8,
    /// 1: show what a rank's process (--threads: all ranks together) spends of processors' time, rather than how long it takes.
    #[arg(short = 'C', long, default_value_t = 0, value_parser = clap::value_parser!(u8).range(0..=1))]
    pub report_cputime: u8,
    /// Write JSON here (--tune: the table).
    #[arg(short = 'J', long)]
    pub output_file: Option<PathBuf>,
    /// Time every iteration by itself, and show the smallest, p50, p99 and the largest.
    #[arg(short = 'I', long)]
    pub per_iter_timing: bool,
    /// Begin buffers so many elements after an aligned address.
    #[arg(short = 'u', long, default_value_t = 0)]
    pub unalign: usize,
    /// Cut vectors into slices of 0, 1 or 2 times the count: all_gather, reduce_scatter, gather and scatter.
    #[arg(long)]
    pub uneven: bool,
    /// Rewrite the input before each iteration, and then a barrier, neither timed, because inputs that never change stay in
    /// peers' caches. Up to 64 KiB batches of all three are timed, and batches without the operation subtracted; above
    /// that, each operation by itself. JSON has, up to 64 KiB, the time without barriers too ("pipelined").
    #[arg(long)]
    pub dirty: bool,
    /// Each iteration on other memory of the largest size's, as nccl-tests does.
    #[arg(long, conflicts_with = "dirty")]
    pub rotate: bool,
    /// Iterations by time: about so many seconds a row, instead of --iters.
    #[arg(long)]
    pub budget: Option<f64>,
    /// Buffers outside the communicator's own memory.
    #[arg(long)]
    pub private: bool,
    /// Ranks are threads of one process.
    #[arg(long)]
    pub threads: bool,
    /// Rank r runs on core r (modulo their number).
    #[arg(long)]
    pub pin: bool,
    /// Show the limit beside: plain copies, made by all ranks at once, of as many bytes as the collective must move.
    #[arg(long)]
    pub limit: bool,
    /// Show the model beside: messages, bytes and folded bytes by the price of the schedule, times what each takes, measured
    /// at the beginning of a table's wire.
    #[arg(long)]
    pub model: bool,
    /// Which rows: both, out (of place), in (place).
    #[arg(long, default_value = "both", value_parser = ["both", "out", "in"])]
    pub place: String,
    /// Check only, no times: sizes 0, one element, odd lengths, unaligned buffers, and up to -e; one line for each
    /// collective, op, dtype, number of ranks and wire.
    #[arg(long)]
    pub sweep: bool,
    /// Time every algorithm of these wires (unless given: shm, unix, tcp), numbers of ranks (2, and 4 where there are as many
    /// cores), collectives (all) and sizes (256 to 4M, factor 4), and write the table by which communicators of this machine
    /// choose, or to -J's path.
    #[arg(long, conflicts_with_all = ["sweep", "plot", "limit"])]
    pub tune: bool,
    /// Draw bus bandwidth over size into this SVG.
    #[arg(long)]
    pub plot: Option<PathBuf>,
}

/// Which collectives.
pub type Collectives = std::sync::Arc<[Collective]>;
/// How many ranks, for each table.
pub type Ranks = std::sync::Arc<[usize]>;
/// Which reductions.
pub type Ops = std::sync::Arc<[Redop]>;
/// Which types.
pub type Dtypes = std::sync::Arc<[Dtype]>;

/// Who the root is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Root {
    /// This rank.
    Rank(usize),
    /// Each in turn.
    All,
}

impl Args {
    /// The sizes of the table.
    pub fn sizes(&self) -> Vec<usize> {
        let next = |bytes: &usize| match self.stepfactor {
            Some(factor) => bytes.checked_mul(factor.max(2)).map(|next| next.max(1)),
            None => bytes.checked_add(self.stepbytes.max(1)),
        };
        std::iter::successors(Some(self.minbytes), next)
            .take_while(|bytes| *bytes <= self.maxbytes)
            .collect()
    }

    /// The roots in a world of `ranks`.
    pub fn roots(&self, ranks: usize) -> Vec<usize> {
        match self.root {
            Root::Rank(rank) => vec![rank.min(ranks - 1)],
            Root::All => (0..ranks).collect(),
        }
    }
}

/// nccl-tests' name of a type, as its tables show it.
pub fn type_name(dtype: Dtype) -> &'static str {
    match dtype {
        Dtype::F64 => "double",
        Dtype::F32 => "float",
        Dtype::F16 => "half",
        Dtype::BF16 => "bfloat16",
        Dtype::I8 => "int8",
        Dtype::I16 => "int16",
        Dtype::I32 => "int32",
        Dtype::I64 => "int64",
        Dtype::U8 => "uint8",
        Dtype::U16 => "uint16",
        Dtype::U32 => "uint32",
        Dtype::U64 => "uint64",
        other => other.name(),
    }
}

/// How many ranks `--tune` takes on this machine.
fn tuned_ranks() -> &'static str {
    match std::thread::available_parallelism().map_or(1, usize::from) {
        ..4 => "2",
        _ => "2,4",
    }
}

fn parse_bytes(text: &str) -> Result<usize, String> {
    let (number, unit) = match text.trim_end_matches(['B', 'b']) {
        text if text.ends_with(['k', 'K']) => (&text[..text.len() - 1], 1 << 10),
        text if text.ends_with(['m', 'M']) => (&text[..text.len() - 1], 1 << 20),
        text if text.ends_with(['g', 'G']) => (&text[..text.len() - 1], 1 << 30),
        text => (text, 1usize),
    };
    number
        .parse::<usize>()
        .ok()
        .and_then(|number| number.checked_mul(unit))
        .ok_or_else(|| format!("'{text}' is no size like 512, 1K or 256M"))
}

fn parse_ranks(text: &str) -> Result<Ranks, String> {
    let refusal = || format!("'{text}' is no number of ranks like 2, 1-8 or 2,4");
    let number = |text: &str| (text.parse().ok()).filter(|ranks| (1..=64).contains(ranks));
    let mut ranks = Vec::new();
    for part in text.split(',') {
        let (low, high) = part.split_once('-').unwrap_or((part, part));
        let low: usize = number(low).ok_or_else(refusal)?;
        let high: usize = number(high).ok_or_else(refusal)?;
        ranks.extend(low..=high);
    }
    if ranks.is_empty() {
        return Err(refusal());
    }
    Ok(ranks.into())
}

fn parse_ops(text: &str) -> Result<Ops, String> {
    let find = |name: &str| Redop::ALL.into_iter().find(|op| op.name() == name);
    list(text, &Redop::ALL, find, || {
        Redop::ALL.map(Redop::name).join(", ")
    })
}

fn parse_dtypes(text: &str) -> Result<Dtypes, String> {
    let is = |name: &str, dtype: Dtype| type_name(dtype) == name || dtype.name() == name;
    let find = |name: &str| Dtype::ALL.into_iter().find(|dtype| is(name, *dtype));
    list(text, &Dtype::ALL, find, || {
        Dtype::ALL.map(type_name).join(", ")
    })
}

/// Names with commas, or "all".
pub(super) fn list<T: Copy>(
    text: &str,
    all: &[T],
    find: impl Fn(&str) -> Option<T>,
    names: impl Fn() -> String,
) -> Result<std::sync::Arc<[T]>, String> {
    if text == "all" {
        return Ok(all.into());
    }
    let refuse = |name: &str| format!("'{name}' is not known; choose among {}, all", names());
    text.split(',')
        .map(|name| find(name).ok_or_else(|| refuse(name)))
        .collect()
}

fn parse_security(text: &str) -> Result<Security, String> {
    let names = Security::ALL.map(Security::name).join(", ");
    Security::from_name(text)
        .ok_or_else(|| format!("'{text}' is no security; choose among {names}"))
}

fn parse_root(text: &str) -> Result<Root, String> {
    match text {
        "all" => Ok(Root::All),
        _ => (text.parse().map(Root::Rank)).map_err(|_| format!("'{text}' is no rank, nor all")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(line: &str) -> Result<Args, String> {
        let words = std::iter::once("coll").chain(line.split_whitespace());
        Args::try_parse_from(words).map_err(|error| error.to_string())
    }

    #[test]
    fn the_issues_command_is_understood() {
        let args = args("all_reduce -n 2 --wire shm -b 1K -e 256M -f 4 -c 1 -J out.json").unwrap();
        assert_eq!(*args.collectives, [Collective::AllReduce]);
        assert_eq!((&*args.ranks, &*args.wire[0]), (&[2][..], "shm"));
        assert_eq!(args.sizes().len(), 10);
        assert_eq!(args.sizes()[9], 256 << 20);
    }

    #[test]
    fn lists_ranges_and_all_are_understood() {
        let args = args("all -n 1-3,8 -o all -d float,u8,bf16 -r all -b 0 -e 4 -i 2").unwrap();
        assert_eq!(*args.ranks, [1, 2, 3, 8]);
        assert_eq!(args.op.len(), Redop::ALL.len());
        assert_eq!(*args.datatype, [Dtype::F32, Dtype::U8, Dtype::BF16]);
        assert_eq!(args.roots(3), [0, 1, 2]);
        assert_eq!(args.sizes(), [0, 2, 4]);
        assert_eq!(args.collectives.len(), Collective::ALL.len());
    }

    #[test]
    fn tuning_has_defaults_of_its_own() {
        let tuned = args("--tune").unwrap();
        assert_eq!(tuned.wire, ["shm", "unix", "tcp"]);
        assert_eq!((tuned.sizes().len(), tuned.sizes()[7]), (8, 4 << 20));
        assert_eq!(tuned.collectives.len(), Collective::ALL.len());
        let some = args("all_reduce --tune --wire tcp -n 3 -e 1M").unwrap();
        assert_eq!((&*some.wire[0], &*some.ranks), ("tcp", &[3][..]));
        assert!(args("").is_err());
        assert_eq!(args("all_reduce").unwrap().wire, ["best"]);
    }

    #[test]
    fn refusals_say_what_is_known() {
        assert!(args("all_reduced").unwrap_err().contains("all_reduce,"));
        assert!(
            args("all_reduce -d float16x")
                .unwrap_err()
                .contains("bfloat16")
        );
        assert!(args("all_reduce -n 0").unwrap_err().contains("1-8"));
        assert!(args("all_reduce -b 1X").unwrap_err().contains("256M"));
    }
}
