//! A simulated node: plans are carried out on simulated instances and a simulated builder.

use std::collections::BTreeSet;

use super::properties::object;
use super::*;
use crate::admit::{Capacity, Denial, Edit, NodeFacts, OwnRequest, Request, admit, admit_own};
use crate::lifecycle::Event;
use crate::lifecycle::tests::{origin, world::World};
use crate::property::Choices;
use crate::record::{Base, DiskStatus};

pub(super) struct Node {
    pub(super) desired: Desired,
    pub(super) worlds: BTreeMap<InstancePath, World>,
    images: BTreeMap<PoolPath, PoolStatus>,
    pub(super) disks: BTreeMap<DiskPath, DiskStatus>,
    pub(super) now: u64,
    /// When instances were started.
    pub(super) starts: Vec<u64>,
    ids: u32,
}

impl Node {
    pub(super) fn new() -> Self {
        Self {
            desired: Desired::default(),
            worlds: BTreeMap::new(),
            images: BTreeMap::new(),
            disks: BTreeMap::new(),
            now: NOW,
            starts: vec![],
            ids: 0,
        }
    }

    /// Asks for something, as a person would.
    pub(super) fn ask(&mut self, request: &Request) -> Result<Edit, Denial> {
        self.carry_out(|desired, facts, entropy, now| admit(desired, facts, request, entropy, now))
    }

    /// Asks for something, as control does itself.
    pub(super) fn ask_own(&mut self, request: &OwnRequest) -> Result<Edit, Denial> {
        self.carry_out(|desired, facts, entropy, now| {
            admit_own(desired, facts, request, entropy, now)
        })
    }

    fn carry_out(
        &mut self,
        admit: impl FnOnce(&Desired, &NodeFacts, &mut dyn FnMut() -> u32, u64) -> Result<Edit, Denial>,
    ) -> Result<Edit, Denial> {
        let capacity = Capacity { vcpus: 100, mem_mib: 100_000, disk_mib: 1_000_000 };
        let facts = NodeFacts { capacity, observed: self.observed(), ..NodeFacts::default() };
        let ids = &mut self.ids;
        let mut entropy = || {
            *ids += 1;
            *ids
        };
        let edit = admit(&self.desired, &facts, &mut entropy, self.now)?;
        self.desired = edit.desired.clone();
        Ok(edit)
    }

    fn observed(&self) -> Observed {
        let status = |(path, world): (&InstancePath, &World)| (path.clone(), world.status.clone());
        let instances = self.worlds.iter().map(status).collect();
        let (pools, disks) = (self.images.clone().into(), self.disks.clone().into());
        Observed { pools, instances, disks, ..Observed::default() }
    }

    pub(super) fn plan_at(&self, now: u64) -> Plan {
        plan(&self.desired, &self.observed(), PlanLimits { starting: 2 }, now)
    }

    /// One round of the loop: plan, and begin what it says.
    pub(super) fn round(&mut self) -> Plan {
        let plan = self.plan_at(self.now);
        let objects: BTreeSet<String> = plan.actions.iter().map(object).collect();
        assert_eq!(objects.len(), plan.actions.len(), "two actions for one object: {plan:?}");
        for action in &plan.actions {
            self.begin(action);
        }
        plan
    }

