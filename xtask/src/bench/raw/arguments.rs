//! The peer's arguments, made of those of a QEMU that mvm has started: pure.

use std::path::Path;

use anyhow::{Context, bail};
use serde_json::{Value, json};

use super::{AGENT_SOCKET, Files};

/// The arguments of the peer of the QEMU that has the arguments `ours`.
pub(super) fn arguments(
    ours: &[String],
    files: &Files,
    layer: &Path,
    dir: &Path,
) -> anyhow::Result<Vec<String>> {
    let place = |name: &str| dir.join(name).display().to_string();
    let mut raw = Vec::new();
    let mut rest = ours.iter();
    while let Some(option) = rest.next() {
        if matches!(option.as_str(), "-nodefaults" | "-no-user-config" | "-no-reboot") {
            raw.push(option.clone());
            continue;
        }
        let value = rest.next().with_context(|| format!("{option} has no value"))?;
        let value = match (option.as_str(), value.as_str()) {
            // What mvm adds to protect the host and to learn how a guest ended.
            ("-sandbox" | "-add-fd", _) => continue,
            ("-chardev", text) if text.starts_with("pipe,id=events,") => continue,
            ("-mon", text) if text.starts_with("chardev=events,") => continue,
            ("-name", _) => "raw".to_owned(),
            ("-kernel", _) => files.kernel.display().to_string(),
            ("-initrd", _) => files.initrd.display().to_string(),
            ("-chardev", text) if text.starts_with("file,id=console,") => {
                format!("file,id=console,path={}", place("console.log"))
            }
            ("-chardev", text) if text.starts_with("socket,id=qmp,") => {
                format!("socket,id=qmp,path={},server=on,wait=off", place("qmp.sock"))
            }
            ("-chardev", text) if text.starts_with("socket,id=agent,") => {
                format!("socket,id=agent,path={},server=on,wait=off", place(AGENT_SOCKET))
            }
            ("-object", text) => object(text)?,
            ("-blockdev", text) => disk(text, files, layer)?,
            // QEMU makes an interface that goes with it.
            ("-netdev", text) if text.starts_with("tap,id=net0,") => {
                "tap,id=net0,script=no,downscript=no".to_owned()
            }
            (_, text) => text.to_owned(),
        };
        let names_descriptor = ["/proc/self/fd", "/dev/fdset", ",fd="];
        if names_descriptor.iter().any(|name| value.contains(name)) {
            bail!("`{option} {value}` names a descriptor, which the peer does not have");
        }
        raw.extend([option.clone(), value]);
    }
    Ok(raw)
}

/// The same memory, made by QEMU itself.
fn object(text: &str) -> anyhow::Result<String> {
    let object: Value = serde_json::from_str(text)?;
    if object["id"] != "ram" {
        return Ok(text.to_owned());
    }
    let memory = json!({
        "qom-type": "memory-backend-memfd", "id": "ram",
        "share": object["share"], "size": object["size"],
    });
    Ok(memory.to_string())
}

/// The same disk settings on a file that is named by its path.
fn disk(text: &str, files: &Files, layer: &Path) -> anyhow::Result<String> {
    let mut device: Value = serde_json::from_str(text)?;
    let path = match device["node-name"].as_str() {
        Some("disk0") => &files.root,
        Some("disk1") => layer,
        other => bail!("the peer has no disk {other:?}"),
    };
    device["file"]["filename"] = json!(path);
    Ok(device.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ours() -> Vec<String> {
        let disk = |n: u32| {
            format!(
                r#"{{"driver":"raw","node-name":"disk{n}","file":{{"filename":"/dev/fdset/{n}","aio":"threads"}}}}"#
            )
        };
        let ram = r#"{"qom-type":"memory-backend-file","id":"ram","share":true,"mem-path":"/proc/self/fd/9","size":64}"#;
        [
            "-name",
            "i-00000001",
            "-machine",
            "microvm,acpi=on",
            "-nodefaults",
            "-object",
            ram,
            "-sandbox",
            "on,spawn=deny",
            "-kernel",
            "/proc/self/fd/10",
            "-initrd",
            "/proc/self/fd/11",
            "-append",
            "console=ttyS0 quiet",
            "-add-fd",
            "fd=12,set=0",
            "-chardev",
            "file,id=console,path=/dev/fdset/0,append=on",
            "-chardev",
            "socket,id=qmp,fd=13,server=on,wait=off",
            "-mon",
            "chardev=qmp,mode=control",
            "-chardev",
            "pipe,id=events,path=/proc/self/fd/14/qmp",
            "-mon",
            "chardev=events,mode=control",
            "-chardev",
            "socket,id=agent,fd=15,server=on,wait=off",
            "-blockdev",
            &disk(0),
            "-blockdev",
            &disk(1),
            "-netdev",
            "tap,id=net0,fd=16",
            "-device",
            r#"{"driver":"virtio-net-device","netdev":"net0"}"#,
        ]
        .map(str::to_owned)
        .into()
    }

    fn converted(ours: &[String]) -> anyhow::Result<Vec<String>> {
        let files = Files { kernel: "/k".into(), initrd: "/i".into(), root: "/r".into() };
        arguments(ours, &files, Path::new("/layer"), Path::new("/raw"))
    }

    #[test]
    fn the_peer_has_the_same_machine_on_files_of_its_own() {
        let raw = converted(&ours()).unwrap();
        let value = |option: &str| {
            let at = raw.iter().position(|argument| argument == option).unwrap();
            raw[at + 1].as_str()
        };
        assert_eq!(value("-machine"), "microvm,acpi=on");
        assert_eq!(value("-append"), "console=ttyS0 quiet");
        assert_eq!((value("-kernel"), value("-initrd")), ("/k", "/i"));
        assert_eq!(value("-netdev"), "tap,id=net0,script=no,downscript=no");
        assert!(raw.contains(&"-nodefaults".to_owned()));
        let text = raw.join(" ");
        for expected in [
            r#""filename":"/r""#,
            r#""filename":"/layer""#,
            r#""aio":"threads""#,
            r#""qom-type":"memory-backend-memfd""#,
            r#""size":64"#,
            "path=/raw/agent.sock",
        ] {
            assert!(text.contains(expected), "{expected} is not in {text}");
        }
    }

    #[test]
    fn what_protects_the_host_is_left_out() {
        let text = converted(&ours()).unwrap().join(" ");
        for unexpected in ["-sandbox", "-add-fd", "events", "i-00000001"] {
            assert!(!text.contains(unexpected), "{unexpected} is in {text}");
        }
    }

    #[test]
    fn a_descriptor_that_is_not_known_is_refused() {
        let mut ours = ours();
        ours.extend(["-chardev", "socket,id=new,fd=20"].map(str::to_owned));
        assert!(converted(&ours).unwrap_err().to_string().contains("id=new,fd=20"));
        ours.push("-display".to_owned());
        ours.splice(ours.len() - 3.., ["-display".to_owned()]);
        assert!(converted(&ours).unwrap_err().to_string().contains("no value"));
    }
}
