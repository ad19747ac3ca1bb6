//! Plans that cannot be are refused before anything runs, and every refusal says which parameter it is about. Method: bad
//! models and options, and what the error says.

use fabric::{
    Fabric,
    engine::shard::plan::{Options, Reshard},
    vec::{Dense, Link, VecModel},
};

use crate::{
    fsdp::{fabric, small_buckets},
    puppet::Puppet,
};

/// What a setup under fsdp on two ranks says of a model.
fn refusal(strategy: &str, options: &Options, model: impl Fn() -> VecModel + Sync) -> String {
    fabric(strategy, 4, options)
        .launch_threads(|fabric| fabric.setup_module(model()).map(drop))
        .unwrap_err()
        .to_string()
}

fn two() -> VecModel {
    VecModel::new([("a.w", vec![0f32; 4]), ("b.w", vec![0f32; 4])])
}

#[test]
fn bad_plans_are_refused_at_setup_with_a_name() {
    let nested = two().in_units(["a", "a.w"]).err().unwrap().to_string();
    assert!(
        nested.contains("'a.w' is in two units, 'a' and 'a.w'"),
        "{nested}"
    );
    let empty = refusal("fsdp", &small_buckets(), || {
        two().in_units(["a", "c"]).unwrap()
    });
    assert!(empty.contains("unit 'c' holds no parameter"), "{empty}");
    let dtype = Options {
        reduce_dtype: Some(fabric::engine::kernels::Dtype::F8E4M3),
        ..small_buckets()
    };
    let dtype = refusal("fsdp", &dtype, two);
    assert!(
        dtype.contains("'a.w' would be reduced as f8e4m3"),
        "{dtype}"
    );
    let group = Options {
        group: Some(3),
        ..small_buckets()
    };
    let group = refusal("hsdp", &group, two);
    assert!(
        group.contains("4 ranks do not divide into groups of 3"),
        "{group}"
    );
    let within = Options {
        reshard_after_forward: Reshard::Within(3),
        ..small_buckets()
    };
    let within = refusal("fsdp", &within, two);
    assert!(
        within.contains("do not divide into groups of 3"),
        "{within}"
    );
}

#[test]
fn a_parameter_that_is_used_outside_its_unit_is_named() {
    fabric("fsdp", 2, &small_buckets())
        .launch_threads(|fabric| {
            let model = fabric.setup_module(two().in_units(["a", "b"]).unwrap())?;
            let error = model.lent(&[model.id("a.w")], |_| ()).unwrap_err();
            assert!(
                error
                    .to_string()
                    .contains("'a.w' has no values outside its unit"),
                "{error}"
            );
            Ok(())
        })
        .unwrap();
    let tied = |model: &VecModel| Link::new(model, "b", Dense::new(2))?.with(model, &["a.w"]);
    let model = two().in_units(["a", "b"]).unwrap();
    let error = tied(&model).err().unwrap().to_string();
    assert!(error.contains("'a.w' belongs to another unit"), "{error}");
    assert!(tied(&model.tie("a.w", Some("b"))).is_ok());
}

#[test]
fn a_library_that_cannot_give_up_memory_says_which_strategies_it_can_have() {
    let error = Fabric::builder()
        .devices(2)
        .strategy("fsdp")
        .build()
        .unwrap()
        .launch_threads(|fabric| {
            let model = Puppet::new().param("rigid", &[1f32; 4]).in_unit("rigid");
            fabric.setup_module(model).map(drop)
        })
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("'rigid' cannot give up its memory"),
        "{error}"
    );
    assert!(error.contains("zero2"), "{error}");
}

#[test]
fn a_model_without_units_is_told_that_its_parameters_stay_whole() {
    let warnings = |strategy: &str, model: fn() -> VecModel| {
        let ranks = fabric(strategy, 2, &small_buckets()).launch_threads(|fabric| {
            fabric.setup_module(model())?;
            Ok(fabric.warnings())
        });
        ranks.unwrap().swap_remove(0)
    };
    let said = warnings("fsdp", two);
    assert!(
        said.len() == 1 && said[0].contains("has no units"),
        "{said:?}"
    );
    assert!(warnings("zero2", two).is_empty());
    assert!(warnings("fsdp", || two().in_units(["a", "b"]).unwrap()).is_empty());
}
