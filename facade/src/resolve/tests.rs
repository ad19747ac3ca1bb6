//! Resolution: every choice on every hardware, every refusal, every reason.

use fabric_engine::shard::placement::{DDP, FSDP};

use super::*;

fn found(name: &str, devices: std::result::Result<usize, &str>) -> Found {
    Found {
        name: name.into(),
        aliases: Vec::new(),
        devices: devices
            .map(|count| vec![format!("a {name}"); count])
            .map_err(String::from),
        backend: Ok(()),
        auto_count: if name == "cpu" {
            1
        } else {
            devices.unwrap_or(0)
        },
        is_numbered: name != "cpu",
    }
}

/// A machine with so many cards, and whether this build can use them.
fn machine(cards: usize, usable: bool) -> Hardware {
    let mut cuda = match cards {
        0 => found("cuda", Err("no driver was found")),
        _ => found("cuda", Ok(cards)),
    };
    if !usable {
        cuda.backend = Err("this build has no CUDA".into());
    }
    Hardware(vec![
        found("tpu", Err("no TPU was found")),
        found("metal", Err("this is Linux")),
        cuda,
        found("cpu", Ok(1)),
    ])
}

fn request(accelerator: &str, strategy: &str, devices: impl Into<Devices>) -> Request {
    Request {
        accelerator: Some(accelerator.into()),
        strategy: Some(strategy.into()),
        devices: devices.into(),
        ..Request::default()
    }
}

/// Ranks that torchrun has started.
fn place(world: usize, local_world: usize) -> Detection {
    let place = Place {
        local_world,
        nodes: world / local_world,
        ..Place::new("torchrun", 0, world, ([127, 0, 0, 1], 1).into())
    };
    Detection {
        reason: format!("ranks: {world}, started by torchrun"),
        place: Some(place),
        remarks: Vec::new(),
    }
}

fn why(request: &Request, hardware: &Hardware) -> String {
    resolve(request, None, hardware).unwrap_err().to_string()
}

// Line 1 and CON-01, CON-02, CON-04: each hardware, each way of asking.
#[test]
fn line_1_choices_follow_the_hardware() {
    let (bare, cards, unusable) = (machine(0, true), machine(4, true), machine(4, false));
    let chosen = |request: &Request, hardware: &Hardware| {
        let resolved = resolve(request, None, hardware).unwrap();
        let Resolved {
            accelerator,
            strategy,
            ..
        } = &resolved;
        format!("{accelerator} {} {}", resolved.devices(), strategy.name)
    };
    let auto = Request::default();
    assert_eq!(chosen(&auto, &bare), "cpu 1 single");
    assert_eq!(chosen(&auto, &cards), "cuda 4 ddp");
    assert_eq!(chosen(&auto, &unusable), "cpu 1 single");
    for name in ["cuda", "CUDA", "gpu", "Gpu"] {
        assert_eq!(chosen(&request(name, "auto", "auto"), &cards), "cuda 4 ddp");
        assert_eq!(chosen(&request(name, "auto", 1), &cards), "cuda 1 single");
        assert_eq!(chosen(&request(name, "FSDP", -1), &cards), "cuda 4 fsdp");
        assert_eq!(chosen(&request(name, "auto", "0,2"), &cards), "cuda 2 ddp");
    }
    assert_eq!(chosen(&request("cpu", "auto", 3), &cards), "cpu 3 ddp");
    let listed = resolve(&request("cuda", "auto", [3, 1]), None, &cards).unwrap();
    assert_eq!(listed.device_indices, [3, 1]);
    let nodes = Request {
        num_nodes: Some(2),
        ..Request::default()
    };
    let two = resolve(&nodes, None, &bare).unwrap();
    assert_eq!((two.world_size, two.strategy, two.num_nodes), (2, DDP, 2));
}

