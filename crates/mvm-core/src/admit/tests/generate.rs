//! Requests of every kind against a small node, and what becomes known of it between them.

use proptest::prelude::*;
use proptest::strategy::Union;

use super::*;
use crate::name::{DiskName, PoolName};
use crate::record::{Base, BuildState, PastRevision};
use crate::spec::{DocumentDisk, DocumentPool, RestartPolicy};

/// What is asked, by whom.
#[derive(Debug, Clone)]
pub(super) enum Asked {
    Outside(Request),
    Own(OwnRequest),
}

/// Lists the kinds of requests: one that is missing here does not compile, and one that is here needs a strategy.
macro_rules! asked {
    ($($kind:ident),* ; $($own:ident),* $(,)?) => {
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
        pub(super) enum Kind { $($kind,)* $($own),* }

        pub(super) const KINDS: &[Kind] = &[$(Kind::$kind,)* $(Kind::$own),*];
        const FROM_OUTSIDE: &[Kind] = &[$(Kind::$kind),*];

        pub(super) fn kind(asked: &Asked) -> Kind {
            match asked {
                $(Asked::Outside(Request::$kind { .. }) => Kind::$kind,)*
                $(Asked::Own(OwnRequest::$own { .. }) => Kind::$own),*
            }
        }
    };
}

asked! {
    TenantCreate, TenantUpdate, TenantMove, TenantDestroy, PoolCreate, PoolBuild, PoolUpdate,
    PoolRollback, PoolScale, PoolDestroy, PoolReady, PoolPolicy, PoolWarmUp,
    InstanceCreate, InstanceStart, InstanceStop, InstanceWarm, InstanceSleep,
    InstancePin, InstanceRestart, InstanceDestroy, DiskCreate, DiskResize, DiskRemove, Apply, Remove;
    Spares, BeginFork, MakeForks,
}

/// What is known of an instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Seen {
    Running,
    Warm,
    Sleeping,
    Stopped,
    Failed,
    /// Its record does not parse.
    Unreadable,
}

#[derive(Debug, Clone)]
pub(super) enum Step {
    Ask(Asked),
    /// What is to go is gone.
    Gone,
    /// The instance of this number, or each if there is none, is seen so.
    See(Option<usize>, Seen),
    /// What is known of a pool's image. The base is of what the pool is like at that moment.
    Build(PoolPath, Box<PoolStatus>),
}

pub(super) fn any_tenant() -> impl Strategy<Value = TenantName> {
    prop_oneof![5 => Just("a"), 1 => Just("b")].prop_map(|name| name.parse().unwrap())
}

pub(super) fn any_pool_path() -> impl Strategy<Value = PoolPath> {
    (any_tenant(), any_pool_name()).prop_map(|(tenant, pool)| PoolPath { tenant, pool })
}

fn any_pool_name() -> impl Strategy<Value = PoolName> {
    prop_oneof![3 => Just("x"), 1 => Just("y")].prop_map(|name| name.parse().unwrap())
}

fn any_disk_name() -> impl Strategy<Value = DiskName> {
    prop_oneof![3 => Just("d"), 1 => Just("e")].prop_map(|name| name.parse().unwrap())
}

fn any_disk_path() -> impl Strategy<Value = DiskPath> {
    (any_tenant(), any_disk_name()).prop_map(|(tenant, disk)| DiskPath { tenant, disk })
}

fn any_disk_mib() -> impl Strategy<Value = u64> {
    prop_oneof![4 => Just(16), 2 => Just(32), 1 => Just(8), 1 => Just(700)]
}

fn any_mounts() -> impl Strategy<Value = Vec<DiskMount>> {
    let mount = prop_oneof![
        3 => Just("d:/d"),
        3 => Just("d:/d:ro"),
        1 => Just("d:/e:ro"),
        1 => Just("e:/e")
    ];
    let mount = mount.prop_map(|mount| mount.parse().unwrap());
    prop_oneof![Just(vec![]), prop::collection::vec(mount, 1..3)]
}

