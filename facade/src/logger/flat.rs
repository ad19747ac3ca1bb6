//! Nested settings as a flat list: names are joined by `/`.

use serde_json::Value;

/// Names and values of a tree of settings, in its order. Objects are taken apart, and lists that hold objects, by number;
/// other lists are one value.
pub(super) fn flattened(settings: &Value) -> Vec<(String, Value)> {
    let mut found = Vec::new();
    visit("", settings, &mut found);
    found
}

fn visit(name: &str, value: &Value, found: &mut Vec<(String, Value)>) {
    let join = |key: &str| match name {
        "" => key.to_string(),
        _ => format!("{name}/{key}"),
    };
    match value {
        Value::Object(map) => map
            .iter()
            .for_each(|(key, value)| visit(&join(key), value, found)),
        Value::Array(list)
            if list
                .iter()
                .any(|value| value.is_object() || value.is_array()) =>
        {
            let numbered = list.iter().enumerate();
            numbered.for_each(|(index, value)| visit(&join(&index.to_string()), value, found));
        }
        _ => found.push((name.to_string(), value.clone())),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    // LOG-05
    #[test]
    fn trees_become_lists_with_slashes() {
        let settings = json!({
            "lr": 0.1,
            "model": {"width": 64, "act": null, "blocks": [{"heads": 2}, {"heads": 4}], "sizes": [1, 2]},
        });
        let flat = flattened(&settings);
        let flat: Vec<_> = flat
            .iter()
            .map(|(name, value)| (name.as_str(), value.to_string()))
            .collect();
        let expected = [
            ("lr", "0.1"),
            ("model/act", "null"),
            ("model/blocks/0/heads", "2"),
            ("model/blocks/1/heads", "4"),
            ("model/sizes", "[1,2]"),
            ("model/width", "64"),
        ];
        assert_eq!(
            flat,
            expected.map(|(name, value)| (name, value.to_string()))
        );
        assert_eq!(flattened(&json!(3)), [(String::new(), json!(3))]);
    }
}
