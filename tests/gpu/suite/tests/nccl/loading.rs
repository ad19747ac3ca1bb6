//! Which library is found.

use fabric_engine::comm::nccl::{Id, Library, Version};
use gpu_suite::stage::with_fakes;

#[test]
fn the_loaders_library_is_found_once() {
    with_fakes(&[], || {
        let library = Library::load().unwrap();
        assert_eq!(
            (library.version(), library.name()),
            (Version::from_code(22_803), "libnccl.so.2")
        );
        assert!(std::sync::Arc::ptr_eq(&library, &Library::load().unwrap()));
        assert_ne!(
            Id::create(&library).unwrap().bytes(),
            Id::create(&library).unwrap().bytes()
        );
    });
}

#[test]
fn the_variable_comes_first() {
    with_fakes(&[("FABRIC_NCCL", "libnccl.so")], || {
        assert_eq!(Library::load().unwrap().name(), "libnccl.so");
    });
}

#[test]
fn a_library_that_is_too_old_is_refused_and_the_next_try_is_a_new_one() {
    with_fakes(&[("FAKE_NCCL_VERSION", "21304")], || {
        for _ in 0..2 {
            let said = Library::load().unwrap_err().to_string();
            assert!(
                said.contains("is NCCL 2.13.4") && said.contains("2.14.0"),
                "{said}"
            );
        }
    });
}

/// NVIDIA's own library, where `FABRIC_REAL_NCCL` says where it is: what needs no device works.
#[test]
fn the_real_library_is_loaded_and_makes_ids() {
    let Some(path) = std::env::var("FABRIC_REAL_NCCL")
        .ok()
        .filter(|path| !path.is_empty())
    else {
        println!("FABRIC_REAL_NCCL is not set: nothing to load");
        return;
    };
    with_fakes(
        &[("FABRIC_NCCL", &path), ("NCCL_SOCKET_IFNAME", "lo")],
        || {
            let library = Library::load().unwrap();
            println!("{library:?}");
            assert!(library.version() >= Version::from_code(21_400));
            let ids = [Id::create(&library).unwrap(), Id::create(&library).unwrap()];
            assert_ne!(ids[0].bytes(), ids[1].bytes());
        },
    );
}