fn any_image() -> impl Strategy<Value = ImageSpec> {
    prop_oneof![3 => Just("builtin"), 1 => Just("app:1")].prop_map(|image| image.parse().unwrap())
}

fn any_policy() -> impl Strategy<Value = SleepPolicy> {
    let time = || prop_oneof![Just(None), Just(Some(60)), Just(Some(300))];
    (time(), time()).prop_map(|(warm_after_s, sleep_after_s)| SleepPolicy {
        warm_after_s,
        sleep_after_s,
        ..SleepPolicy::default()
    })
}

fn any_ready() -> impl Strategy<Value = u32> {
    prop_oneof![4 => 0..3u32, 1 => Just(65)]
}

/// A pool's size follows from its name: what is larger in one is smaller in the other.
fn plain_spec(pool: &PoolName) -> PoolSpec {
    let vcpus = if pool.as_str() == "x" { 1 } else { 2 };
    PoolSpec { vcpus, mem_mib: 100 * vcpus, disk_mib: 60 / vcpus, ..PoolSpec::default() }
}

fn odd_spec(plain: PoolSpec) -> impl Strategy<Value = PoolSpec> {
    use RestartPolicy::{Always, Never, OnFailure};
    let vcpus = prop_oneof![9 => Just(plain.vcpus), 1 => Just(0)];
    let restart = prop_oneof![Just(OnFailure), Just(Always), Just(Never)];
    let port = prop_oneof![Just("8080:80"), Just("0.0.0.0:8080:80"), Just("8081:80")];
    let publish = prop::collection::vec(port.prop_map(|port| port.parse().unwrap()), 0..2);
    let ends = (any::<bool>(), any::<bool>());
    let inside = (any_image(), any_mounts(), vcpus);
    (inside, restart, publish, any_policy(), any_ready(), ends).prop_map(
        move |((image, disks, vcpus), restart, publish, sleep_policy, ready, ends)| {
            let (auto_remove, ephemeral) = ends;
            PoolSpec {
                image,
                disks,
                vcpus,
                restart,
                publish,
                sleep_policy,
                ready,
                auto_remove,
                ephemeral,
                ..plain.clone()
            }
        },
    )
}

fn any_spec(pool: &PoolName) -> impl Strategy<Value = PoolSpec> + use<> {
    let plain = plain_spec(pool);
    prop_oneof![1 => Just(plain.clone()), 2 => odd_spec(plain)]
}

fn any_limit(most: u64) -> impl Strategy<Value = Option<u64>> {
    prop_oneof![4 => Just(None), 1 => (0..=most).prop_map(Some)]
}

fn any_quota() -> impl Strategy<Value = Quota> {
    (any_limit(9), any_limit(900), any_limit(600), any_limit(6), any_limit(2), any_limit(6))
        .prop_map(|(vcpus, mem_mib, disk_mib, running, pools, instances_per_pool)| Quota {
            vcpus,
            mem_mib,
            disk_mib,
            running,
            pools,
            instances_per_pool,
        })
}

/// One with room, small ones that overlap, one of the machine's own, and ones that no tenant can have.
fn any_subnet() -> impl Strategy<Value = Ipv4Net> {
    const SUBNETS: &[&str] = &[
        "10.7.0.0/24",
        "10.0.0.0/28",
        "10.0.0.8/29",
        "10.240.1.0/29",
        "10.9.9.0/29",
        "10.0.0.1/28",
        "10.8.0.0/30",
    ];
    prop::sample::select(SUBNETS).prop_map(|subnet| subnet.parse().unwrap())
}

