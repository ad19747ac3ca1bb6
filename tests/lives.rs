//! Jobs leave nothing behind in a process that goes on: no thread, no open file, no memory of their own. Method: the `lives`
//! program launches jobs one after the other, with models, loggers, groups and checkpoints, and counts what it holds.

use crate::{launching::program, process::finish};

const LIVES: &str = env!("CARGO_BIN_EXE_lives");
const LAUNCHES: usize = 50; // between the two counts

/// The counts of each rank that said them, after few launches and after many: threads, files, maps, shared maps.
fn counts(how: &str, wire: &str) -> Vec<[[usize; 4]; 2]> {
    let (output, text) = finish(program(LIVES, &[how, wire]).spawn().unwrap());
    assert!(output.status.success(), "{text}");
    let of = |start: &'static str| {
        let lines = text
            .lines()
            .filter_map(move |line| line.strip_prefix(start));
        lines.map(|line| {
            let numbers = line.trim_matches(['[', ']']).split(", ");
            let numbers: Vec<usize> = numbers.map(|number| number.parse().unwrap()).collect();
            <[usize; 4]>::try_from(numbers).unwrap()
        })
    };
    of("few ")
        .zip(of("many "))
        .map(|(few, many)| [few, many])
        .collect()
}

fn nothing_is_left(how: &str, ranks: usize) {
    for wire in ["shm", "unix", "tcp"] {
        let all = counts(how, wire);
        assert_eq!(all.len(), ranks, "{how} over {wire}");
        for [few, many] in all {
            let [threads, files, maps, shared] = many;
            let text = format!("{how} over {wire}: {few:?} and then {many:?}");
            assert_eq!([threads, files], few[..2], "{text}");
            assert_eq!(shared, 0, "{text}");
            // The allocator may take another map; a launch that left one would leave fifty.
            assert!(maps < few[2] + LAUNCHES / 2, "{text}");
        }
    }
}

// GAP-34, BUG-23, issue 18356
#[test]
fn launches_of_threads_leave_no_thread_no_file_and_no_memory() {
    nothing_is_left("threads", 1);
}

// GAP-34, BUG-23, issue 18356
#[test]
fn launches_of_processes_leave_no_thread_no_file_and_no_memory_in_their_ranks() {
    nothing_is_left("processes", 2);
}
