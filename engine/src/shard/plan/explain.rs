//! The plan in words and numbers, for people, before anything runs.

use std::fmt::Write;

use super::{Accumulate, Forecast, Plan};
use crate::comm::{Link, Spent};

/// Bytes as people read them, in powers of 1000.
pub fn bytes_text(bytes: f64) -> String {
    const UNITS: [&str; 7] = ["B", "kB", "MB", "GB", "TB", "PB", "EB"];
    let mut scaled = bytes;
    for unit in UNITS {
        if scaled.abs() < 999.5 || unit == "EB" {
            return match (unit, scaled < 9.995) {
                ("B", _) => format!("{scaled:.0} B"),
                (_, true) => format!("{scaled:.2} {unit}"),
                (_, false) => format!("{scaled:.1} {unit}"),
            };
        }
        scaled /= 1000.0;
    }
    unreachable!("the last unit takes everything")
}

/// A count with its thousands apart.
pub fn count_text(count: usize) -> String {
    let digits = count.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// A duration as people read it.
pub fn time_text(seconds: f64) -> String {
    match seconds {
        short if short < 0.9995e-3 => format!("{:.1} us", short * 1e6),
        short if short < 0.9995 => format!("{:.2} ms", short * 1e3),
        long => format!("{long:.2} s"),
    }
}

/// "1 rank", "2 ranks".
pub fn several(count: usize, one: &str) -> String {
    let ending = if count == 1 { "" } else { "s" };
    format!("{} {one}{ending}", count_text(count))
}

impl Plan {
    /// What will happen and what it costs: units, bytes a rank, collectives and bytes a step, types, the divisor, and the
    /// time that no computation can hide, if `link` tells what the wire is like. `states`: the vectors that the optimizer
    /// keeps beside each parameter.
    pub fn explain(&self, forecast: &Forecast, states: usize, link: Option<Link>) -> String {
        let mut text = String::new();
        self.explain_shape(&mut text);
        self.explain_memory(&mut text, states);
        self.explain_wire(&mut text, forecast, link);
        self.explain_accumulation(&mut text, forecast);
        self.explain_ties(&mut text);
        text
    }

    fn explain_shape(&self, text: &mut String) {
        let (row, mesh) = (self.row().name, self.mesh());
        line(text, format!("{row} on {}", several(mesh.world(), "rank")));
        if mesh.replicas > 1 && mesh.shards > 1 {
            let (replicas, ranks) = (several(mesh.replicas, "replica"), mesh.shards);
            line(
                text,
                format!("  {replicas}, each in the slices of {ranks} ranks"),
            );
            if !mesh.shards.is_power_of_two() {
                line(
                    text,
                    "  groups of no power of two: sums differ from those of one flat group in the last bits".into(),
                );
            }
        }
        let numels = self.params().iter().map(|param| param.numel());
        let numel = numels.sum::<usize>();
        let frozen = self.params().iter().filter(|param| !param.trainable);
        let frozen = match frozen.map(|param| param.numel()).sum::<usize>() {
            0 => String::new(),
            frozen => format!(", {} of them frozen,", count_text(frozen)),
        };
        let params = several(numel, "parameter");
        let buckets = several(self.buckets().len(), "bucket");
        let mut of_units = vec![0; self.units().len()];
        for bucket in self.buckets() {
            if let Some(unit) = bucket.unit {
                of_units[unit.0] += bucket.layout.filled(&(0..bucket.padded));
            }
        }
        let in_units = of_units.iter().sum::<usize>();
        let largest = (0..of_units.len())
            .rev()
            .max_by_key(|index| of_units[*index]); // the first of them
        match largest.filter(|_| in_units > 0) {
            Some(largest) => {
                let units = several(of_units.len(), "unit");
                line(text, format!("  {params}{frozen} in {units} and {buckets}"));
                let name = &self.units()[largest];
                line(
                    text,
                    format!(
                        "  the largest unit is '{name}' with {}",
                        several(of_units[largest], "parameter")
                    ),
                );
                if numel > in_units {
                    let rest = several(numel - in_units, "parameter");
                    line(
                        text,
                        format!("  {rest} outside of units, shared or small: whole on every rank"),
                    );
                }
            }
            None => line(text, format!("  {params}{frozen} in {buckets}")),
        }
        let mut kinds: Vec<String> = Vec::new();
        for bucket in self.buckets() {
            let (computed, reduced, updated) =
                (bucket.param_dtype, bucket.dtype, bucket.main_dtype);
            let kind = match bucket.trainable {
                true => {
                    format!("computed as {computed}, reduced as {reduced}, updated as {updated}")
                }
                false => format!("frozen as {computed}"),
            };
            if !kinds.contains(&kind) {
                kinds.push(kind);
            }
        }
        kinds
            .into_iter()
            .for_each(|kind| line(text, format!("  {kind}")));
        let ranks = mesh.world();
        if self.reduces() && ranks > 1 {
            line(
                text,
                format!("  gradients are summed over ranks and multiplied by 1/{ranks} once"),
            );
        }
    }

    fn explain_memory(&self, text: &mut String, states: usize) {
        let bytes = self.largest_footprint(states);
        line(text, "memory of a rank".into());
        let mut row = |name: &str, bytes: usize| {
            if bytes > 0 {
                let bytes = bytes_text(bytes as f64);
                line(text, format!("  {name:<34}{bytes:>10}"));
            }
        };
        row("parameters that stay whole", bytes.params);
        let mains = match self.row().shard.shards_update() {
            true => "its slices of what is updated",
            false => "wider copy that is updated",
        };
        row(mains, bytes.mains);
        row("gradients", bytes.grads);
        let optim = format!("optimizer, {} a parameter", several(states, "value"));
        row(&optim, bytes.optim);
        row("blocks for what travels", bytes.travel);
        row("units, while they are whole", bytes.units);
        row("together, without activations", bytes.total());
    }

    fn explain_wire(&self, text: &mut String, forecast: &Forecast, link: Option<Link>) {
        let all = forecast.total(1);
        if all.bytes == 0 {
            line(text, "nothing is sent".into());
            return;
        }
        line(text, "sent by a rank".into());
        let mut row = |name: &str, spent: Spent| {
            if spent.collectives > 0 {
                let bytes = bytes_text(spent.bytes as f64);
                let count = several(spent.collectives as usize, "collective");
                line(text, format!("  {name:<34}{bytes:>10}  {count}"));
            }
        };
        row("in the forward", forecast.forward);
        row("in the backward", forecast.last_backward);
        row("after the update", forecast.step);
        row("a step, of one micro-batch", all);
        row("of it, exposed", forecast.exposed);
        let gathers = match self.options().prefetch {
            0 => "every gather (prefetch is 0)",
            _ => "the first gather",
        };
        let parts = [
            (forecast.forward.collectives > 0, gathers),
            (true, "the last reduction"),
            (self.has_replicas(), "the sums over replicas"),
            (true, "the control word"),
            (forecast.step.collectives > 0, "what follows the update"),
        ];
        let parts = parts.into_iter().filter(|(is_there, _)| *is_there);
        let parts = parts.map(|(_, name)| name).collect::<Vec<_>>().join(", ");
        line(
            text,
            format!("  exposed is what no computation runs beside: {parts}"),
        );
        if let Some(link) = link {
            line(
                text,
                format!(
                    "  at {} a message and {}/s: {} a step, {} that nothing can hide",
                    time_text(link.alpha_s),
                    bytes_text(link.bytes_per_s),
                    time_text(link.seconds(all)),
                    time_text(link.seconds(forecast.exposed))
                ),
            );
        }
    }

    fn explain_accumulation(&self, text: &mut String, forecast: &Forecast) {
        if !self.row().shard.reduces_each() {
            return;
        }
        let whole = |(index, bucket): (usize, &super::BucketPlan)| {
            let own = self.own(index, 0).len() * bucket.dtype.accumulator().size();
            let apart = bucket.trainable && bucket.axis.reduces_each();
            (bucket.padded * bucket.dtype.size()).saturating_sub(own) * usize::from(apart)
        };
        let more = self.buckets().iter().enumerate().map(whole).sum::<usize>();
        if more == 0 {
            return; // one rank has nothing to choose
        }
        let more = bytes_text(more as f64);
        let backward = bytes_text(forecast.backward.bytes as f64);
        let forward = match forecast.forward_again.bytes {
            0 => String::new(),
            bytes => format!("{} in its forward and ", bytes_text(bytes as f64)),
        };
        line(
            text,
            format!("each further micro-batch of a step sends {forward}{backward} in its backward"),
        );
        line(
            text,
            match self.options().accumulate {
                Accumulate::Reduce => format!(
                    "  Accumulate::Keep would reduce once a step, not in each of them, and take {more} more memory"
                ),
                Accumulate::Keep => format!(
                    "  Accumulate::Reduce would reduce in each of them, and take {more} less memory"
                ),
            },
        );
    }

    fn explain_ties(&self, text: &mut String) {
        for param in self.params() {
            if let (Some(unit), None) = (param.unit, param.home()) {
                line(
                    text,
                    format!(
                        "'{}' is used outside of '{}' too: it stays with the root",
                        param.name,
                        self.units()[unit.0]
                    ),
                );
            }
        }
    }
}

fn line(text: &mut String, words: String) {
    writeln!(text, "{words}").expect("text grows");
}