pub(super) fn any_document() -> impl Strategy<Value = Document> {
    let pool = any_pool_name().prop_flat_map(|name| {
        let spec = any_spec(&name);
        (Just(name), spec, 0..4u32, any::<bool>())
    });
    let subnet = prop_oneof![3 => Just(None), 1 => any_subnet().prop_map(Some)];
    let quota = prop_oneof![3 => Just(None), 1 => any_quota().prop_map(Some)];
    let disks = prop::collection::btree_map(any_disk_name(), any_disk_mib(), 0..2);
    let pools = prop::collection::vec(pool, 0..3);
    (any_tenant(), subnet, quota, disks, pools).prop_map(|(tenant, subnet, quota, disks, pools)| {
        let disks = disks.into_iter();
        let disks = disks.map(|(name, size_mib)| (name, DocumentDisk { size_mib })).collect();
        let pools = pools.into_iter().map(|(name, mut spec, running, names_image)| {
            // A pool of a document goes with its document.
            (spec.auto_remove, spec.ephemeral) = (false, false);
            if !names_image {
                spec.image = ImageSpec::default();
            }
            (name, DocumentPool { running, names_image, spec })
        });
        Document { tenant, subnet, quota, disks, pools: pools.collect() }
    })
}

/// A selector of each kind; several ids begin with the shortest ones.
fn any_selector() -> impl Strategy<Value = Selector> {
    let pool = || prop_oneof![2 => Just(None), 1 => any_pool_path().prop_map(Some)];
    let prefix = prop_oneof![
        4 => (1..7u32).prop_map(|bits| InstanceId::from_bits(bits).as_str().to_owned()),
        1 => Just("i-0000000".to_owned()),
        1 => Just("i-f".to_owned()),
    ];
    prop_oneof![
        1 => Just(Selector::All),
        2 => any_tenant().prop_map(Selector::Tenant),
        3 => any_pool_path().prop_map(Selector::Pool),
        3 => (pool(), prefix).prop_map(|(pool, prefix)| Selector::Id { pool, prefix }),
    ]
}

fn any_all() -> impl Strategy<Value = bool> {
    prop_oneof![3 => Just(true), 1 => Just(false)]
}

fn revision(number: u8) -> RevisionId {
    RevisionId::from_digest([number; 8])
}

/// How often a kind is asked for: what makes something, more often than what takes it away.
fn weight(kind: Kind) -> u32 {
    use Kind::*;
    match kind {
        TenantCreate | PoolScale | InstanceCreate => 6,
        PoolCreate => 12,
        BeginFork => 6,
        TenantMove | DiskCreate | Spares | MakeForks | Apply => 4,
        PoolWarmUp | InstancePin | InstanceStart | InstanceStop | InstanceWarm | InstanceSleep
        | InstanceRestart | InstanceDestroy | DiskResize => 2,
        TenantUpdate | TenantDestroy | PoolBuild | PoolUpdate | PoolRollback | PoolDestroy
        | PoolReady | PoolPolicy | DiskRemove | Remove => 1,
    }
}

/// Few ids, so that one is asked for again.
fn any_fork() -> impl Strategy<Value = RequestId> {
    (0..3u128).prop_map(RequestId::from_bits)
}

fn asked_of(kind: Kind) -> BoxedStrategy<Asked> {
    let own = match kind {
        Kind::Spares => (any_pool_path(), 0..4u32)
            .prop_map(|(pool, count)| OwnRequest::Spares { pool, count })
            .boxed(),
        Kind::BeginFork => (any_fork(), any_pool_path(), 1..4u32, 0..3u32)
            .prop_map(|(id, pool, bits, count)| {
                let source = pool.instance(InstanceId::from_bits(bits));
                OwnRequest::BeginFork { id, source, count }
            })
            .boxed(),
        Kind::MakeForks => (any_fork(), 1..4u32)
            .prop_map(|(id, bits)| {
                let (snapshot, revision) = (SnapshotId::from_bits(bits), revision(9));
                OwnRequest::MakeForks { id, snapshot, revision }
            })
            .boxed(),
        kind => return requests_of(kind).prop_map(Asked::Outside).boxed(),
    };
    own.prop_map(Asked::Own).boxed()
}

