//! Documents of images, as tools and strangers write them.

use serde_json::{Value, json};

use super::*;

const DIGEST: &str = "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";

fn manifest(config_type: &str, layer: Value) -> Result<Manifest, String> {
    let document: Document = serde_json::from_value(json!({
        "schemaVersion": 2, "mediaType": DOCKER_MANIFEST,
        "config": { "mediaType": config_type, "digest": DIGEST, "size": 2 },
        "layers": [layer],
    }))
    .unwrap();
    document.into_manifest("x").map_err(|error| error.to_string())
}

fn layer(kind: &str) -> Value {
    json!({ "mediaType": kind, "digest": DIGEST, "size": 3, "urls": ["https://example.com/l"] })
}

#[test]
fn layers_that_cannot_be_used_are_refused_with_the_reason() {
    for kind in LAYERS {
        assert!(manifest(CONFIGS[1], layer(kind)).is_ok(), "{kind}");
    }
    for (kind, part) in [
        ("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", "fetched from https://exa"),
        ("application/vnd.oci.image.layer.nondistributable.v1.tar", "is foreign"),
        ("application/vnd.oci.image.layer.v1.tar+gzip+encrypted", "is encrypted"),
        ("application/vnd.example.thing", "of the type application/vnd.example.thing: expected"),
    ] {
        let error = manifest(CONFIGS[0], layer(kind)).unwrap_err();
        assert!(error.contains(part), "{error}");
    }
    let error = manifest("application/vnd.cncf.helm.config.v1+json", layer(LAYERS[0])).unwrap_err();
    assert!(error.contains("not a container image but an artifact"), "{error}");
}

#[test]
fn dockers_manifests_of_long_ago_do_not_say_what_a_configuration_is() {
    assert!(manifest(OCTETS, layer(LAYERS[3])).is_ok());
    let document = json!({
        "schemaVersion": 2, "mediaType": OCI_MANIFEST, "artifactType": "application/vnd.example",
        "config": { "mediaType": OCTETS, "digest": DIGEST, "size": 2 }, "layers": [],
    });
    let document: Document = serde_json::from_value(document).unwrap();
    let error = document.into_manifest("x").unwrap_err().to_string();
    assert!(error.ends_with("an artifact of the type application/vnd.example"), "{error}");
}

#[test]
fn manifests_of_another_version_are_refused() {
    let old = json!({ "schemaVersion": 1, "name": "x", "fsLayers": [] });
    let old: Document = serde_json::from_value(old).unwrap();
    let error = old.into_manifest("x").unwrap_err().to_string();
    assert!(error.contains("version 1: expected"), "{error}");
}

fn for_platform(os: &str, architecture: &str, size: u64) -> Descriptor {
    serde_json::from_value(json!({
        "mediaType": OCI_MANIFEST, "digest": DIGEST, "size": size,
        "platform": { "os": os, "architecture": architecture },
    }))
    .unwrap()
}

#[test]
fn the_image_for_this_machine_is_chosen() {
    let host = Platform::host();
    let others = [for_platform("windows", &host.architecture, 1), for_platform("linux", "mips", 2)];
    let ours = for_platform("linux", &host.architecture, 3);
    let index = [others.as_slice(), &[ours]].concat();
    assert_eq!(choose_platform("x", &index).unwrap().size, 3);

    let unknown = for_platform("unknown", "unknown", 4);
    let error = choose_platform("x", &[others.as_slice(), &[unknown]].concat()).unwrap_err();
    let expected =
        format!("x has no image for {host}: it is for linux/mips, windows/{}", host.architecture);
    assert_eq!(error.to_string(), expected);
}

#[test]
fn an_architecture_may_have_the_kernels_name() {
    for (name, ours) in [("x86_64", "amd64"), ("aarch64", "arm64"), ("AMD64", "amd64")] {
        let host = Platform { os: "linux".into(), architecture: ours.into(), variant: None };
        let image = Platform { os: "Linux".into(), architecture: name.into(), variant: None };
        assert!(image.runs_on(&host), "{name}");
    }
}