    fn begin(&mut self, action: &Action) {
        let now = self.now;
        match action.clone() {
            Action::Build { pool, generation } => {
                let status = self.images.entry(pool).or_default();
                status.build = BuildState::Building { step: "unpacking".to_owned() };
                status.build_generation = generation;
            }
            Action::Start { instance, generation, revision } => {
                self.starts.push(now);
                let boot_timeout_ms = 30_000;
                let origin = self.desired.instances[&instance].origin.clone();
                let event = Event::Start { generation, revision, boot_timeout_ms, origin };
                self.worlds.entry(instance).or_default().feed(event, now);
            }
            Action::Pause { instance } => {
                self.worlds.entry(instance).or_default().feed(Event::Pause, now);
            }
            Action::Sleep { instance, request, hooks_ms } => {
                let event = Event::Sleep { request, hooks_ms };
                self.worlds.entry(instance).or_default().feed(event, now);
            }
            Action::Stop { instance, grace_ms, generation } => {
                let event = Event::Stop { grace_ms, generation };
                self.worlds.entry(instance).or_default().feed(event, now);
            }
            Action::Destroy { instance, grace_ms } => {
                let world = self.worlds.entry(instance).or_default();
                world.feed(Event::Destroy { grace_ms }, now);
            }
            Action::RemoveEnded(path) => panic!("nobody asked for the end of {path}"),
            Action::MakeDisk(disk) => {
                let size_mib = Some(self.desired.disks[&disk].size_mib);
                self.disks.insert(disk, DiskStatus { size_mib, failure: None });
            }
            Action::RemoveDisk(disk) => {
                self.desired.disks.remove(&disk);
                self.disks.remove(&disk);
            }
            Action::RemovePool(pool) => {
                assert_eq!(self.desired.instances_in(&pool).count(), 0);
                self.desired.pools.remove(&pool);
                self.images.remove(&pool);
            }
            Action::RemoveTenant(tenant) => {
                assert_eq!(self.desired.pools_of(&tenant).count(), 0);
                assert_eq!(self.desired.disks_of(&tenant).count(), 0);
                self.desired.tenants.remove(&tenant);
            }
        }
    }

    /// Lets every build and every instance make a step; `false` if nothing was left to do.
    pub(super) fn progress(&mut self, choices: &mut Choices) -> bool {
        let now = self.now;
        let mut any = false;
        for status in self.images.values_mut() {
            if let BuildState::Building { .. } = &status.build {
                any = true;
                status.build = if choices.one_in(3) {
                    let error = "no mirror".to_owned();
                    BuildState::Failed { error, at_unix_ms: now, failures: 1 }
                } else {
                    status.revision = Some(revision());
                    BuildState::Built { already_there: false, took_ms: 1 }
                };
            }
        }
        for world in self.worlds.values_mut() {
            any |= world.progress(now, choices);
        }
        let gone = self.worlds.iter().filter(|(_, world)| world.is_forgotten);
        for path in gone.map(|(path, _)| path.clone()).collect::<Vec<_>>() {
            self.worlds.remove(&path);
            self.desired.instances.remove(&path);
        }
        any
    }

    /// The pool has a base from now on, if it has an image.
    pub(super) fn save_base(&mut self, pool: &PoolPath) {
        let Some(record) = self.desired.pools.get(pool) else { return };
        if let Some(status) = self.images.get_mut(pool)
            && let Some(revision) = status.revision.clone()
        {
            let (id, spec) = (origin(), record.spec.clone());
            status.base = Some(Base { id, revision, spec, made_unix_ms: self.now, given_up: None });
        }
    }

    /// Something happens to one of the instances that nobody asked for.
    pub(super) fn misfortune(&mut self, choices: &mut Choices) {
        let index = choices.pick(self.worlds.len());
        if let Some(world) = self.worlds.values_mut().nth(index) {
            world.misfortune(self.now, choices);
        }
    }

    /// When time alone leads on.
    fn due(&self, plan: &Plan) -> Option<u64> {
        let deadlines = self.worlds.values().filter_map(|world| world.status.deadline_unix_ms());
        deadlines.chain(plan.next_unix_ms).min()
    }

    pub(super) fn tick(&mut self) {
        for world in self.worlds.values_mut() {
            world.feed(Event::Tick, self.now);
        }
    }

    /// Runs the loop until it has nothing to do and nothing to wait for but a person, or until
    /// `until`.
    pub(super) fn settle(&mut self, until: u64) {
        const ROUNDS_MAX: usize = 1_000;
        let mut calm = Choices::new(vec![]);
        for _ in 0..ROUNDS_MAX {
            let before = self.observed();
            let plan = self.round();
            let changed = self.progress(&mut calm) || self.observed() != before;
            if changed {
                continue;
            }
            match self.due(&plan) {
                Some(due) if due > until => return,
                Some(due) => {
                    self.now = self.now.max(due);
                    self.tick();
                }
                None if plan.actions.is_empty() => return,
                // A removal shows in what is desired: the next round goes on from there.
                None => {}
            }
        }
        panic!("the loop does not settle: {:?}", self.plan_at(self.now));
    }
}
