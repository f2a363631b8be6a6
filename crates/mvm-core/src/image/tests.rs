//! Image sources as text.

use proptest::prelude::*;

use super::*;

const DIGEST: &str = "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";

fn canonical(text: &str) -> String {
    text.parse::<ImageSpec>().unwrap_or_else(|error| panic!("{text}: {error}")).to_string()
}

#[test]
fn short_names_are_completed_as_docker_does() {
    for (text, full) in [
        ("nginx", "docker.io/library/nginx:latest"),
        ("nginx:1.27", "docker.io/library/nginx:1.27"),
        ("index.docker.io/nginx", "docker.io/library/nginx:latest"),
        ("grafana/loki", "docker.io/grafana/loki:latest"),
        ("ghcr.io/a/b_c/d--e:v1", "ghcr.io/a/b_c/d--e:v1"),
        ("localhost/x", "localhost/x:latest"),
        ("localhost:5000/x", "localhost:5000/x:latest"),
        ("[::1]:5000/x:1", "[::1]:5000/x:1"),
        ("docker://nginx", "docker.io/library/nginx:latest"),
        ("docker://builtin", "docker.io/library/builtin:latest"),
        ("docker:27", "docker.io/library/docker:27"),
    ] {
        assert_eq!(canonical(text), full, "{text}");
    }
    let pinned = format!("nginx@{DIGEST}");
    assert_eq!(canonical(&pinned), format!("docker.io/library/{pinned}"), "no tag is made up");
    let both = format!("nginx:1@{DIGEST}");
    assert_eq!(canonical(&both), format!("docker.io/library/{both}"));
}

#[test]
fn each_kind_of_source_round_trips() {
    for text in [
        "builtin",
        "docker.io/library/nginx:1.27",
        "oci:/srv/layout",
        "oci:/srv/layout:v1",
        "oci-archive:a/b.tar",
        "docker-archive:/tmp/x.tar:busybox:latest",
        "mmdebstrap:bookworm",
        "mmdebstrap:bookworm,curl,openssh-server",
        "rootfs:/srv/root.tar.zst",
    ] {
        assert_eq!(canonical(text), text);
        let json = serde_json::to_string(&text.parse::<ImageSpec>().unwrap()).unwrap();
        assert_eq!(json, format!("\"{text}\""));
    }
    assert_eq!(canonical("mmdebstrap:sid,b,a,b"), "mmdebstrap:sid,a,b", "a set has one form");
}

#[test]
fn what_is_no_source_is_refused_with_what_is_expected() {
    for (text, part) in [
        ("", "is empty"),
        ("Nginx", "`Nginx` is not part of an image's name"),
        ("nginx:", "`` is not a tag"),
        ("nginx:a b", "is not a tag"),
        ("a//b", "`` is not part"),
        ("nginx@sha256:12", "is not a digest"),
        ("nginx@md5:12", "is not a digest"),
        ("exa_mple.com/x", "is not a registry"),
        ("localhost:99999/x", "is not a registry"),
        ("oci:", "empty path"),
        ("oci:/x:", "is not the name of an image"),
        ("rootfs:/a:b", "without colons"),
        ("rootfs:/a\nb", "control characters"),
        ("mmdebstrap:", "is not a Debian suite"),
        ("mmdebstrap:--help", "is not a Debian suite"),
        ("mmdebstrap:sid,--x", "is not a Debian package"),
        ("docker-daemon:nginx", "cannot read `docker-daemon:`"),
        ("dir:/x", "cannot read `dir:`"),
    ] {
        let error = text.parse::<ImageSpec>().unwrap_err();
        assert!(error.contains(part) && error.contains("expected"), "{text}: {error}");
    }
}

#[test]
fn a_path_is_replaced_without_touching_the_rest() {
    let spec: ImageSpec = "oci:layout:v1".parse().unwrap();
    assert_eq!(spec.path(), Some("layout"));
    assert_eq!(spec.clone().with_path("/srv/layout").unwrap().to_string(), "oci:/srv/layout:v1");
    assert!(spec.with_path("/a:b").is_err());
    assert_eq!(ImageSpec::Builtin.with_path("/x").unwrap(), ImageSpec::Builtin);
}

proptest! {
    #[test]
    fn whatever_parses_is_the_same_again_in_its_full_form(text in "[a-z0-9:/@._,A-Z -]{0,40}") {
        if let Ok(spec) = text.parse::<ImageSpec>() {
            prop_assert_eq!(spec.to_string().parse::<ImageSpec>(), Ok(spec));
        }
    }

    #[test]
    fn plausible_names_round_trip(
        text in "([a-z]{1,4}(\\.[a-z]{1,3})?(:[1-9][0-9]{1,3})?/)?[a-z]{1,5}(/[a-z0-9]{1,4})?(:[a-z0-9.]{1,4})?"
    ) {
        if let Ok(spec) = text.parse::<ImageSpec>() {
            prop_assert_eq!(spec.to_string().parse::<ImageSpec>(), Ok(spec));
        }
    }
}
