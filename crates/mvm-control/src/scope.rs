//! What a caller that is confined to a tenant may ask. Every call and request is listed, so that a new one is decided
//! upon.

use mvm_core::admit::Request;
use mvm_core::name::{InstancePath, Selector, TenantName};
use mvm_core::record::Desired;
use mvm_wire::{ApiError, Call, ErrorCode};

/// The call as it is answered within a tenant: what asks for everything asks for what is the tenant's.
///
/// # Errors
/// It is about something else.
pub(crate) fn confine(
    mut call: Call,
    scope: &TenantName,
    desired: &Desired,
) -> Result<Call, ApiError> {
    let within = |tenant: &TenantName| match tenant == scope {
        true => Ok(()),
        false => Err(outside(scope, &format!("tenant {tenant}"))),
    };
    let confine_to = |tenant: &mut Option<TenantName>| match tenant {
        Some(tenant) => within(tenant),
        None => {
            *tenant = Some(scope.clone());
            Ok(())
        }
    };
    match &mut call {
        Call::Submit(request) | Call::SubmitOnce { change: request, .. } => {
            confine_request(request, scope, desired)?;
        }
        Call::Tenants { name } => confine_to(name)?,
        Call::Pools { tenant, path } => {
            confine_to(tenant)?;
            path.iter().try_for_each(|path| within(&path.tenant))?;
        }
        Call::Disks { tenant, path } => {
            confine_to(tenant)?;
            path.iter().try_for_each(|path| within(&path.tenant))?;
        }
        Call::WarmUp { pool } => within(&pool.tenant)?,
        Call::Watch { instances, pools, tenant, disks, changes: _ } => {
            instances.iter().try_for_each(|path| within(&path.pool.tenant))?;
            pools.iter().try_for_each(|path| within(&path.tenant))?;
            tenant.iter().try_for_each(within)?;
            disks.iter().try_for_each(|path| within(&path.tenant))?;
        }
        Call::Fork { selector, .. }
        | Call::ForkOnce { selector, .. }
        | Call::Instances { selector }
        | Call::Exec { selector, .. }
        | Call::Locate { selector }
        | Call::Ssh { selector }
        | Call::Forward { selector, .. }
        | Call::Logs { selector, .. }
        | Call::Attach { selector, .. }
        | Call::Stats { selector }
        | Call::Why { selector } => confine_selector(selector, scope, desired)?,
        Call::Images
        | Call::ImageRemove { .. }
        | Call::ImageCollect { .. }
        | Call::NetVerify
        | Call::Records { .. }
        | Call::RecordMend { .. }
        | Call::AgentStop => return Err(outside(scope, "what is the whole node's")),
        // Which VMM the node has, and parts of a stream that was let through.
        Call::Node
        | Call::Hello(_)
        | Call::Signal { .. }
        | Call::Resize { .. }
        | Call::Detach
        | Call::Unknown => {}
    }
    Ok(call)
}

fn confine_request(
    request: &mut Request,
    scope: &TenantName,
    desired: &Desired,
) -> Result<(), ApiError> {
    let tenant = match request {
        Request::TenantCreate { .. }
        | Request::TenantUpdate { .. }
        | Request::TenantMove { .. }
        | Request::TenantDestroy { .. } => return Err(outside(scope, "tenants themselves")),
        Request::PoolCreate { path, .. }
        | Request::PoolBuild { path }
        | Request::PoolUpdate { path, .. }
        | Request::PoolRollback { path }
        | Request::PoolScale { path, .. }
        | Request::PoolPolicy { path, .. }
        | Request::PoolReady { path, .. }
        | Request::PoolWarmUp { path }
        | Request::PoolDestroy { path, .. } => &path.tenant,
        Request::InstanceCreate { pool, .. } => &pool.tenant,
        Request::InstanceStart { selector, .. }
        | Request::InstanceStop { selector, .. }
        | Request::InstanceWarm { selector, .. }
        | Request::InstanceSleep { selector, .. }
        | Request::InstancePin { selector, .. }
        | Request::InstanceRestart { selector, .. }
        | Request::InstanceDestroy { selector, .. } => {
            return confine_selector(selector, scope, desired);
        }
        Request::DiskCreate { path, .. }
        | Request::DiskResize { path, .. }
        | Request::DiskRemove { path } => &path.tenant,
        Request::Apply { document } if document.quota.is_some() || document.subnet.is_some() => {
            return Err(outside(scope, "a tenant's quota and subnet"));
        }
        Request::Apply { document }
            if document.tenant == *scope && !desired.tenants.contains_key(scope) =>
        {
            return Err(outside(scope, "tenants themselves"));
        }
        Request::Apply { document } | Request::Remove { document } => &document.tenant,
    };
    match tenant == scope {
        true => Ok(()),
        false => Err(outside(scope, &format!("tenant {tenant}"))),
    }
}

