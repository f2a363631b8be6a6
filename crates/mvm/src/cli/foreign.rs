//! Words that people bring from other tools and earlier releases: what mvm calls the same thing, instead
//! of a tip at whatever is spelled alike.

use clap::error::{ContextKind, ContextValue, ErrorKind};

/// A tip that is less like what was typed than this (0 to 1, by Jaro-Winkler) helps nobody.
const ALIKE: f64 = 0.8;

/// Verbs of Docker, Compose, kubectl and their like, and what to type instead.
const VERBS: [(&str, &str); 41] = [
    (
        "build",
        "mvm reads images that others build: build one with `buildah` or `docker build`, and run it as oci:DIR, docker-archive:FILE or from a registry; `mvm pool build` builds a pool's",
    ),
    ("commit", "an instance's disk is its own: `mvm fork` makes another that goes on where it is"),
    (
        "compose",
        "`mvm up FILE` and `mvm down FILE` take a document of a tenant's pools; see `mvm up --help`",
    ),
    ("container", "an instance is what a container is there: `mvm ps`, `mvm instance --help`"),
    ("create", "`mvm pool create` and `mvm instance create`; `mvm run -d` does both and starts it"),
    ("delete", "`mvm rm`, `mvm pool destroy`, `mvm tenant destroy` or `mvm disk rm`"),
    ("describe", "`mvm instance info`, `mvm pool info`, `mvm why`"),
    (
        "diff",
        "mvm does not list what changed on an instance's disk; `mvm cp INSTANCE:/PATH .` fetches it",
    ),
    ("events", "`mvm agent serve` logs what happens; `mvm why` tells it of one instance"),
    ("export", "`mvm cp -a INSTANCE:/PATH - >FILE` makes a tar archive of what is there"),
    ("get", "`mvm ps`, `mvm pool list`, `mvm tenant list` or `mvm disk list`"),
    ("history", "`mvm pool info` lists a pool's earlier images"),
    ("images", "`mvm image list`"),
    ("import", "a tar archive is an image as it is: `mvm run rootfs:FILE -- COMMAND`"),
    ("info", "`mvm node info` for this machine, `mvm instance info` for an instance"),
    ("init", "`mvm bootstrap` makes this machine ready; `mvm up FILE` starts a tenant"),
    (
        "inspect",
        "`mvm instance info`, `mvm pool info` or `mvm disk info`, with `-o json` for all of it",
    ),
    ("kubectl", "mvm needs no Kubernetes; see `mvm --help`"),
    ("list", "`mvm ps`, `mvm pool list`, `mvm image list` or `mvm disk list`"),
    (
        "load",
        "archives are run as they are: `mvm run docker-archive:FILE`, or `cat FILE | mvm run docker-archive:-`",
    ),
    ("login", "mvm uses Docker's credentials: `docker login` or `skopeo login`"),
    ("ls", "`mvm ps`"),
    ("network", "each tenant has a network of its own: `mvm net --help`"),
    ("pause", "`mvm warm`, and `mvm resume` to go on; `mvm sleep` gives the memory back, too"),
    ("pin", "`mvm instance pin`"),
    ("port", "`mvm pool info` shows a pool's published ports; `mvm forward` opens one for a while"),
    ("prune", "`mvm image gc` removes what no pool needs"),
    (
        "pull",
        "`mvm run IMAGE` fetches what it needs; `mvm pool update` follows a tag that has moved",
    ),
    ("push", "mvm only reads registries: `skopeo copy` writes to them"),
    ("rename", "names are fixed: create another, and `mvm rm` this one"),
    ("rmi", "`mvm image rm`, or `mvm image gc` for all that nothing uses"),
    ("save", "mvm writes no images: `docker save`, `skopeo copy` or `buildah push` do"),
    ("scale", "`mvm pool scale`"),
    ("search", "mvm does not search registries: name the image as IMAGE:TAG"),
    ("system", "`mvm node info`, `mvm image gc` or `mvm doctor`"),
    ("tag", "an image is named where it comes from; a pool has a name: `mvm run --name`"),
    ("top", "`mvm stats`, or `mvm exec INSTANCE -- ps`"),
    ("unpause", "`mvm resume`"),
    ("unpin", "`mvm instance unpin`"),
    ("volume", "`mvm disk`, and `-v NAME:/PATH` to attach one"),
    (
        "wait",
        "`mvm attach` waits for a program's end and has its exit code; so has `mvm instance info`",
    ),
];

/// Options of the same origin.
const OPTIONS: [(&str, &str); 13] = [
    ("--add-host", "write it into the guest's /etc/hosts: `mvm exec`, or an image of your own"),
    ("--cap-add", "a guest has a kernel of its own, and its root every capability"),
    ("--device", "a guest has its own devices; data disks are attached with -v NAME:/PATH"),
    ("--env-file", "name each variable: -e NAME=VALUE"),
    ("--hostname", "a guest is named after its instance's id"),
    ("--init", "an image's own init is run as such; anything else runs under the guest agent"),
    ("--keep-vmm", "it was removed: sleeping instances keep no process"),
    ("--link", "instances of one tenant reach each other by their addresses: `mvm ps`"),
    ("--mount", "-v NAME:/PATH attaches a data disk"),
    ("--network", "each tenant has a network: --tenant, or --net none"),
    ("--platform", "images for the machine's own processor are run"),
    ("--privileged", "a guest has a kernel of its own: its root may do everything in it"),
    ("--pull", "`mvm pool update` follows a tag that has moved"),
];

/// What mvm calls a verb or an option that it does not have.
fn advice(typed: &str) -> Option<&'static str> {
    let word = typed.split('=').next().unwrap_or(typed);
    let all = VERBS.iter().chain(&OPTIONS);
    all.into_iter().find(|(foreign, _)| *foreign == word).map(|(_, advice)| *advice)
}

/// Gives an error about a word that mvm does not have the right advice, and takes tips away that are
/// at something else.
pub(super) fn advise(error: &mut clap::Error) {
    let (typed, tip) = match error.kind() {
        ErrorKind::InvalidSubcommand => {
            (ContextKind::InvalidSubcommand, ContextKind::SuggestedSubcommand)
        }
        ErrorKind::UnknownArgument => (ContextKind::InvalidArg, ContextKind::SuggestedArg),
        _ => return,
    };
    let Some(ContextValue::String(typed)) = error.get(typed) else { return };
    let typed = typed.clone();
    if let Some(advice) = advice(&typed) {
        error.remove(tip);
        error.remove(ContextKind::TrailingArg);
        let advice = vec![advice.into()];
        error.insert(ContextKind::Suggested, ContextValue::StyledStrs(advice));
        return;
    }
    // Nothing that begins with a dash is a name, so that no option was meant as one.
    if error.kind() == ErrorKind::UnknownArgument {
        error.remove(ContextKind::Suggested);
        error.remove(ContextKind::TrailingArg);
    }
    let is_near = |name: &String| strsim::jaro_winkler(bare(&typed), bare(name)) >= ALIKE;
    match error.get(tip) {
        Some(ContextValue::String(name)) if !is_near(name) => drop(error.remove(tip)),
        Some(ContextValue::Strings(names)) => {
            let near: Vec<String> = names.iter().filter(|name| is_near(name)).cloned().collect();
            match near.is_empty() {
                true => drop(error.remove(tip)),
                false => drop(error.insert(tip, ContextValue::Strings(near))),
            }
        }
        _ => {}
    }
}

fn bare(option: &str) -> &str {
    option.trim_start_matches('-').split(['=', ' ']).next().unwrap_or_default()
}
