//! docs/FABRIC.md, about itself: every item of Lightning Fabric has its row, and every test that a row names is there.

use std::{collections::HashSet, fs, path::PathBuf};

/// The items by group, and which numbers a group has.
fn items() -> Vec<String> {
    let group = |name: &str, numbers: &[std::ops::RangeInclusive<u32>]| -> Vec<String> {
        let numbers = numbers.iter().cloned().flatten();
        numbers
            .map(|number| format!("{name}-{number:02}"))
            .collect()
    };
    [
        group("API", &[1..=46]),
        group("WRAP", &[1..=12, 20..=27, 30..=30]),
        group("CON", &[1..=7]),
        group("ACC", &[1..=5]),
        group("STR", &[1..=9]),
        group("LAU", &[1..=6]),
        group("PREC", &[1..=9]),
        group("ENV", &[1..=7]),
        group("IO", &[1..=9]),
        group("LOG", &[1..=5]),
        group("CB", &[1..=5]),
        group("CLI", &[1..=2]),
        group("UTIL", &[1..=4, 10..=14, 20..=20, 30..=36, 40..=51]),
        group("EX", &[1..=10]),
        group("LINE", &[1..=60]),
        group("R", &[1..=16]),
        group("BUG", &[1..=23]),
        group("GAP", &[1..=50]),
    ]
    .concat()
}

/// A row: its item, what is said of it, and the tests that show it.
struct Row {
    item: String,
    here: String,
    tests: Vec<(String, String)>,
}

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn rows() -> Vec<Row> {
    let text = fs::read_to_string(root().join("docs/FABRIC.md")).unwrap();
    let known: HashSet<_> = items().into_iter().collect();
    let row = |line: &str| {
        let cells: Vec<_> = line.trim().trim_matches('|').split(" | ").collect();
        let item = cells.first()?.trim().to_string();
        if !known.contains(&item) {
            return None;
        }
        assert_eq!(cells.len(), 4, "{line}");
        let tests = cells[3].split('`').filter_map(|word| word.split_once("::"));
        Some(Row {
            item,
            here: cells[2].trim().into(),
            tests: tests
                .map(|(file, test)| (file.into(), test.into()))
                .collect(),
        })
    };
    text.lines().filter_map(row).collect()
}

#[test]
fn every_item_of_fabrics_has_one_row_that_says_where_it_is() {
    let rows = rows();
    let mut listed: Vec<_> = rows.iter().map(|row| row.item.clone()).collect();
    let missing: Vec<_> = items()
        .into_iter()
        .filter(|item| !listed.contains(item))
        .collect();
    assert!(missing.is_empty(), "no row for {missing:?}");
    let count = listed.len();
    listed.sort();
    listed.dedup();
    assert_eq!(listed.len(), count, "an item has two rows");
    for Row { item, here, tests } in rows {
        let verdict = here.split_once(':');
        let (verdict, account) = verdict.unwrap_or_else(|| panic!("{item}: {here}"));
        assert!(
            ["same", "same idea", "better", "not here"].contains(&verdict),
            "{item}: {here}"
        );
        assert!(account.trim().len() > 10, "{item} says too little: {here}");
        let vague = ["later", "todo", "tbd", "coming soon"];
        let lower = here.to_lowercase();
        assert!(
            !vague.iter().any(|word| lower.ends_with(word)),
            "{item}: {here}"
        );
        assert!(
            tests.len() <= 4,
            "{item} names {} tests: the best will do",
            tests.len()
        );
    }
}

#[test]
fn every_test_that_the_table_names_is_there() {
    let mut named = 0;
    for Row { item, tests, .. } in rows() {
        for (file, test) in tests {
            let text = fs::read_to_string(root().join(&file));
            let text = text.unwrap_or_else(|error| panic!("{item}: {file}: {error}"));
            let found = match file.ends_with(".rs") {
                true => text.contains(&format!("fn {test}(")),
                false => text.contains(&test),
            };
            assert!(found, "{item}: {file} has no {test}");
            named += 1;
        }
    }
    assert!(named > 150, "{named} tests named");
}
