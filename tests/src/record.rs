//! What a process allocates from one moment to another, and where.

use std::path::PathBuf;

use fabric::Result;
use serde_json::Value;

/// The allocations of this process, from now on. Its global allocator is [`dhat::Alloc`].
pub struct Record {
    profiler: dhat::Profiler,
    path: PathBuf,
    before: u64, // the profiler's own
}

fn blocks() -> u64 {
    dhat::HeapStats::get().total_blocks
}

impl Record {
    /// Begin to count.
    pub fn begin() -> Self {
        let path = std::env::temp_dir().join(format!("allocations-{}.json", std::process::id()));
        let profiler = dhat::Profiler::builder();
        let profiler = profiler.file_name(&path).trim_backtraces(Some(60));
        let profiler = profiler.build();
        Self {
            profiler,
            path,
            before: blocks(),
        }
    }

    /// How many there were, reallocations included, and where.
    ///
    /// # Errors
    /// When the profiler's file cannot be read.
    pub fn end(self) -> Result<(u64, String)> {
        let count = blocks() - self.before;
        drop(self.profiler); // writes the file
        let text = std::fs::read_to_string(&self.path)?;
        std::fs::remove_file(&self.path)?;
        let record: Value = serde_json::from_str(&text)?;
        let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
        let frames = list(&record["ftbl"]);
        let mut places = String::new();
        for place in list(&record["pps"]) {
            places += &format!("{} x\n", place["tbk"]);
            for frame in list(&place["fs"]) {
                let frame = frame.as_u64().and_then(|index| frames.get(index as usize));
                let frame = frame.and_then(Value::as_str).unwrap_or_default();
                if frame.contains("fabric") || frame.contains("src/") {
                    places += &format!("    {frame}\n");
                }
            }
        }
        Ok((count, places))
    }
}
