//! Bus bandwidth over size, as an SVG that is written by hand: both axes logarithmic, a line for each series, limits dashed.

use std::{fmt::Write, fs, io, path::Path};

use serde_json::Value;

use super::{
    collective::Collective,
    report::{Report, Row, Table},
};

/// One line of the plot.
#[derive(Clone, Debug, PartialEq)]
pub struct Line {
    /// What the legend says.
    pub name: String,
    /// Bytes, and GB/s.
    pub points: Vec<(f64, f64)>,
    /// Drawn as a limit: dashed and grey.
    pub is_limit: bool,
}

const WIDTH: f64 = 1000.0;
const HEIGHT: f64 = 540.0;
const LEFT: f64 = 70.0;
const RIGHT: f64 = 320.0; // room for the legend
const TOP: f64 = 46.0;
const BOTTOM: f64 = 58.0;
// Colours that differ in brightness too (Okabe and Ito's).
const COLOURS: [&str; 8] = [
    "#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#8c6d1f",
];
const MARKS: usize = 3; // shapes
const LIMIT_DASHES: [&str; 2] = [" stroke-dasharray=\"8 4\"", " stroke-dasharray=\"2 3\""];

/// The lines of a report: for every table, type and reduction, out of place and in place, and the limit.
pub fn lines(report: &Report) -> Vec<Line> {
    let mut lines = Vec::new();
    for table in &report.tables {
        let mut kinds: Vec<_> = table.results.iter().map(kind).collect();
        kinds.dedup();
        for kind_of in kinds {
            let rows = table.results.iter().filter(|row| kind(row) == kind_of);
            let rows = rows.collect::<Vec<_>>();
            let name = |what: &str| {
                let (dtype, op) = (&kind_of.0, &kind_of.1);
                let (ranks, wire) = (table.config.ranks, &table.wire);
                let op = if op == "none" {
                    String::new()
                } else {
                    format!(" {op}")
                };
                format!(
                    "{}{op} {dtype}, {ranks} ranks, {wire}, {what}",
                    table.collective
                )
            };
            for what in ["out", "in place"] {
                let half = |row: &Row| match what {
                    "out" => row.out_of_place.clone(),
                    _ => row.in_place.clone(),
                };
                let point = |row: &&Row| Some((row.size as f64, half(row)?.bus_bw));
                lines.push(Line {
                    name: name(what),
                    points: rows.iter().filter_map(point).collect(),
                    is_limit: false,
                });
            }
            let limit = |row: &&Row| Some((row.size as f64, limit_bandwidth(table, row)?));
            lines.push(Line {
                name: name("limit"),
                points: rows.iter().filter_map(limit).collect(),
                is_limit: true,
            });
        }
    }
    lines.retain(|line| !line.points.is_empty());
    lines
}

fn kind(row: &Row) -> (String, String, i64) {
    (row.dtype.clone(), row.redop.clone(), row.root)
}

fn limit_bandwidth(table: &Table, row: &Row) -> Option<f64> {
    let factor = bus_factor(&table.collective, table.config.ranks)?;
    row.limit
        .map(|micros| row.size as f64 / micros / 1e3 * factor)
}

fn bus_factor(collective: &str, ranks: usize) -> Option<f64> {
    let known = Collective::ALL
        .into_iter()
        .find(|known| known.name() == collective);
    known.map(|known| known.bus_factor(ranks))
}

/// The lines of `benches/peers/run`'s JSON for one collective and number of ranks: one for each program.
pub fn peer_lines(json: &Value, collective: &str, ranks: usize) -> Vec<Line> {
    let mut lines: Vec<Line> = Vec::new();
    let cells = json["cells"].as_array().into_iter().flatten();
    for cell in cells {
        if cell["collective"] != collective || cell["ranks"] != ranks {
            continue;
        }
        let (size, factor) = (cell["bytes"].as_f64(), bus_factor(collective, ranks));
        let (Some(size), Some(factor), Some(times)) = (size, factor, cell["us"].as_object()) else {
            continue;
        };
        for (name, micros) in times {
            let Some(micros) = micros.as_f64().filter(|micros| *micros > 0.0) else {
                continue;
            };
            let point = (size, size / micros / 1e3 * factor);
            match lines.iter_mut().find(|line| line.name == *name) {
                Some(line) => line.points.push(point),
                None => lines.push(Line {
                    name: name.clone(),
                    points: vec![point],
                    is_limit: name.contains("limit"),
                }),
            }
        }
    }
    lines
}

/// Draw `lines` into a file.
///
/// # Errors
/// When there is nothing to draw, or the file cannot be written.
pub fn write(path: &Path, lines: &[Line]) -> io::Result<()> {
    let svg = draw(lines, "Bus bandwidth over size");
    fs::write(
        path,
        svg.ok_or_else(|| io::Error::other("no sizes and bandwidths to plot"))?,
    )
}

