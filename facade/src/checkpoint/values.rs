//! Values in a checkpoint: anything that serde knows and JSON keeps.

use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;

use crate::error::{Error, Result};

/// A value, whatever its type.
pub(super) trait Saved {
    fn to_json(&self, name: &str) -> Result<Value>;
    fn check_json(&self, name: &str, json: &Value) -> Result<()>;
    fn set_json(&mut self, name: &str, json: &Value) -> Result<()>;
}

impl<T: Serialize + DeserializeOwned> Saved for T {
    fn to_json(&self, name: &str) -> Result<Value> {
        let refusal = |why: String| {
            Error::argument(
                format!("the value '{name}' cannot be saved as JSON: {why}"),
                "Store finite numbers, and maps whose keys are text",
            )
        };
        let json = serde_json::to_value(self).map_err(|error| refusal(error.to_string()))?;
        // JSON has no NaN and no infinity: what would not come back is refused now, not after the crash.
        let back = T::deserialize(&json).map_err(|error| refusal(error.to_string()))?;
        if packed_bytes(self) != packed_bytes(&back) {
            return Err(refusal("a number in it would come back as null".into()));
        }
        Ok(json)
    }

    fn check_json(&self, name: &str, json: &Value) -> Result<()> {
        parse::<T>(name, json).map(drop)
    }

    fn set_json(&mut self, name: &str, json: &Value) -> Result<()> {
        *self = parse(name, json)?;
        Ok(())
    }
}

/// How long a value is as MessagePack, which knows NaN: an optional NaN that became nothing is shorter, and the order of
/// a map's entries does not matter.
fn packed_bytes<T: Serialize>(value: &T) -> Option<usize> {
    rmp_serde::to_vec_named(value).ok().map(|bytes| bytes.len())
}

fn parse<T: DeserializeOwned>(name: &str, json: &Value) -> Result<T> {
    T::deserialize(json).map_err(|error| {
        Error::argument(
            format!("the saved value '{name}' has another type: {error}"),
            "Load it into the type that was saved",
        )
    })
}