// Line 2: what is refused, each in words that lead out.
#[test]
fn line_2_bad_requests_say_what_to_do() {
    let bare = machine(0, true);
    let cards = machine(2, true);
    for (request, hardware, words) in [
        (
            request("cpu", "ddp", 0),
            &bare,
            ["0 devices", "Ask for at least one"],
        ),
        (
            request("cpu", "dpp", 2),
            &bare,
            ["'dpp'", "auto, single, ddp"],
        ),
        (
            request("cpu", "single", 2),
            &bare,
            ["'single' with 2", "Use strategy \"ddp\""],
        ),
        (
            request("npu", "auto", 1),
            &bare,
            ["'npu' is not known", "tpu, metal, cuda, cpu"],
        ),
        (
            request("cuda", "auto", 1),
            &bare,
            ["no driver was found", "those that can: cpu"],
        ),
        (
            request("gpu", "auto", 1),
            &bare,
            ["this is Linux; cuda: no driver", "used: cpu"],
        ),
        (
            request("tpu", "auto", 1),
            &bare,
            ["no TPU was found", "those that can: cpu"],
        ),
        (
            request("cuda", "ddp", 3),
            &cards,
            ["3 devices of 'cuda'", "there are 2"],
        ),
        (request("cuda", "ddp", "0,0"), &cards, ["device 0", "twice"]),
        (
            request("cuda", "ddp", [5]),
            &cards,
            ["device 5", "numbered from 0"],
        ),
        (
            request("cpu", "ddp", "0,1"),
            &cards,
            ["have no numbers", "devices(2)"],
        ),
        (
            request("cpu", "xla", 1),
            &bare,
            ["'xla' is for TPUs", "Use ddp or fsdp"],
        ),
    ] {
        let text = why(&request, hardware);
        assert!(words.iter().all(|word| text.contains(word)), "{text}");
    }
    let nodes = Request {
        num_nodes: Some(0),
        ..Request::default()
    };
    assert!(why(&nodes, &bare).contains("num_nodes = 0"));
    let precision = Request {
        precision: Some("31-true".into()),
        ..Request::default()
    };
    assert!(why(&precision, &bare).contains("32-true, 64-true"));
}

#[test]
fn a_card_that_cannot_be_used_is_named_and_passed_over() {
    let unusable = machine(2, false);
    let text = why(&request("cuda", "auto", 1), &unusable);
    assert!(
        text.contains("a cuda, a cuda found, but this build has no CUDA"),
        "{text}"
    );
    let auto = resolve(&Request::default(), None, &unusable).unwrap();
    let reason = &auto.reasons[0];
    assert!(
        reason.contains("accelerator = cpu") && reason.contains("cuda was passed over"),
        "{reason}"
    );
}

// CON-05: what Lightning refuses off CUDA runs here, and old names of data parallelism are understood.
#[test]
fn fsdp_runs_on_a_cpu_and_dp_is_ddp() {
    let bare = machine(0, true);
    let fsdp = resolve(&request("cpu", "fsdp", 2), None, &bare).unwrap();
    assert_eq!(
        (fsdp.strategy, fsdp.state_dict_type),
        (FSDP, StateDictType::Sharded)
    );
    let dp = resolve(&request("cpu", "dp", 2), None, &bare).unwrap();
    assert_eq!(dp.strategy, DDP);
    let said = "strategy = ddp: asked for as dp (as ddp: each device has a rank of its own)";
    assert!(dp.reasons.contains(&said.to_string()), "{:?}", dp.reasons);
}

// BUG-01, ENV-01: ranks that an environment has started must be those that were asked for.
#[test]
fn bug_01_a_world_that_was_not_asked_for_is_refused() {
    let bare = machine(0, true);
    let of = |devices: Devices, num_nodes, place: &Detection| {
        let request = Request {
            devices,
            num_nodes,
            ..Request::default()
        };
        resolve(&request, Some(place), &bare)
    };
    let open = of(Devices::Auto, None, &place(4, 2)).unwrap();
    assert_eq!((open.world_size, open.num_nodes, open.devices()), (4, 2, 2));
    assert_eq!(open.strategy, DDP);
    assert_eq!(of(2.into(), Some(2), &place(4, 2)).unwrap().world_size, 4);
    for (devices, nodes, place) in [
        (Devices::from(1), None, place(4, 4)),
        (Devices::from(8), None, place(4, 4)),
        (Devices::from("0,1"), None, place(3, 3)),
        (Devices::Auto, Some(3), place(4, 2)),
        (Devices::from(2), Some(1), place(4, 2)),
    ] {
        let text = of(devices, nodes, &place).unwrap_err().to_string();
        assert!(
            text.contains("were asked for") && text.contains("but torchrun started"),
            "{text}"
        );
    }
    let text = of("many".into(), None, &place(2, 2))
        .unwrap_err()
        .to_string();
    assert!(text.contains("devices = 'many'"), "{text}");
}

