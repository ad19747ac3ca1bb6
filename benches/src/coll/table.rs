//! The table, column by column that of nccl-tests.

use super::{
    args::{Args, type_name},
    case::Case,
    measure::Times,
    report::{Half, Table},
};

/// Print a line; a reader who has gone away, like `head`, is no error.
macro_rules! say {
    ($($text:tt)*) => {
        if cfg!(test) {
            println!($($text)*); // which tests capture
        } else {
            use std::io::Write;
            let _ = writeln!(std::io::stdout(), $($text)*);
        }
    };
}
pub(super) use say;

/// Print what stands above a table.
pub fn head(args: &Args, table: &Table, ranks: usize) {
    let step = match args.stepfactor {
        Some(factor) => format!("{factor}(factor)"),
        None => format!("{}(bytes)", args.stepbytes),
    };
    say!("# fabric coll version {}", env!("CARGO_PKG_VERSION"));
    say!("# Collective test starting: {}", table.collective);
    say!(
        "# ranks {ranks} ({}) wire {} minBytes {} maxBytes {} step: {step} warmup iters: {} iters: {} agg iters: {} \
         validation: {} graph: 0 unalign: {}",
        if args.threads { "threads" } else { "processes" },
        table.wire,
        args.minbytes,
        args.maxbytes,
        args.warmup_iters,
        args.iters.map_or("auto".into(), |iters| iters.to_string()),
        args.agg_iters,
        args.check,
        args.unalign
    );
    say!(
        "# times: {}{}{}{}{}",
        match (args.dirty, args.blocking) {
            (true, _) =>
                "inputs rewritten and a barrier before each operation, median of the slowest rank's",
            (_, 1) => "a barrier before each operation, median of the slowest rank's",
            _ => "operations back to back",
        },
        if args.private {
            ", private buffers"
        } else {
            ""
        },
        if args.pin { ", a core a rank" } else { "" },
        match args.report_cputime {
            0 => "",
            _ => ", of processors",
        },
        args.security
            .map(|security| format!(", {} sockets", security.name()))
            .unwrap_or_default(),
    );
    if let Some(path) = &table.tuning {
        say!("# algorithms by {path}");
    }
    say!("#");
    say!("# Using devices");
    for device in &table.devices {
        say!(
            "#  Rank {:>2} Group  0 Pid {:>6} on {:>10} device {:>2} [host] {}",
            device.rank,
            device.pid,
            device.hostname,
            device.device,
            device.device_info
        );
    }
    say!("#");
    let spread = |text: &str| {
        if args.per_iter_timing {
            text.to_owned()
        } else {
            String::new()
        }
    };
    let gap = spread("                                    ");
    let beside = |limit: &str, model: &str| {
        let parts = [(args.limit, limit), (args.model, model)];
        let parts = parts.iter().filter(|(is_shown, _)| *is_shown);
        parts.map(|(_, text)| *text).collect::<String>()
    };
    if let Some(model) = table.model {
        say!(
            "# model: {} us a message, {} GB/s, folding {} GB/s",
            fit(model.alpha * 1e6, 6),
            fit(model.beta / 1e9, 6),
            fit(model.gamma / 1e9, 6)
        );
        say!("#");
    }
    say!("#{:62}out-of-place{:23}{gap}in-place{:10}", "", "", "");
    let half = format!(
        "     time   algbw   busbw  #wrong{}",
        spread("      min      p50      p99      max")
    );
    say!(
        "#       size         count      type   redop    root{half}{half}{}",
        beside("     limit   x out    x in", "     model   x out    x in")
    );
    let half = format!(
        "     (us)  (GB/s)  (GB/s)        {}",
        spread("     (us)     (us)     (us)     (us)")
    );
    say!(
        "#        (B)    (elements)                          {half}{half}{}",
        beside("      (us)                ", "      (us)                ")
    );
}

/// Print one row; `beside` are other times in seconds, the limit and the model's.
pub fn row(
    args: &Args,
    case: &Case,
    bytes: usize,
    halves: &[Option<Half>; 2],
    beside: [Option<f64>; 2],
) {
    let op = case.op.map_or("none", |op| op.name());
    let root = if case.collective.is_rooted() {
        case.place.root as i64
    } else {
        -1
    };
    let mut text = format!(
        "{bytes:>12}  {:>12}  {:>8}  {op:>6}  {root:>6}",
        case.count,
        type_name(case.dtype)
    );
    for half in halves {
        match half {
            Some(half) => {
                let wrong = half.nwrong.map_or("N/A".into(), |wrong| wrong.to_string());
                text += &format!(
                    "  {:>7}  {:>6}  {:>6}  {wrong:>6}",
                    fit(half.time, 7),
                    fit(half.alg_bw, 6),
                    fit(half.bus_bw, 6)
                );
                if args.per_iter_timing {
                    let spread = half.spread.unwrap_or_default();
                    for time in [spread.min, spread.p50, spread.p99, spread.max] {
                        text += &format!("  {:>7}", fit(time * 1e6, 7));
                    }
                }
            }
            None => {
                text += &format!("  {:>7}  {:>6}  {:>6}  {:>6}", "N/A", "N/A", "N/A", "N/A");
                if args.per_iter_timing {
                    text += &format!("{:36}", "");
                }
            }
        }
    }
    for other in beside.into_iter().flatten() {
        text += &format!("  {:>8}", fit(other * 1e6, 8));
        for half in halves {
            match half {
                Some(half) => text += &format!("  {:>6}", fit(half.time / 1e6 / other, 6)),
                None => text += &format!("  {:>6}", "N/A"),
            }
        }
    }
    say!("{text}");
}

/// Print what stands below.
pub fn foot(table: &Table) {
    let verdict = |okay| if okay { "OK" } else { "FAILED" };
    say!(
        "# Out of bounds values : {} {}",
        table.out_of_bounds.count,
        verdict(table.out_of_bounds.okay)
    );
    if table.guards > 0 {
        say!("# Bytes written outside : {} FAILED", table.guards);
    }
    say!(
        "# Avg bus bandwidth    : {:.4} ",
        table.average_bus_bandwidth.bandwidth
    );
    say!("#");
    say!("# Collective test concluded: {}", table.collective);
    say!("#");
}

/// One of the two halves of a row.
pub fn half(case: &Case, bytes: usize, times: &Times, nwrong: Option<u64>) -> Half {
    let alg_bw = if times.time > 0.0 {
        bytes as f64 / times.time / 1e9
    } else {
        0.0
    };
    Half {
        time: times.time * 1e6,
        alg_bw,
        bus_bw: alg_bw * case.collective.bus_factor(case.place.ranks),
        nwrong,
        spread: times.spread,
        iterations: times.iterations,
        pipelined: times.pipelined.map(|time| time * 1e6),
    }
}

/// With two decimals, or one, or none: as many as fit.
pub fn fit(value: f64, width: usize) -> String {
    (0..3)
        .rev()
        .map(|decimals| format!("{value:.decimals$}"))
        .find(|text| text.len() <= width)
        .unwrap_or_else(|| format!("{value:.0}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_keep_as_many_decimals_as_fit() {
        assert_eq!(fit(1.234, 7), "1.23");
        assert_eq!(fit(12345.67, 7), "12345.7");
        assert_eq!(fit(1234567.8, 7), "1234568");
    }
}
