//! Parts of a group, and memory that NCCL knows.

use cudarc::driver::CudaSlice;
use fabric_engine::{
    Error,
    comm::{
        ReduceOp,
        nccl::{Comm, Config, Library, Memory},
    },
    kernels::Dtype,
};
use gpu_suite::{fakes, stage::with_fakes};

use crate::ranks::{LATE, Rank, address, bytes_of, config, floats, world, world_with};

fn sum(rank: &Rank, comm: &Comm, value: f32) -> f32 {
    let slice = rank.put(&bytes_of(&[value]));
    let data = rank.operands(&slice, &slice, 1, Dtype::F32);
    // SAFETY: the buffer lives until it is read, below.
    unsafe { comm.all_reduce(data, ReduceOp::Sum, rank.handle()) }.unwrap();
    floats(&rank.get(&slice))[0]
}

#[test]
fn ranks_of_a_color_are_a_group_ordered_by_their_keys() {
    with_fakes(&[("FAKE_CUDA_DEVICES", "4")], || {
        world(4, |rank| {
            let number = rank.rank as u32;
            let part = rank
                .comm
                .split(Some(number % 2), 10 - number, config(LATE))
                .unwrap()
                .unwrap();
            assert_eq!((part.size(), part.rank()), (2, 1 - rank.rank / 2)); // the higher rank comes first
            assert_eq!(
                sum(&rank, &part, rank.rank as f32),
                [2.0, 4.0][rank.rank % 2]
            );
            assert_eq!(sum(&rank, &rank.comm, 1.0), 4.0);
            if rank.rank % 2 == 0 {
                part.abort("one part's end").unwrap();
            }
            assert_eq!(sum(&rank, &rank.comm, 1.0), 4.0); // is not the whole's
        });
    });
}

#[test]
fn a_rank_may_be_in_no_part() {
    with_fakes(&[("FAKE_CUDA_DEVICES", "3")], || {
        world(3, |rank| {
            let color = (rank.rank != 1).then_some(7);
            let part = rank.comm.split(color, 0, config(LATE)).unwrap();
            assert_eq!(part.is_none(), rank.rank == 1);
            if let Some(part) = part {
                assert_eq!((part.size(), part.rank()), (2, rank.rank / 2));
                assert_eq!(sum(&rank, &part, 1.0), 2.0);
            }
        });
    });
}

#[test]
fn a_split_that_not_all_make_ends_in_time() {
    with_fakes(&[], || {
        let soon = std::time::Duration::from_millis(100);
        let library = Library::load().unwrap();
        let id = fabric_engine::comm::nccl::Id::create(&library).unwrap();
        let (sender, over) = std::sync::mpsc::channel::<()>();
        std::thread::scope(|scope| {
            let (library, id) = (&library, &id);
            scope.spawn(move || {
                let _context = cudarc::driver::CudaContext::new(1).unwrap();
                let comm = Comm::init(library, id, 2, 1, config(LATE)).unwrap();
                let _ = over.recv();
                comm.abort("the test is over").unwrap();
            });
            let _context = cudarc::driver::CudaContext::new(0).unwrap();
            let quick = Config {
                deadline: Some(soon * 20), // enough to meet
                ..Config::default()
            };
            let comm = Comm::init(library, id, 2, 0, quick).unwrap();
            let error = comm.split(Some(0), 0, config(soon)).unwrap_err();
            assert!(matches!(error, Error::Timeout { .. }), "{error}");
            drop(sender);
        });
    });
}

#[test]
fn what_a_split_cannot_say_to_nccl_is_refused() {
    with_fakes(&[], || {
        let path = fakes::nccl_without(&[
            "ncclCommSplit",
            "ncclCommRegister",
            "ncclCommWindowRegister",
            "ncclMemAlloc",
        ]);
        let library = Library::open(&path).unwrap();
        world_with(&library, 1, |rank| {
            let slice = rank.put(&[0; 16]);
            let error = rank.comm.split(Some(0), 0, config(LATE)).unwrap_err();
            assert!(error.to_string().contains("2.18"), "{error}");
            // SAFETY: nothing is called.
            let error = unsafe { rank.comm.register(address(&slice), 16) }.unwrap_err();
            assert!(error.to_string().contains("2.19"), "{error}");
            // SAFETY: as above.
            let error =
                unsafe { rank.comm.register_window(address(&slice), 16, true) }.unwrap_err();
            assert!(error.to_string().contains("2.27"), "{error}");
            assert!(
                Memory::new(rank.comm.library(), 16)
                    .unwrap_err()
                    .to_string()
                    .contains("2.19")
            );
        });
        world(1, |rank| {
            let error = rank.comm.split(Some(1 << 31), 0, config(LATE)).unwrap_err();
            assert!(error.to_string().contains("2147483648"), "{error}");
        });
    });
}

#[test]
fn buffers_are_registered_and_forgotten() {
    with_fakes(&[], || {
        world(2, |rank| {
            let slice: CudaSlice<u8> = rank.put(&[0; 4096]);
            // SAFETY: the buffer outlives its registrations.
            let first = unsafe { rank.comm.register(address(&slice), 4096) }.unwrap();
            // SAFETY: as above.
            let second = unsafe { rank.comm.register(address(&slice), 64) }.unwrap();
            // SAFETY: as above; it is refused.
            let error = unsafe { rank.comm.register(address(&slice), 4097) }.unwrap_err();
            assert!(error.to_string().contains("4097 are needed"), "{error}");
            let memory = Memory::new(rank.comm.library(), 100).unwrap();
            assert_eq!(memory.bytes(), 100);
            // SAFETY: as above.
            let window = unsafe { rank.comm.register_window(memory.address(), 100, true) }.unwrap();
            assert_eq!(sum(&rank, &rank.comm, 1.0), 2.0);
            first.deregister().unwrap();
            drop(second);
            drop(window);
            // SAFETY: as above.
            let last = unsafe { rank.comm.register(address(&slice), 64) }.unwrap();
            drop(rank.comm);
            last.deregister().unwrap(); // with the communicator it was forgotten
        });
        let count = |name: &str| {
            fakes::nccl_log()
                .iter()
                .filter(|line| line.starts_with(name))
                .count()
        };
        assert_eq!(
            (
                count("ncclCommDeregister"),
                count("ncclCommWindowDeregister")
            ),
            (4, 2)
        );
    });
}