#[test]
fn every_choice_has_a_reason() {
    let resolved = resolve(&request("auto", "ddp", 2), None, &machine(0, true)).unwrap();
    assert_eq!(resolved.reasons.len(), 4);
    assert!(
        resolved
            .reasons
            .contains(&"strategy = ddp: asked for".to_string())
    );
}

#[test]
fn an_old_spelling_of_a_precision_is_remarked_on() {
    let reason = |text: &str| {
        let request = Request {
            precision: Some(text.into()),
            ..Request::default()
        };
        let resolved = resolve(&request, None, &machine(0, true)).unwrap();
        resolved.reasons.into_iter().next_back().unwrap()
    };
    assert_eq!(reason("BF16-Mixed"), "precision = bf16-mixed: asked for");
    assert_eq!(
        reason("16"),
        "precision = 16-mixed: asked for as \"16\", which is better written out"
    );
}

// API-14
#[test]
fn each_local_rank_has_the_device_that_was_asked_for() {
    let cards = resolve(&request("cuda", "ddp", "0,2"), None, &machine(4, true)).unwrap();
    let shown = [0, 1].map(|local_rank| cards.device(local_rank).to_string());
    assert_eq!(shown, ["cuda:0", "cuda:2"]);
    let cpu = resolve(&request("cpu", "ddp", 2), None, &machine(4, true)).unwrap();
    assert_eq!(
        [0, 1].map(|rank| cpu.device(rank).to_string()),
        ["cpu", "cpu"]
    );
}

// STR-02: what connects ranks, and for how long they wait for one another.
#[test]
fn wires_and_times_that_cannot_be_are_refused() {
    let of = |wire: Option<&str>, timeout: Option<Duration>| {
        let request = Request {
            wire: wire.map(Into::into),
            timeout,
            ..request("cpu", "ddp", 2)
        };
        resolve(&request, None, &machine(0, true)).map_err(|error| error.to_string())
    };
    assert_eq!(of(None, None).unwrap().wire, Wire::Auto);
    assert_eq!(of(Some(" SHM "), None).unwrap().wire, Wire::Shm);
    assert!(
        of(Some("pigeon"), None)
            .unwrap_err()
            .contains("wire = 'pigeon'")
    );
    assert!(
        of(None, Some(Duration::ZERO))
            .unwrap_err()
            .contains("timeout = 0 s")
    );
    let reasons = of(None, Some(Duration::from_secs(90))).unwrap().reasons;
    assert!(reasons.contains(&"timeout = 90 s for one collective: asked for".to_string()));
}

// CON-04: a launcher's ranks may not share a card, or have one that is not there, any more than our own.
#[test]
fn devices_that_make_no_sense_make_none_under_a_launcher() {
    let cards = machine(4, true);
    for (devices, word) in [
        (vec![2, 2], "device 2 of 'cuda' was asked for twice"),
        (vec![0, 9], "device 9 of 'cuda' was asked for"),
    ] {
        let request = request("cuda", "ddp", devices);
        let error = resolve(&request, Some(&place(2, 2)), &cards).unwrap_err();
        assert!(error.to_string().contains(word), "{error}");
    }
    let request = request("cuda", "ddp", vec![3, 1]);
    let resolved = resolve(&request, Some(&place(2, 2)), &cards).unwrap();
    assert_eq!(resolved.device_indices, [3, 1]);
}
