//! Compiles the kernels with the C++ compiler, through `shim.h`, and writes the table of all of them.

use std::path::{Path, PathBuf};
use std::{env, fs};

fn main() {
    let folder = Path::new("..");
    for file in ["build.rs", "shim.h", "shim.cpp"] {
        println!("cargo:rerun-if-changed={file}");
    }
    let mut files: Vec<PathBuf> = fs::read_dir(folder)
        .expect("the folder above holds the kernels")
        .map(|entry| entry.expect("a readable folder").path())
        .collect();
    files.sort();
    let ending = |path: &Path, ending| path.extension().is_some_and(|found| found == ending);
    // Not the folder: it holds this package, whose tests change more often than the kernels.
    for file in files
        .iter()
        .filter(|path| ending(path, "cu") || ending(path, "cuh"))
    {
        println!("cargo:rerun-if-changed={}", file.display());
    }
    let sources: Vec<PathBuf> = files
        .into_iter()
        .filter(|path| ending(path, "cu"))
        .collect();
    let names: Vec<String> = sources.iter().flat_map(|source| kernels(source)).collect();
    let table = PathBuf::from(env::var("OUT_DIR").expect("cargo sets it")).join("table.cpp");
    fs::write(&table, table_of(&names)).expect("a writable OUT_DIR");
    // One translation unit a file, each behind the shim, as nvcc would have it.
    compiler()
        .files(&sources)
        .file("shim.cpp")
        .file(&table)
        .compile("kernels");
}

fn compiler() -> cc::Build {
    let mut build = cc::Build::new();
    build
        .cpp(true)
        .std("c++17")
        .opt_level(2)
        .include(".")
        .include("..")
        // The law: every operation rounds once, and subnormals are numbers.
        .flag("-ffp-contract=off")
        .flag("-xc++")
        .flag("-includeshim.h")
        .flag("-Wno-unknown-pragmas")
        .flag("-Wno-unused-function");
    build
}

/// The names in one file, in order. The preprocessor knows which macros are kernels; it is asked to mark them.
fn kernels(source: &Path) -> Vec<String> {
    const MARK: &str = "@kernel@";
    let expanded = compiler()
        .define("LIST_KERNELS", None)
        .file(source)
        .cargo_metadata(false)
        .expand();
    let text = String::from_utf8(expanded).expect("the sources are ASCII");
    let name = |rest: &str| rest.split_whitespace().next().map(str::to_owned);
    text.split(MARK).skip(1).filter_map(name).collect()
}

fn table_of(names: &[String]) -> String {
    let mut text = String::new();
    for name in names {
        text += &format!("extern \"C\" const shim::Kernel kernel_{name};\n");
    }
    text += "extern \"C\" const shim::Kernel* const shim_kernels[] = {\n";
    for name in names {
        text += &format!("    &kernel_{name},\n");
    }
    text += "};\n";
    text += &format!("extern \"C\" const size_t shim_count = {};\n", names.len());
    text
}