#[test]
fn the_best_variant_that_a_guest_can_run_is_taken() {
    let host = Platform { os: "linux".into(), architecture: "amd64".into(), variant: None };
    let variant = |variant: Option<&str>, size| {
        let mut entry = for_platform("linux", "amd64", size);
        entry.platform.as_mut().unwrap().variant = variant.map(str::to_owned);
        entry
    };
    let all = [variant(Some("v4"), 4), variant(None, 1), variant(Some("v3"), 3), variant(None, 9)];
    let chosen = |entries: &[Descriptor], host_level: u8| {
        let level = Level { host: host_level, guests: host_level.min(3) };
        best_of("x", entries, &host, level).map(|entry| entry.size).map_err(|e| e.to_string())
    };
    assert_eq!((chosen(&all, 4), chosen(&all, 3)), (Ok(3), Ok(3)));
    assert_eq!((chosen(&all, 2), chosen(&all, 1)), (Ok(1), Ok(1)));
    assert_eq!(chosen(&all[..1], 4), Ok(4), "better than none");
    let error = chosen(&all[..1], 3).unwrap_err();
    assert_eq!(error, "x has no image for linux/amd64/v3: it is for linux/amd64/v4");

    let host = Platform { architecture: "arm64".into(), ..host };
    let mut v9 = for_platform("linux", "arm64", 9);
    v9.platform.as_mut().unwrap().variant = Some("v9".into());
    let level = Level { host: 1, guests: 1 };
    let plain = for_platform("linux", "arm64", 8);
    assert_eq!(best_of("x", &[v9, plain], &host, level).unwrap().size, 8);
}

fn config(value: Value) -> Config {
    serde_json::from_value(value).unwrap()
}

#[test]
fn what_an_image_says_about_running_it_is_kept() {
    let found = config(json!({
        "os": "linux", "architecture": "amd64", "rootfs": { "diff_ids": [DIGEST] },
        "config": {
            "Entrypoint": ["/entry", "-v"], "Cmd": null, "Env": ["A=b"], "User": "www:www",
            "WorkingDir": "/srv", "StopSignal": "SIGQUIT", "ExposedPorts": { "80/tcp": {} },
            "Healthcheck": { "Test": ["NONE"] }, "Volumes": { "/data": {} },
        },
    }));
    assert_eq!(found.diff_ids("x", 1).unwrap().len(), 1);
    assert!(found.diff_ids("x", 2).unwrap_err().to_string().contains("it has 2 layers"));
    let expected = ImageConfig {
        entrypoint: vec!["/entry".to_owned(), "-v".to_owned()],
        env: vec!["A=b".to_owned()],
        user: "www:www".to_owned(),
        working_dir: "/srv".to_owned(),
        stop_signal: Some("SIGQUIT".to_owned()),
        exposed_ports: ["80/tcp".to_owned()].into(),
        volumes: ["/data".to_owned()].into(),
        ..ImageConfig::default()
    };
    assert_eq!(found.into_image_config(), expected);
    let empty = config(json!({ "config": null, "rootfs": {} })).into_image_config();
    assert_eq!(empty, ImageConfig::default());
    let has_check = |check: Value| {
        let config = config(json!({ "config": { "Healthcheck": check }, "rootfs": {} }));
        config.into_image_config().has_healthcheck
    };
    assert!(has_check(json!({ "Test": ["CMD-SHELL", "true"] })));
    assert!(!has_check(json!({ "Test": ["NONE"] })) && !has_check(json!({ "Test": [] })));
    assert!(!has_check(json!(null)));
}

#[test]
fn an_init_is_handed_over_and_a_supervisor_of_one_service_is_not() {
    let init = |run: Value| config(json!({ "config": run, "rootfs": {} })).into_image_config().init;
    assert_eq!(init(json!({ "Cmd": ["/sbin/init"] })).as_deref(), Some("/sbin/init"));
    let systemd = json!({ "Entrypoint": ["/lib/systemd/systemd", "--log-target=console"] });
    assert_eq!(init(systemd).as_deref(), Some("/lib/systemd/systemd"));
    for run in [
        json!({ "Entrypoint": ["/init"] }),
        json!({ "Entrypoint": ["/entry"], "Cmd": ["/sbin/init"] }),
        json!({ "Cmd": ["/bin/sh"] }),
        json!({}),
    ] {
        assert_eq!(init(run.clone()), None, "{run}");
    }
}
