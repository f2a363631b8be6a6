//! Running `nft`, and the firewall of one agent as the kernel holds it.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Seek, Write};
use std::process::{Command, Stdio};

use mvm_core::net::{NodeNetwork, TableName};
use mvm_core::nft::{FAMILIES, render_full};
use rustix::fs::{MemfdFlags, memfd_create};
use serde_json::Value;

use super::ruleset::Ruleset;
use super::{NetworkError, generation};
use crate::process::find;

/// Applies a batch as one transaction, and returns its number, unless somebody else changed
/// something at the same time.
pub(super) async fn apply(batch: String) -> Result<Option<u32>, NetworkError> {
    let apply = move || {
        let before = generation::current().ok();
        run("change the firewall", &batch)?;
        let after = generation::current().ok();
        Ok(after.filter(|after| before.map(|before| before.wrapping_add(1)) == Some(*after)))
    };
    blocking(apply).await
}

/// The number of the last transaction, whosever it was; `None` if the kernel does not tell.
pub(super) async fn generation() -> Result<Option<u32>, NetworkError> {
    blocking(|| Ok(generation::current().ok())).await
}

/// The tables of that name as the kernel holds them.
pub(super) async fn current(table: TableName) -> Result<Ruleset, NetworkError> {
    blocking(move || list(&table)).await
}

/// The tables of that name as the kernel would hold them if the firewall of `network` were applied.
///
/// Two listings of one nft on one kernel can be compared to the letter, so the firewall is applied
/// in a network namespace that lives as long as the thread that made it.
#[allow(unsafe_code)]
pub(super) async fn expected(
    table: TableName,
    network: &NodeNetwork,
) -> Result<Ruleset, NetworkError> {
    let batch = render_full(&table, network);
    blocking(move || {
        let scratch = std::thread::Builder::new().name("nft-scratch".to_owned());
        let thread = scratch
            .spawn(move || {
                // SAFETY: unsharing the network namespace changes this thread alone, and nothing
                // else runs on it; no descriptor table or memory is unshared.
                unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET) }
                    .map_err(io::Error::from)
                    .map_err(NetworkError::system("create a network namespace"))?;
                run("apply the firewall in a scratch namespace", &batch)?;
                list(&table)
            })
            .map_err(NetworkError::system("start a thread"))?;
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
    .await
}

/// The names of all tables in the families in which agents have theirs.
pub(super) async fn tables() -> Result<BTreeSet<String>, NetworkError> {
    let list = || documents(&run("list the firewall's tables", "list tables\n")?);
    let listed = blocking(list).await?;
    let tables = listed.iter().map(|object| &object["table"]);
    let tables = tables.filter(|table| FAMILIES.iter().any(|family| table["family"] == *family));
    Ok(tables.filter_map(|table| table["name"].as_str().map(str::to_owned)).collect())
}

fn list(table: &TableName) -> Result<Ruleset, NetworkError> {
    let tables = documents(&run("list the firewall's tables", "list tables\n")?)?;
    let exists = |family: &str| {
        tables.iter().any(|object| {
            object["table"]["family"] == family && object["table"]["name"] == table.as_str()
        })
    };
    let mut objects = Vec::new();
    // One listing per run: nft 1.0.6 forgets the first of two tables that one batch asks for.
    for family in FAMILIES.iter().filter(|family| exists(family)) {
        let listing = format!("list table {family} {table}\n");
        objects.extend(documents(&run("list the firewall", &listing)?)?);
    }
    Ok(Ruleset::parse(objects))
}

/// The objects that nft printed: nothing, or one document.
fn documents(output: &str) -> Result<Vec<Value>, NetworkError> {
    let mut objects = Vec::new();
    for document in serde_json::Deserializer::from_str(output).into_iter::<Value>() {
        let mut document = document.map_err(NetworkError::NftOutput)?;
        if let Value::Array(listed) = document["nftables"].take() {
            objects.extend(listed);
        }
    }
    Ok(objects)
}

/// Runs `nft -j -f -`, which takes nft's own syntax too, in this thread's network namespace.
fn run(operation: &'static str, batch: &str) -> Result<String, NetworkError> {
    let input = memory_file(batch).map_err(NetworkError::system("keep a batch in memory"))?;
    let output = Command::new(find::program("nft".as_ref()))
        .args(["--json", "--file", "-"])
        .env("LC_ALL", "C")
        .stdin(Stdio::from(input))
        .output()
        .map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => NetworkError::MissingProgram { program: "nft" },
            _ => NetworkError::system("start nft")(error),
        })?;
    if !output.status.success() {
        let message = String::from_utf8_lossy(&output.stderr);
        let message = message.lines().take(4).collect::<Vec<_>>().join(" / ");
        return Err(NetworkError::Nft { operation, status: output.status, message });
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// A file to read `text` from: unlike a pipe, it needs nobody to fill it while nft talks.
fn memory_file(text: &str) -> io::Result<File> {
    let mut file = File::from(memfd_create("nft-batch", MemfdFlags::CLOEXEC)?);
    file.write_all(text.as_bytes())?;
    file.rewind()?;
    Ok(file)
}

/// Threads of the runtime's pool are in the network namespace of whoever started them first.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, NetworkError> + Send + 'static,
) -> Result<T, NetworkError> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|error| NetworkError::system("wait for nft")(io::Error::other(error)))?
}
