//! Which requests there are: the driver's own, and those that only ask.
//!
//! Left out, and answered as such: MMDS, persistent memory, memory hotplug, serial
//! and logger settings, and changes of devices while a microVM runs.

use mvm_core::firecracker::{Change, Drive, LoadSnapshot, Network};
use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::http::Asked;

/// A request that can be carried out, as far as its form tells.
pub(crate) enum Request {
    Describe,
    Version,
    GetMachine,
    BalloonStatistics,
    Change(Change),
}

/// What a template of a processor has to be. What its modifiers are made of is not looked at.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(dead_code, reason = "it is only parsed")]
struct CpuTemplate {
    #[serde(default)]
    kvm_capabilities: Vec<serde_json::Value>,
    #[serde(default)]
    cpuid_modifiers: Vec<serde_json::Value>,
    #[serde(default)]
    msr_modifiers: Vec<serde_json::Value>,
}

impl Request {
    /// Recognises a request, or says why it is none.
    pub(crate) fn of(asked: &Asked) -> Result<Self, String> {
        let path = asked.path.trim_start_matches('/');
        let (resource, id) = match path.split_once('/') {
            Some((resource @ ("drives" | "network-interfaces"), id)) => (resource, Some(id)),
            _ => (path, None),
        };
        match (asked.method.as_str(), resource) {
            ("PUT" | "PATCH", _) if asked.body.is_empty() => {
                return Err(format!("Empty {} request.", asked.method));
            }
            ("PUT", "drives" | "network-interfaces") if id.is_none_or(str::is_empty) => {
                return Err("The ID cannot be empty.".into());
            }
            _ => {}
        }
        Ok(match (asked.method.as_str(), resource) {
            ("GET", "") => Self::Describe,
            ("GET", "version") => Self::Version,
            ("GET", "machine-config") => Self::GetMachine,
            ("PUT", "machine-config") => Self::Change(Change::Machine(body(asked)?)),
            ("PUT", "boot-source") => Self::Change(Change::BootSource(body(asked)?)),
            ("PUT", "drives") => {
                let drive: Drive = body(asked)?;
                if id != Some(drive.drive_id.as_str()) {
                    let fault = "The id from the path does not match the id from the body!";
                    return Err(fault.into());
                }
                Self::Change(Change::Drive(drive))
            }
            ("PUT", "network-interfaces") => {
                let network: Network = body(asked)?;
                let (path, body) = (id.unwrap_or_default(), &network.iface_id);
                if path != body {
                    return Err(format!(
                        "The id from the path [{path}] does not match the id from the body [{body}]!"
                    ));
                }
                Self::Change(Change::Network(network))
            }
            ("PUT", "vsock") => Self::Change(Change::Vsock(body(asked)?)),
            ("PUT", "entropy") => Self::Change(Change::Entropy(body(asked)?)),
            ("PUT", "cpu-config") => {
                let _: CpuTemplate = body(asked)?;
                Self::Change(Change::CpuTemplate(body(asked)?))
            }
            ("GET", "balloon/statistics") => Self::BalloonStatistics,
            ("PUT", "balloon") => Self::Change(Change::Balloon(body(asked)?)),
            ("PUT", "metrics") => Self::Change(Change::Metrics(body(asked)?)),
            ("PUT", "actions") => Self::Change(Change::Action(body(asked)?)),
            ("PATCH", "vm") => Self::Change(Change::State(body(asked)?)),
            ("PUT", "snapshot/create") => Self::Change(Change::Save(body(asked)?)),
            ("PUT", "snapshot/load") => {
                let load: LoadSnapshot = body(asked)?;
                if load.mem_backend.is_none() && load.mem_file_path.is_none() {
                    return Err(unreadable(
                        "missing field: either `mem_backend` or `mem_file_path` is required",
                    ));
                }
                Self::Change(Change::Load(load))
            }
            (method, _) => {
                return Err(format!("Invalid request method and/or path: {method} {path}."));
            }
        })
    }
}

fn body<T: DeserializeOwned>(asked: &Asked) -> Result<T, String> {
    serde_json::from_slice(&asked.body).map_err(|error| unreadable(&error.to_string()))
}

fn unreadable(problem: &str) -> String {
    format!("An error occurred when deserializing the json body of a request: {problem}.")
}
