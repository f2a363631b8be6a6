//! Links of a root filesystem that lead to an init: a program is known by its name, and a link may have any.
//!
//! Links are resolved by their text alone, as inside a `chroot`: whatever an image's links say, nothing
//! outside of its tree is looked at.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use mvm_core::init::InitMode;

use super::durable::{FileError, Named};

/// Most links on the way to one program, as for Linux.
const MAX_LINKS: usize = 40;

/// The links of a tree that lead to an init, by their paths in the image, each with what it is as a main
/// process, where its own name does not say the same.
pub(super) fn init_links(tree: &Path) -> Result<BTreeMap<String, InitMode>, FileError> {
    let mut links = BTreeMap::new();
    collect(tree, "", &mut links)?;
    Ok(leading_to_inits(&links))
}

/// The targets of all links below a directory, by their paths in the image.
fn collect(dir: &Path, name: &str, links: &mut BTreeMap<String, String>) -> Result<(), FileError> {
    for entry in fs::read_dir(dir).named("read directory", dir)? {
        let entry = entry.named("read directory", dir)?;
        // Names that are not UTF-8 are nobody's command.
        let Ok(last) = entry.file_name().into_string() else { continue };
        let (name, path) = (format!("{name}/{last}"), entry.path());
        let kind = entry.file_type().named("read", &path)?;
        if kind.is_dir() {
            collect(&path, &name, links)?;
        } else if kind.is_symlink()
            && let Ok(target) =
                fs::read_link(&path).named("read link", &path)?.into_os_string().into_string()
        {
            links.insert(name, target);
        }
    }
    Ok(())
}

fn leading_to_inits(links: &BTreeMap<String, String>) -> BTreeMap<String, InitMode> {
    let mut found = BTreeMap::new();
    for link in links.keys() {
        let Some(hops) = hops(links, link) else { continue };
        let mode = InitMode::behind(&hops);
        if mode != InitMode::of(&[link]) {
            found.insert(link.clone(), mode);
        }
    }
    // `/bin` and its like are links themselves in many images, and programs are called by such paths.
    let is_top = |link: &&String| link.rfind('/') == Some(0);
    let mut aliases = BTreeMap::new();
    for top in links.keys().filter(is_top) {
        let Some(real) = hops(links, top).and_then(|mut hops| hops.pop()) else { continue };
        for (link, mode) in &found {
            if let Some(rest) = link.strip_prefix(&real).filter(|rest| rest.starts_with('/')) {
                aliases.insert(format!("{top}{rest}"), *mode);
            }
        }
    }
    found.extend(aliases);
    found
}

/// The paths on the way from a link to what it leads to, both of them included; `None` if it leads nowhere.
fn hops(links: &BTreeMap<String, String>, link: &str) -> Option<Vec<String>> {
    let mut rest: Vec<&str> = link.rsplit('/').collect();
    let (mut here, mut hops, mut followed) = (String::new(), Vec::new(), 0);
    while let Some(name) = rest.pop() {
        match name {
            "" | "." => continue,
            ".." => {
                here.truncate(here.rfind('/').unwrap_or(0));
                continue;
            }
            _ => {}
        }
        let parent = here.len();
        here.push('/');
        here.push_str(name);
        let Some(target) = links.get(&here) else { continue };
        followed += 1;
        if followed > MAX_LINKS {
            return None;
        }
        if rest.is_empty() {
            hops.push(here.clone());
        }
        here.truncate(if target.starts_with('/') { 0 } else { parent });
        rest.extend(target.rsplit('/'));
    }
    hops.push(here);
    Some(hops)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(links: &[(&str, &str)]) -> Vec<(String, InitMode)> {
        let links = links.iter().map(|(link, target)| ((*link).to_owned(), (*target).to_owned()));
        leading_to_inits(&links.collect()).into_iter().collect()
    }

    #[test]
    fn a_link_is_what_it_leads_to() {
        for (links, link, mode) in [
            (&[("/init", "/lib/systemd/systemd")][..], "/init", InitMode::System),
            (&[("/init", "lib/systemd/systemd")], "/init", InitMode::System),
            (&[("/entry", "/sbin/init")], "/entry", InitMode::System),
            (
                &[("/entry", "sbin/init"), ("/sbin/init", "/bin/busybox")],
                "/entry",
                InitMode::System,
            ),
            (
                &[("/entry", "/sbin/init"), ("/sbin/init", "../lib/sysvinit/init")],
                "/entry",
                InitMode::System,
            ),
            (&[("/sbin/init", "/usr/bin/tini")], "/sbin/init", InitMode::Program),
            (&[("/a/b/run", "../../../x/dumb-init")], "/a/b/run", InitMode::Program),
        ] {
            assert!(
                found(links).contains(&(link.to_owned(), mode)),
                "{links:?}: {:?}",
                found(links)
            );
        }
    }

    #[test]
    fn links_below_a_linked_directory_are_found_by_both_names() {
        let links = [("/bin", "usr/bin"), ("/usr/bin/start", "../lib/systemd/systemd")];
        let system = |link: &str| (link.to_owned(), InitMode::System);
        assert_eq!(found(&links), [system("/bin/start"), system("/usr/bin/start")]);
        let through = [("/lib", "usr/lib"), ("/usr/lib", "/opt"), ("/go", "/lib/systemd")];
        assert_eq!(found(&through), [system("/go")]);
    }

    #[test]
    fn names_that_say_it_themselves_and_links_that_lead_nowhere_are_left_out() {
        let links = [
            ("/sbin/init", "/lib/systemd/systemd"),
            ("/sbin/poweroff", "/bin/systemctl"),
            ("/bin/sh", "dash"),
            ("/loop", "loop"),
            ("/up", "../../.."),
            ("/init", "/bin/busybox"),
        ];
        assert_eq!(found(&links), []);
    }
}
