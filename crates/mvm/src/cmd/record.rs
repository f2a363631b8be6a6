//! `mvm node record`.

use std::io::{self, Read};
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use mvm_wire::view::RecordView;

use crate::cli::Context;
use crate::error::{Error, Result};

/// Mend records that do not parse.
///
/// The agent does not touch an object whose record it cannot read, as its microVM and its address
/// may still be in use; `mvm node info` lists such records. Look at one, and put it right or remove
/// it. Records that parse are better changed with the other verbs.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mvm node record show desired/
  mvm node record set desired/pool/demo/hello mended.json")]
pub(crate) struct Record {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    Show(Show),
    Set(Set),
    Remove(Remove),
}

/// Show the records whose keys begin with a text, as they are stored.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mvm node record show
  mvm node record show observed/instance/demo
  mvm node record show desired/pool/demo/hello -o json")]
struct Show {
    /// A key or the beginning of keys; everything if absent.
    #[arg(default_value = "")]
    prefix: String,
}

/// Replace a record.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mvm node record set desired/pool/demo/hello mended.json
  jq .running=1 broken.json | mvm node record set desired/pool/demo/hello -")]
struct Set {
    /// The record's key.
    key: String,
    /// A file with the new record as JSON; - is standard input.
    file: PathBuf,
}

/// Remove a record.
///
/// mvm forgets what the record describes. If a microVM belongs to it, the agent ends it as one
/// that nobody knows.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mvm node record remove observed/pool/demo/hello --yes")]
struct Remove {
    /// The record's key.
    key: String,
    /// Do not ask.
    #[arg(short, long)]
    yes: bool,
}

impl Record {
    /// Runs the verb.
    pub(crate) async fn run(self, context: &Context) -> Result<()> {
        match self.verb {
            Verb::Show(Show { prefix }) => {
                let records = context.client.records(prefix).await?;
                context.ui.data(&records, || text(&records))
            }
            Verb::Set(Set { key, file }) => {
                let text = read_json(&file)?;
                context.client.mend_record(key.clone(), Some(text)).await?;
                context.ui.remark(&format!("replaced {key}"));
                Ok(())
            }
            Verb::Remove(Remove { key, yes }) => {
                let question = format!("Forget what {key} describes?");
                if !yes && context.ui.confirm(&question)? != Some(true) {
                    let message = format!("{key} was not removed");
                    let hint = "pass --yes to remove it without being asked".to_owned();
                    return Err(Error::Usage { message, hint });
                }
                context.client.mend_record(key.clone(), None).await?;
                context.ui.remark(&format!("removed {key}"));
                Ok(())
            }
        }
    }
}

fn text(records: &[RecordView]) -> String {
    records.iter().map(|record| format!("{}\n  {}\n", record.key, record.text)).collect()
}

/// The text of a file, if it is JSON: what is not would not parse again.
fn read_json(file: &Path) -> Result<String> {
    let (what, read) = if file == Path::new("-") {
        let mut text = String::new();
        let read = io::stdin().lock().read_to_string(&mut text);
        ("standard input".to_owned(), read.map(|_| text))
    } else {
        (file.display().to_string(), std::fs::read_to_string(file))
    };
    let text = match read {
        Ok(text) => text,
        Err(source) => return Err(Error::Read { what, source }),
    };
    match serde_json::from_str::<serde_json::Value>(&text) {
        Ok(_) => Ok(text),
        Err(error) => Err(Error::Usage {
            message: format!("{what} is not JSON: {error}"),
            hint: "start from the record as it is: `mvm node record show KEY -o json`".to_owned(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_json_replaces_a_record() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("record.json");
        std::fs::write(&file, "{\"a\": 1}").unwrap();
        assert_eq!(read_json(&file).unwrap(), "{\"a\": 1}");
        std::fs::write(&file, "{\"a\": ").unwrap();
        let error = read_json(&file).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        assert!(error.to_string().contains("record.json is not JSON"), "{error}");
    }
}
