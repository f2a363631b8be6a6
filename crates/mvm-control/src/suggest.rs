//! Which name was meant by one that does not exist.
//!
//! Errors about what does not exist are made in several places; each passes through here on its way
//! out, so that a typing error is answered with the name that was meant.

use mvm_core::name::{DEFAULT_TENANT, Selector};

use mvm_core::mirror::Mirror;

/// Names of this likeness or more (0 to 1, by Jaro-Winkler) are worth mentioning: one letter that is
/// wrong, missing, doubled or swapped.
const ALIKE: f64 = 0.85;

/// What does not exist.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Tenant,
    Pool,
    Disk,
    Instance,
}

/// The existing name that is most like what was typed, as a hint.
pub(crate) fn did_you_mean(mirror: &Mirror, kind: Kind, typed: &str) -> Option<String> {
    let desired = &mirror.desired;
    let names: Vec<String> = match kind {
        Kind::Tenant => desired.tenants.keys().map(ToString::to_string).collect(),
        Kind::Pool => desired.pools.keys().map(ToString::to_string).collect(),
        Kind::Disk => desired.disks.keys().map(ToString::to_string).collect(),
        // Whoever typed an id alone reads one.
        Kind::Instance if !typed.contains('/') => {
            desired.instances.keys().map(|path| path.id.to_string()).collect()
        }
        Kind::Instance => desired.instances.keys().map(ToString::to_string).collect(),
    };
    did_you_mean_one_of(typed, &names)
}

fn did_you_mean_one_of(typed: &str, names: &[String]) -> Option<String> {
    nearest(typed, names).map(|name| format!("did you mean {name}?"))
}

/// The same for what a selector names.
pub(crate) fn did_you_mean_selector(mirror: &Mirror, selector: &Selector) -> Option<String> {
    let kind = match selector {
        Selector::All => return None,
        Selector::Tenant(name) => {
            let pools = mirror.desired.pools.keys();
            let pools = pools.filter(|pool| pool.tenant.as_str() == DEFAULT_TENANT);
            let names = pools.map(|pool| pool.pool.to_string());
            let names = names.chain(mirror.desired.tenants.keys().map(ToString::to_string));
            return did_you_mean_one_of(name.as_str(), &names.collect::<Vec<_>>());
        }
        Selector::Pool(_) => Kind::Pool,
        Selector::Id { .. } => Kind::Instance,
    };
    did_you_mean(mirror, kind, &selector.to_string())
}

fn nearest<'a>(typed: &str, names: &'a [String]) -> Option<&'a str> {
    let likeness = |name: &'a String| (strsim::jaro_winkler(typed, name), name.as_str());
    let alike = names.iter().map(likeness).filter(|(likeness, _)| *likeness >= ALIKE);
    alike.max_by(|(one, _), (other, _)| one.total_cmp(other)).map(|(_, name)| name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slip_of_the_finger_is_understood_and_another_name_is_not() {
        let names = ["demo", "acme", "demo/web", "demo/worker"].map(str::to_owned);
        for (typed, meant) in [
            ("dmeo", Some("demo")),
            ("demp", Some("demo")),
            ("acmee", Some("acme")),
            ("demo/wbe", Some("demo/web")),
            ("demo/workers", Some("demo/worker")),
            ("production", None),
            ("x", None),
        ] {
            assert_eq!(nearest(typed, &names), meant, "{typed}");
        }
        assert_eq!(nearest("demo", &[]), None);
    }
}
