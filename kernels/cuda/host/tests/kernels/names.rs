//! Goal: what is launched by name is there under that name. Method: compare the sets, and ask for what is not there.

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