fn requests_of(kind: Kind) -> BoxedStrategy<Request> {
    let path = any_pool_path;
    let meant = || (any_selector(), any_all());
    let force = any::<bool>;
    match kind {
        Kind::TenantCreate => (any_tenant(), any_quota(), proptest::option::of(any_subnet()))
            .prop_map(|(name, quota, subnet)| Request::TenantCreate { name, quota, subnet })
            .boxed(),
        Kind::TenantUpdate => {
            let limit = prop_oneof![3 => Just("running"), 1 => Just("mem"), 1 => Just("speed")];
            let lift = prop::collection::vec(limit.prop_map(str::to_owned), 0..2);
            (any_tenant(), any_quota(), lift)
                .prop_map(|(name, quota, lift)| Request::TenantUpdate { name, quota, lift })
                .boxed()
        }
        Kind::TenantMove => (any_tenant(), any_subnet())
            .prop_map(|(name, subnet)| Request::TenantMove { name, subnet })
            .boxed(),
        Kind::TenantDestroy => (any_tenant(), force())
            .prop_map(|(name, force)| Request::TenantDestroy { name, force })
            .boxed(),
        Kind::PoolCreate => path()
            .prop_flat_map(|path| (any_spec(&path.pool), Just(path)))
            .prop_map(|(spec, path)| Request::PoolCreate { path, spec: spec.into() })
            .boxed(),
        Kind::PoolBuild => path().prop_map(|path| Request::PoolBuild { path }).boxed(),
        Kind::PoolUpdate => {
            let shm = proptest::option::of(Just(64));
            (path(), proptest::option::of(any_image()), shm)
                .prop_map(|(path, image, shm_mib)| {
                    let settings = Settings { shm_mib, ..Settings::default() };
                    Request::PoolUpdate { path, image, settings }
                })
                .boxed()
        }
        Kind::PoolRollback => path().prop_map(|path| Request::PoolRollback { path }).boxed(),
        Kind::PoolScale => {
            let rest = || prop_oneof![2 => Just(None), 1 => (0..3u32).prop_map(Some)];
            let running = prop_oneof![19 => 0..6u32, 1 => Just(999)];
            (path(), running, rest(), rest())
                .prop_map(|(path, running, warm, sleeping)| Request::PoolScale {
                    path,
                    running,
                    warm,
                    sleeping,
                })
                .boxed()
        }
        Kind::PoolDestroy => {
            (path(), force()).prop_map(|(path, force)| Request::PoolDestroy { path, force }).boxed()
        }
        Kind::PoolReady => (path(), any_ready())
            .prop_map(|(path, ready)| Request::PoolReady { path, ready })
            .boxed(),
        Kind::PoolPolicy => (path(), any_policy())
            .prop_map(|(path, policy)| Request::PoolPolicy { path, policy })
            .boxed(),
        Kind::PoolWarmUp => path().prop_map(|path| Request::PoolWarmUp { path }).boxed(),
        Kind::InstanceCreate => {
            (path(), 0..7u32, any::<bool>(), any_mounts(), prop::bool::weighted(0.2))
                .prop_map(|(pool, count, start, disks, cold)| Request::InstanceCreate {
                    pool,
                    count,
                    start,
                    disks,
                    cold,
                })
                .boxed()
        }
        Kind::InstanceStart => {
            meant().prop_map(|(selector, all)| Request::InstanceStart { selector, all }).boxed()
        }
        Kind::InstanceStop => meant()
            .prop_map(|(selector, all)| Request::InstanceStop { selector, all, grace_ms: 5 })
            .boxed(),
        Kind::InstanceWarm => {
            meant().prop_map(|(selector, all)| Request::InstanceWarm { selector, all }).boxed()
        }
        Kind::InstanceSleep => meant()
            .prop_map(|(selector, all)| Request::InstanceSleep { selector, all, hooks_ms: 5 })
            .boxed(),
        Kind::InstancePin => (meant(), any::<bool>())
            .prop_map(|((selector, all), pinned)| Request::InstancePin { selector, all, pinned })
            .boxed(),
        Kind::InstanceRestart => meant()
            .prop_map(|(selector, all)| Request::InstanceRestart { selector, all, grace_ms: 5 })
            .boxed(),
        Kind::InstanceDestroy => (meant(), force())
            .prop_map(|((selector, all), force)| Request::InstanceDestroy { selector, all, force })
            .boxed(),
        Kind::DiskCreate => (any_disk_path(), any_disk_mib())
            .prop_map(|(path, size_mib)| Request::DiskCreate { path, size_mib })
            .boxed(),
        Kind::DiskResize => (any_disk_path(), any_disk_mib())
            .prop_map(|(path, size_mib)| Request::DiskResize { path, size_mib })
            .boxed(),
        Kind::DiskRemove => any_disk_path().prop_map(|path| Request::DiskRemove { path }).boxed(),
        Kind::Apply => any_document().prop_map(|document| Request::Apply { document }).boxed(),
        Kind::Remove => any_document().prop_map(|document| Request::Remove { document }).boxed(),
        Kind::Spares | Kind::BeginFork | Kind::MakeForks => panic!("{kind:?} is control's own"),
    }
}