/// The SVG; none without points above zero.
pub fn draw(lines: &[Line], title: &str) -> Option<String> {
    let points = || lines.iter().flat_map(|line| &line.points);
    let points = || points().filter(|(x, y)| *x > 0.0 && *y > 0.0);
    let x = Axis::sizes(points().map(|(x, _)| *x), LEFT, WIDTH - RIGHT)?;
    let y = Axis::bandwidths(points().map(|(_, y)| *y), HEIGHT - BOTTOM, TOP)?;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" width=\"{WIDTH}\" height=\"{HEIGHT}\" \
         font-family=\"sans-serif\" font-size=\"13\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n"
    );
    text(&mut svg, LEFT, 26.0, "start", 16, title);
    for tick in x.ticks() {
        let at = x.place(tick);
        rule(&mut svg, (at, TOP), (at, HEIGHT - BOTTOM), "#e4e4e4");
        text(
            &mut svg,
            at,
            HEIGHT - BOTTOM + 19.0,
            "middle",
            13,
            &bytes_text(tick),
        );
    }
    for tick in y.ticks() {
        for part in [1.0, 2.0, 5.0] {
            let at = y.place(tick * part);
            if !(TOP - 0.5..=HEIGHT - BOTTOM + 0.5).contains(&at) {
                continue;
            }
            let colour = if part == 1.0 { "#cccccc" } else { "#ececec" };
            rule(&mut svg, (LEFT, at), (WIDTH - RIGHT, at), colour);
            text(
                &mut svg,
                LEFT - 8.0,
                at + 4.5,
                "end",
                12,
                &number_text(tick * part),
            );
        }
    }
    let middle = (LEFT + WIDTH - RIGHT) / 2.0;
    text(&mut svg, middle, HEIGHT - 16.0, "middle", 13, "size (B)");
    let label = "<text transform=\"rotate(-90)\" text-anchor=\"middle\"";
    let centre = -(TOP + HEIGHT - BOTTOM) / 2.0;
    let _ = writeln!(svg, "{label} x=\"{centre}\" y=\"20\">busbw (GB/s)</text>");
    for (number, line) in lines.iter().enumerate() {
        curve(&mut svg, line, number, &x, &y);
        legend(&mut svg, line, number);
    }
    svg.push_str("</svg>\n");
    Some(svg)
}

/// A logarithmic axis. Sizes reach from a tick to a tick; bandwidths end where the values do.
struct Axis {
    low: f64,
    high: f64,
    first: f64, // tick
    step: f64,
    from: f64,
    to: f64,
}

impl Axis {
    fn sizes(values: impl Iterator<Item = f64> + Clone, from: f64, to: f64) -> Option<Self> {
        const STEP: f64 = 4.0;
        let (low, high) = ends(values)?;
        // Ticks fall on 1K, 4K, 16K, ...
        let floor = ((low / 1024.0).log(STEP) + 1e-9).floor();
        let ceil = ((high / 1024.0).log(STEP) - 1e-9).ceil();
        let low = 1024.0 * STEP.powf(floor);
        Some(Self {
            low,
            high: 1024.0 * STEP.powf(ceil.max(floor + 1.0)),
            first: low,
            step: STEP,
            from,
            to,
        })
    }

    fn bandwidths(values: impl Iterator<Item = f64> + Clone, from: f64, to: f64) -> Option<Self> {
        const STEP: f64 = 10.0;
        let (low, high) = ends(values)?;
        Some(Self {
            low: low / 1.25,
            high: high.max(low * 2.0) * 1.25,
            first: STEP.powf(low.log10().floor() - 1.0),
            step: STEP,
            from,
            to,
        })
    }

    fn place(&self, value: f64) -> f64 {
        let part = (value / self.low).ln() / (self.high / self.low).ln();
        self.from + part * (self.to - self.from)
    }

    fn ticks(&self) -> impl Iterator<Item = f64> {
        let (high, step) = (self.high * (1.0 + 1e-9), self.step);
        std::iter::successors(Some(self.first), move |tick| Some(tick * step))
            .take_while(move |tick| *tick <= high)
    }
}

/// The smallest and the largest.
fn ends(values: impl Iterator<Item = f64> + Clone) -> Option<(f64, f64)> {
    Some((values.clone().reduce(f64::min)?, values.reduce(f64::max)?))
}

fn style(line: &Line, number: usize) -> (&'static str, &'static str) {
    match line.is_limit {
        true => ("#777777", LIMIT_DASHES[number / 2 % LIMIT_DASHES.len()]),
        false => (COLOURS[number % COLOURS.len()], ""),
    }
}

