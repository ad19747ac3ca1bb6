//! Goal: what is launched by name is there under that name. Method: compare the sets, and ask for what is not there.

use std::collections::BTreeSet;
use std::fs;

use fabric_kernels_host::{arguments, kernels, launch};

#[test]
fn an_unknown_kernel_is_refused_by_name() {
    assert_eq!(arguments("move_f32_i8"), None);
    // SAFETY: nothing runs, so no argument is read.
    let refused = unsafe { launch("move_f32_i8", 1, 256, std::ptr::null_mut()) }.unwrap_err();
    assert!(refused.to_string().contains("'move_f32_i8'"), "{refused}");
}

#[test]
#[should_panic(expected = "256 threads a block")]
fn blocks_of_another_size_are_refused() {
    // SAFETY: nothing runs, so no argument is read.
    let _ = unsafe { launch("copy_bytes", 1, 128, std::ptr::null_mut()) };
}

#[test]
fn kernels_are_listed_once_each_with_their_arguments() {
    let names: Vec<_> = kernels().collect();
    assert!(names.is_sorted_by(|a, b| a < b));
    for name in &names {
        assert!(
            arguments(name).is_some_and(|sizes| sizes.len() >= 3),
            "{name}"
        );
    }
    assert_eq!(
        names
            .iter()
            .filter(|name| name.starts_with("move_"))
            .count(),
        36
    );
}

/// What nvcc made of the sources, checked in, and what is compiled here have the same kernels.
#[test]
fn the_embedded_ptx_has_these_kernels_and_no_others() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../built");
    let mut entries = BTreeSet::new();
    for file in fs::read_dir(folder).unwrap() {
        let path = file.unwrap().path();
        if path.extension().is_some_and(|ending| ending == "ptx") {
            let text = fs::read_to_string(&path).unwrap();
            let names = text
                .split(".entry ")
                .skip(1)
                .map(|rest| rest.split('(').next().unwrap());
            for name in names {
                assert!(entries.insert(name.to_owned()), "{name} is there twice");
            }
        }
    }
    let here: BTreeSet<String> = kernels().map(str::to_owned).collect();
    assert_eq!(
        entries, here,
        "run kernels/cuda/build and commit kernels/cuda/built"
    );
}

/// The parameters in the PTX have the sizes that the table of the host has.
#[test]
fn the_embedded_ptx_takes_the_same_arguments() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../built");
    let mut seen = 0;
    for kernel in kernels() {
        for file in fs::read_dir(folder).unwrap() {
            let path = file.unwrap().path();
            if path.extension().is_none_or(|ending| ending != "ptx") {
                continue;
            }
            let text = fs::read_to_string(&path).unwrap();
            let Some((_, entry)) = text.split_once(&format!(".entry {kernel}(")) else {
                continue;
            };
            let parameters = entry.split(')').next().unwrap();
            let sizes: Vec<usize> = parameters.split(".param ").skip(1).map(size).collect();
            assert_eq!(
                Some(&sizes[..]),
                arguments(kernel),
                "{kernel}: {parameters}"
            );
            seen += 1;
        }
    }
    assert_eq!(seen, kernels().count());
}

/// The bytes of one parameter's declaration: `.u32 name`, or `.align 8 .b8 name[96]`.
fn size(declaration: &str) -> usize {
    if let Some((_, rest)) = declaration.split_once('[') {
        return rest.split(']').next().unwrap().parse().unwrap();
    }
    let bits = declaration.split_whitespace().next().unwrap();
    bits.trim_start_matches(|letter: char| !letter.is_ascii_digit())
        .parse::<usize>()
        .unwrap()
        / 8
}
