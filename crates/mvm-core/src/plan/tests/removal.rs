//! Removal goes from the inside out: instances, then their pool, then the tenant.

use super::*;
use crate::record::change_all;

fn going(instances: impl IntoIterator<Item = InstanceRecord>) -> Desired {
    let mut desired = desired(instances);
    change_all(&mut desired.tenants, |tenant| tenant.existence = Existence::Removed);
    change_all(&mut desired.pools, |pool| pool.existence = Existence::Removed);
    desired
}

#[test]
fn an_instance_that_is_to_go_is_destroyed_until_it_is_gone() {
    let destroy = Action::Destroy { instance: path(1), grace_ms: GRACE_MS };
    for phase in
        [Phase::Created, RUNNING, stopping(Outcome::Stopped), Phase::Failed, Phase::Destroyed]
    {
        let plan = plan_one(record(1, DesiredState::Destroyed), status(phase.clone()), NOW);
        assert_eq!(plan.actions, std::slice::from_ref(&destroy), "{phase:?}");
    }
}

#[test]
fn a_pool_goes_after_its_instances_and_a_tenant_after_its_pools() {
    let mut desired = going([record(1, DesiredState::Destroyed)]);
    let observed = observed(built(), [(1, status(RUNNING))]);
    let actions = |desired: &Desired| plan(desired, &observed, LIMITS, NOW).actions;
    assert_eq!(actions(&desired), [Action::Destroy { instance: path(1), grace_ms: GRACE_MS }]);
    desired.instances.clear();
    assert_eq!(actions(&desired), [Action::RemovePool(pool())]);
    desired.pools.clear();
    assert_eq!(actions(&desired), [Action::RemoveTenant(pool().tenant)]);
}

#[test]
fn what_is_kept_is_not_removed_because_it_is_empty() {
    assert_eq!(plan(&desired([]), &Observed::default(), LIMITS, NOW), Plan::default());
}

#[test]
fn a_pool_that_goes_is_not_built() {
    let mut desired = going([]);
    desired.pools.get_mut(&pool()).unwrap().build_generation = 1;
    let plan = plan(&desired, &Observed::default(), LIMITS, NOW);
    assert_eq!(plan.actions, [Action::RemovePool(pool())]);
}