fn curve(svg: &mut String, line: &Line, number: usize, x: &Axis, y: &Axis) {
    let (colour, dashes) = style(line, number);
    let visible = line.points.iter().filter(|(x, y)| *x > 0.0 && *y > 0.0);
    let places = visible.map(|point| (x.place(point.0), y.place(point.1)));
    let places = places.collect::<Vec<_>>();
    let path = places
        .iter()
        .map(|(x, y)| format!("{x:.1},{y:.1} "))
        .collect::<String>();
    let path = path.trim_end();
    let _ = writeln!(
        svg,
        "<polyline fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"{dashes} points=\"{path}\"/>"
    );
    if !line.is_limit {
        places
            .iter()
            .for_each(|place| mark(svg, *place, number, colour));
    }
}

fn mark(svg: &mut String, (x, y): (f64, f64), number: usize, colour: &str) {
    let _ = match number % MARKS {
        0 => writeln!(
            svg,
            "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3.5\" fill=\"{colour}\"/>"
        ),
        1 => {
            let (left, top) = (x - 3.2, y - 3.2);
            writeln!(
                svg,
                "<rect x=\"{left:.1}\" y=\"{top:.1}\" width=\"6.4\" height=\"6.4\" fill=\"{colour}\"/>"
            )
        }
        _ => writeln!(
            svg,
            "<path d=\"M{x:.1} {:.1}l4.2 7.4h-8.4z\" fill=\"{colour}\"/>",
            y - 4.9
        ),
    };
}

fn legend(svg: &mut String, line: &Line, number: usize) {
    let (colour, dashes) = style(line, number);
    let (x, y) = (WIDTH - RIGHT + 16.0, TOP + 10.0 + 22.0 * number as f64);
    let end = x + 26.0;
    let _ = writeln!(
        svg,
        "<line x1=\"{x}\" y1=\"{y}\" x2=\"{end}\" y2=\"{y}\" stroke=\"{colour}\" stroke-width=\"2\"{dashes}/>"
    );
    if !line.is_limit {
        mark(svg, (x + 13.0, y), number, colour);
    }
    text(svg, end + 8.0, y + 4.0, "start", 11, &line.name);
}

fn rule(svg: &mut String, (x1, y1): (f64, f64), (x2, y2): (f64, f64), colour: &str) {
    let _ = writeln!(
        svg,
        "<line x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\" stroke=\"{colour}\"/>"
    );
}

fn text(svg: &mut String, x: f64, y: f64, anchor: &str, size: u32, words: &str) {
    let words = words
        .replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;");
    let _ = writeln!(
        svg,
        "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\" font-size=\"{size}\">{words}</text>"
    );
}

/// 0.05, 2, 100: no more digits than needed.
fn number_text(value: f64) -> String {
    let text = format!("{value:.4}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

fn bytes_text(bytes: f64) -> String {
    let units = [(1u64 << 30, "G"), (1 << 20, "M"), (1 << 10, "K")];
    let unit = units.into_iter().find(|(unit, _)| bytes >= *unit as f64);
    unit.map_or_else(
        || format!("{bytes}"),
        |(unit, name)| format!("{}{name}", bytes / unit as f64),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(name: &str, points: &[(f64, f64)]) -> Line {
        Line {
            name: name.into(),
            points: points.to_vec(),
            is_limit: name == "limit",
        }
    }

    #[test]
    fn every_line_is_drawn_and_named_and_points_lie_inside() {
        let points = [(1024.0, 0.5), (65536.0, 20.0), (268435456.0, 13.0)];
        let svg = draw(&[line("a < b", &points), line("limit", &points)], "title").unwrap();
        assert_eq!(svg.matches("<polyline").count(), 2);
        assert!(svg.contains("a &lt; b") && svg.contains("stroke-dasharray"));
        assert!(svg.contains(">1K<") && svg.contains(">256M<") && svg.contains(">10<"));
        assert_eq!(svg.matches("<circle").count(), 4); // three points and the legend
        assert!(!svg.contains("NaN") && !svg.contains("inf"));
    }

    #[test]
    fn nothing_to_draw_is_no_plot() {
        assert_eq!(draw(&[], "title"), None);
        assert_eq!(draw(&[line("zero", &[(0.0, 0.0)])], "title"), None);
    }

    #[test]
    fn peers_become_lines() {
        let json = serde_json::json!({"cells": [
            {"collective": "all_reduce", "ranks": 2, "bytes": 1000, "us": {"coll": 1.0, "gloo": 100.0}},
            {"collective": "all_reduce", "ranks": 4, "bytes": 1000, "us": {"coll": 2.0}},
        ]});
        let lines = peer_lines(&json, "all_reduce", 2);
        assert_eq!(lines.len(), 2);
        assert_eq!(lines[0].points, [(1000.0, 1.0)]);
    }
}
