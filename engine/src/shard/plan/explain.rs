//! The plan in words and numbers, for people, before anything runs.

use std::fmt::Write;

use super::{Footprint, Forecast, Plan, Reshard};
use crate::comm::{Link, Spent};

/// Bytes as people read them, in powers of 1000.
pub fn bytes_text(bytes: f64) -> String {
    const UNITS: [&str; 6] = ["B", "kB", "MB", "GB", "TB", "PB"];
    let mut scaled = bytes;
    for unit in UNITS {
        if scaled.abs() < 999.5 || unit == "PB" {
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

impl Plan {
    /// What will happen and what it costs: units, bytes a rank, collectives and bytes a step, types, the divisor, and the
    /// time that no computation can hide, if `link` tells what the wire is like. `states`: the vectors that the optimizer
    /// keeps beside each parameter.
    pub fn explain(&self, forecast: &Forecast, states: usize, link: Option<Link>) -> String {
        let mut text = String::new();
        self.explain_shape(&mut text);
        self.explain_memory(&mut text, &self.largest_footprint(states));
        self.explain_wire(&mut text, forecast, link);
        self.explain_accumulation(&mut text, forecast);
        self.explain_ties(&mut text);
        text
    }

    fn explain_shape(&self, text: &mut String) {
        let (row, mesh) = (self.row().name, self.mesh());
        let numel = self
            .params()
            .iter()
            .map(|param| param.numel())
            .sum::<usize>();
        let frozen = self.params().iter().filter(|param| !param.trainable);
        let frozen = frozen.map(|param| param.numel()).sum::<usize>();
        line(text, format!("{row} on {} ranks", mesh.world()));
        if mesh.replicas > 1 {
            line(
                text,
                format!("  {} replicas of {} ranks", mesh.replicas, mesh.shards),
            );
            if !mesh.shards.is_power_of_two() {
                line(
                    text,
                    "  groups of no power of two: sums differ from those of one flat group in the last bits".into(),
                );
            }
        }
        line(
            text,
            format!(
                "  {} parameters, {} of them frozen, in {} units, {} buckets",
                count_text(numel),
                count_text(frozen),
                self.units().len(),
                self.buckets().len()
            ),
        );
        let unit = |unit: usize| {
            let own = self.buckets().iter();
            let own = own.filter(|bucket| bucket.unit.is_some_and(|other| other.0 == unit));
            own.map(|bucket| bucket.layout.filled(&(0..bucket.padded)))
                .sum::<usize>()
        };
        let largest = (0..self.units().len()).max_by_key(|index| unit(*index));
        if let Some(largest) = largest.filter(|index| unit(*index) > 0) {
            let root = numel - (0..self.units().len()).map(unit).sum::<usize>();
            line(
                text,
                format!(
                    "  the largest unit, '{}', has {}; {} are in none and stay whole",
                    self.units()[largest],
                    count_text(unit(largest)),
                    count_text(root)
                ),
            );
        }
        let mut kinds: Vec<String> = Vec::new();
        for bucket in self.buckets() {
            let kind = match bucket.trainable {
                true => format!(
                    "computed as {}, reduced as {}, updated as {}",
                    bucket.param_dtype, bucket.dtype, bucket.main_dtype
                ),
                false => format!("frozen as {}", bucket.param_dtype),
            };
            if !kinds.contains(&kind) {
                kinds.push(kind);
            }
        }
        kinds
            .into_iter()
            .for_each(|kind| line(text, format!("  {kind}")));
        if self.reduces() {
            line(
                text,
                format!(
                    "  gradients are summed over ranks and multiplied by 1/{} once",
                    mesh.world()
                ),
            );
        }
    }

    fn explain_memory(&self, text: &mut String, bytes: &Footprint) {
        line(text, "memory of a rank".into());
        let mut row = |name: &str, bytes: usize| {
            if bytes > 0 {
                line(
                    text,
                    format!("  {name:<34}{:>10}", bytes_text(bytes as f64)),
                );
            }
        };
        row("parameters in the model", bytes.params);
        row("parameters that are updated", bytes.mains);
        row("gradients", bytes.grads);
        row("optimizer", bytes.optim);
        row("on their way", bytes.travel);
        row("units in use", bytes.units);
        row("together, without activations", bytes.total());
    }

    fn explain_wire(&self, text: &mut String, forecast: &Forecast, link: Option<Link>) {
        line(text, "sent by a rank".into());
        let mut row = |name: &str, spent: Spent| {
            if spent.collectives > 0 {
                line(
                    text,
                    format!(
                        "  {name:<34}{:>10}  {} collectives",
                        bytes_text(spent.bytes as f64),
                        spent.collectives
                    ),
                );
            }
        };
        row("forward", forecast.forward);
        row("backward", forecast.last_backward);
        row("after the update", forecast.step);
        row("a step", forecast.total(1));
        row("of it nothing can hide", forecast.exposed);
        if let Some(link) = link {
            let ms = |spent| link.seconds(spent) * 1e3;
            line(
                text,
                format!(
                    "  at {:.1} us a message and {}/s: {:.2} ms a step, {:.2} ms that nothing can hide",
                    link.alpha_s * 1e6,
                    bytes_text(link.bytes_per_s),
                    ms(forecast.total(1)),
                    ms(forecast.exposed)
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
        let gathers = match self.options().reshard_after_forward {
            Reshard::Yes | Reshard::Within(_) => " (parameters are gathered again either way)",
            Reshard::No => "",
        };
        let backward = bytes_text(forecast.backward.bytes as f64);
        line(
            text,
            match self.options().accumulate {
                super::Accumulate::Reduce => format!(
                    "another micro-batch sends {backward} in its backward{gathers}; Accumulate::Keep would reduce once, and take {} more memory",
                    bytes_text(more as f64)
                ),
                super::Accumulate::Keep => format!(
                    "another micro-batch sends {backward} in its backward{gathers}; Accumulate::Reduce would reduce each, and take {} less memory",
                    bytes_text(more as f64)
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