fn confine_selector(
    selector: &mut Selector,
    scope: &TenantName,
    desired: &Desired,
) -> Result<(), ApiError> {
    match selector {
        Selector::All => *selector = Selector::Tenant(scope.clone()),
        Selector::Tenant(tenant) if tenant == scope => {}
        Selector::Pool(pool) | Selector::Id { pool: Some(pool), .. } if pool.tenant == *scope => {}
        Selector::Id { pool: None, .. } => {
            let meant = selector.clone();
            let meant = desired.instances_meant(&meant).map(|record| record.path.clone());
            let is_own = |path: &InstancePath| path.pool.tenant == *scope;
            let (own, others): (Vec<_>, Vec<_>) = meant.partition(is_own);
            if !others.is_empty() {
                // It is as if the others were not there.
                let refused =
                    |code, message: String, hint| Err(ApiError::new(code, message).hint(hint));
                let there_is = format!("there is no instance {selector} in tenant {scope}");
                match own.as_slice() {
                    [one] => *selector = Selector::from(one),
                    [] => return refused(ErrorCode::NotFound, there_is, "see `mvm ps -a`"),
                    [..] => {
                        let several = format!("{selector} matches several instances");
                        return refused(ErrorCode::Invalid, several, "name one of them");
                    }
                }
            }
        }
        Selector::Tenant(_) | Selector::Pool(_) | Selector::Id { pool: Some(_), .. } => {
            return Err(outside(scope, &selector.to_string()));
        }
    }
    Ok(())
}

fn outside(scope: &TenantName, what: &str) -> ApiError {
    let message = format!("this command is confined to tenant {scope}, and asks for {what}");
    ApiError::new(ErrorCode::OutOfScope, message)
        .hint("leave out `--scope` (or MVM_SCOPE), or name something of that tenant")
}

#[cfg(test)]
mod tests {
    use super::*;
    use mvm_core::admit;

    /// Two tenants with a pool and an instance each, whose ids begin alike.
    fn desired() -> Desired {
        let facts = admit::NodeFacts {
            capacity: admit::Capacity { vcpus: 100, mem_mib: 100_000, disk_mib: 1_000_000 },
            ..admit::NodeFacts::default()
        };
        let mut desired = Desired::default();
        let mut id = 0x7000_0000;
        for tenant in ["acme", "bolt"] {
            let pool = format!("{tenant}/web");
            for request in [
                serde_json::json!({"request": "tenant_create", "name": tenant, "quota": {}}),
                serde_json::json!({"request": "pool_create", "path": pool, "spec": {}}),
                serde_json::json!({
                    "request": "instance_create", "pool": pool, "count": 1, "start": false
                }),
            ] {
                let request = serde_json::from_value(request).unwrap();
                let mut entropy = || {
                    id += 1;
                    id
                };
                let edit = admit::admit(&desired, &facts, &request, &mut entropy, 1).unwrap();
                desired = edit.desired;
            }
        }
        desired
    }

    fn meant(text: &str) -> serde_json::Value {
        let selector = match text {
            "all" => Selector::All,
            text => text.parse().unwrap(),
        };
        serde_json::to_value(selector).unwrap()
    }