pub(super) fn any_request() -> impl Strategy<Value = Request> {
    let kinds = FROM_OUTSIDE.iter();
    Union::new_weighted(kinds.map(|kind| (weight(*kind), requests_of(*kind))).collect())
}

fn any_asked() -> impl Strategy<Value = Asked> {
    Union::new_weighted(KINDS.iter().map(|kind| (weight(*kind), asked_of(*kind))).collect())
}

fn any_seen() -> impl Strategy<Value = Step> {
    use Seen::*;
    let seen = prop::sample::select(&[Running, Warm, Warm, Sleeping, Stopped, Failed, Unreadable]);
    let which = prop_oneof![Just(None), (0..8usize).prop_map(Some)];
    (which, seen).prop_map(|(which, seen)| Step::See(which, seen))
}

fn image_with(base: Option<u8>, past: Option<ImageSpec>) -> PoolStatus {
    let base = base.map(|number| Base {
        id: SnapshotId::from_bits(number.into()),
        revision: revision(number),
        spec: PoolSpec::default(),
        made_unix_ms: 0,
        given_up: None,
    });
    let past = past.map(|image| PastRevision { revision: revision(8), image });
    PoolStatus {
        revision: Some(revision(1)),
        history: past.into_iter().collect(),
        base,
        ..PoolStatus::default()
    }
}

fn any_build() -> impl Strategy<Value = Step> {
    let base = prop_oneof![1 => Just(None), 4 => Just(Some(1)), 1 => Just(Some(2))];
    let past = proptest::option::of(any_image());
    let image = (base, past).prop_map(|(base, past)| image_with(base, past));
    let is = prop::bool::weighted;
    (any_pool_path(), image, is(0.2), is(0.1)).prop_map(|(pool, image, has_failed, is_given_up)| {
        let failed = BuildState::Failed { error: "no mirror".into(), at_unix_ms: 0, failures: 1 };
        let mut image = image;
        image.build = if has_failed { failed } else { BuildState::Idle };
        if let Some(base) = image.base.as_mut().filter(|_| is_given_up) {
            base.given_up = Some("it is damaged".to_owned());
        }
        Step::Build(pool, image.into())
    })
}

/// Most begin with a disk, and a pool whose instances may begin with a base.
pub(super) fn any_history() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        14 => any_asked().prop_map(Step::Ask),
        1 => Just(Step::Gone),
        3 => any_seen(),
        2 => any_build(),
    ];
    let first = prop_oneof![3 => Just(with_base()), 1 => Just(vec![])];
    (first, prop::collection::vec(step, 0..60)).prop_map(|(first, rest)| [first, rest].concat())
}

fn with_base() -> Vec<Step> {
    let path: PoolPath = "a/x".parse().unwrap();
    let spec = Box::new(plain_spec(&path.pool));
    vec![
        Step::Ask(Asked::Outside(tenant("a"))),
        Step::Ask(Asked::Outside(Request::PoolCreate { path: path.clone(), spec })),
        Step::Build(path, image_with(Some(1), None).into()),
        Step::Ask(Asked::Outside(Request::DiskCreate {
            path: "a/d".parse().unwrap(),
            size_mib: 16,
        })),
    ]
}