    fn confined(call: serde_json::Value) -> Result<serde_json::Value, ErrorCode> {
        let call: Call = serde_json::from_value(call).unwrap();
        let call = confine(call, &"acme".parse().unwrap(), &desired()).map_err(|it| it.code)?;
        Ok(serde_json::to_value(call).unwrap())
    }

    #[test]
    fn what_asks_for_everything_asks_for_what_is_the_tenants() {
        use serde_json::json;
        let all = confined(json!({"call": "instances", "selector": meant("all")})).unwrap();
        assert_eq!(all["selector"], meant("acme"));
        let tenants = confined(json!({"call": "tenants", "name": null})).unwrap();
        assert_eq!(tenants["name"], "acme");
        let pools = confined(json!({"call": "pools", "tenant": null, "path": null})).unwrap();
        assert_eq!(pools["tenant"], "acme");
        let disks = confined(json!({"call": "disks", "tenant": null, "path": null})).unwrap();
        assert_eq!(disks["tenant"], "acme");
        // Both tenants have one of this beginning.
        let one = confined(json!({"call": "why", "selector": meant("i-7")})).unwrap();
        assert_eq!(one["selector"], meant("acme/web/i-70000001"));
        let stop = json!({"call": "submit", "request": "instance_stop", "selector": meant("all"),
            "all": true, "grace_ms": 1});
        assert_eq!(confined(stop).unwrap()["selector"], meant("acme"));
        for own in [
            json!({"call": "submit", "request": "pool_build", "path": "acme/web"}),
            json!({"call": "submit", "request": "apply", "document": {"tenant": "acme"}}),
            json!({"call": "why", "selector": meant("acme/web")}),
            json!({"call": "watch", "instances": ["acme/web/i-70000001"], "pools": ["acme/web"],
                "tenant": "acme"}),
            json!({"call": "node"}),
        ] {
            assert!(confined(own.clone()).is_ok(), "{own}");
        }
    }

    #[test]
    fn nothing_of_another_tenant_is_asked_for() {
        use serde_json::json;
        for other in [
            json!({"call": "instances", "selector": meant("bolt")}),
            json!({"call": "exec", "selector": meant("bolt/web"), "request": {"argv": ["id"]}}),
            json!({"call": "why", "selector": meant("bolt/web/i-70000002")}),
            json!({"call": "tenants", "name": "bolt"}),
            json!({"call": "pools", "tenant": "bolt", "path": null}),
            json!({"call": "pools", "tenant": "acme", "path": "bolt/web"}),
            json!({"call": "disks", "tenant": null, "path": "bolt/data"}),
            json!({"call": "warm_up", "pool": "bolt/web"}),
            json!({"call": "watch", "instances": ["bolt/web/i-70000002"], "pools": [],
                "tenant": null}),
            json!({"call": "watch", "instances": [], "pools": [], "tenant": "bolt"}),
            json!({"call": "images"}),
            json!({"call": "records", "prefix": ""}),
            json!({"call": "agent_stop"}),
            json!({"call": "net_verify"}),
            json!({"call": "submit", "request": "pool_destroy", "path": "bolt/web", "force": true}),
            json!({"call": "submit", "request": "tenant_create", "name": "core", "quota": {}}),
            json!({"call": "submit", "request": "tenant_destroy", "name": "acme", "force": true}),
            json!({"call": "submit", "request": "apply", "document": {"tenant": "bolt"}}),
            json!({"call": "submit", "request": "apply",
                "document": {"tenant": "acme", "quota": {"mem_mib": 1}}}),
            json!({"call": "submit", "request": "disk_remove", "path": "bolt/data"}),
        ] {
            assert_eq!(confined(other.clone()), Err(ErrorCode::OutOfScope), "{other}");
        }
        let hidden = json!({"call": "why", "selector": meant("i-70000002")});
        assert_eq!(confined(hidden), Err(ErrorCode::NotFound));
    }
}
