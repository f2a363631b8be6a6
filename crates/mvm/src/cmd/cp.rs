//! `mvm cp`.

use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use clap::Args;
use mvm_core::guest::ExecRequest;
use mvm_core::name::Selector;
use mvm_files::{Links, Options, Owners, Summary, Target, source_name};
use tokio::sync::mpsc;

use crate::cli::Context;
use crate::copy::{self, ChannelReader, ChannelWriter, PIECES};
use crate::error::{Error, Result, exit};
use crate::output::{printable, raw};

/// Copy files between this machine and an instance.
///
/// Either side may be a file or a whole tree. Modes, times, symbolic and hard links are kept. As
/// with `cp -r`, a target that is a directory is copied into, `SOURCE/.` means what a directory
/// holds, and `-` is a tar archive on standard input or output. Each file appears whole or not at
/// all. Extended attributes and ACLs are not kept. It needs neither a network nor any program in the
/// image.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mvm cp app.conf demo/web:/etc/app.conf
  mvm cp ./site/. i-3f2a:/srv/www
  mvm cp i-3f2a:/var/log ./logs
  mvm cp i-3f2a:/etc - | tar t
  tar c . | mvm cp - i-3f2a:/srv")]
pub(crate) struct Cp {
    /// PATH, INSTANCE:PATH, or - for a tar archive.
    #[arg(value_parser = place)]
    source: Place,
    /// INSTANCE:PATH, PATH, or - for a tar archive.
    #[arg(value_parser = place)]
    target: Place,
    /// Keep the owners' user and group ids; otherwise files belong to the user who copies (root in guests).
    #[arg(short, long)]
    archive: bool,
}

/// One side of a copy.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Place {
    /// A tar archive on standard input or output.
    Stream,
    Local(PathBuf),
    Guest(Selector, String),
}

/// `INSTANCE:PATH` names a guest; a path of this machine with a colon is told by a leading `/` or
/// `.`.
fn place(text: &str) -> Result<Place, String> {
    if text == "-" {
        return Ok(Place::Stream);
    }
    if !text.starts_with(['/', '.'])
        && let Some((instance, path)) = text.split_once(':')
    {
        let selector = instance
            .parse()
            .map_err(|error| format!("{error}; a path with a colon begins with ./ or /"))?;
        return match path.is_empty() {
            true => Err(format!("no path is named in {instance}, as in {instance}:/")),
            // There is no working directory in a guest: everything is below its root.
            false if path.starts_with('/') => Ok(Place::Guest(selector, path.to_owned())),
            false => Ok(Place::Guest(selector, format!("/{path}"))),
        };
    }
    match text.is_empty() {
        true => Err("the path is empty".to_owned()),
        false => Ok(Place::Local(PathBuf::from(text))),
    }
}

impl Cp {
    /// Runs the verb.
    pub(crate) async fn run(self, context: &Context) -> Result<u8> {
        let owners = if self.archive { Owners::Kept } else { Owners::Own };
        match (self.source, self.target) {
            (Place::Guest(selector, path), to @ (Place::Local(_) | Place::Stream)) => {
                download(context, selector, path, to, owners).await
            }
            (from @ (Place::Local(_) | Place::Stream), Place::Guest(selector, path)) => {
                upload(context, from, selector, &path, owners).await
            }
            (Place::Guest(..), Place::Guest(..)) => Err(Error::Usage {
                message: "both sides are in guests".to_owned(),
                hint: "copy in two steps, or through a pipe: `mvm cp A:/x - | mvm cp - B:/`".into(),
            }),
            _ => Err(Error::Usage {
                message: "neither side is in a guest".to_owned(),
                hint: "name one as INSTANCE:PATH, such as demo/web:/srv".to_owned(),
            }),
        }
    }
}

async fn download(
    context: &Context,
    selector: Selector,
    path: String,
    to: Place,
    owners: Owners,
) -> Result<u8> {
    if to == Place::Stream && raw::is_stdout_terminal() {
        return Err(Error::Usage {
            message: "a tar archive is not for a terminal".to_owned(),
            hint: "send it to a file or a program: `… - >files.tar`".to_owned(),
        });
    }
    let name = source_name(Path::new(&path));
    let (pieces, receiver) = mpsc::channel(PIECES);
    let write = move || -> Result<Summary> {
        let mut reader = ChannelReader::new(receiver);
        match to {
            Place::Local(path) => {
                // The guest may be hostile.
                let options = Options { links: Links::Refuse, owners };
                Ok(mvm_files::unpack(reader, &Target::As { path, name }, options)?)
            }
            _ => {
                let mut out = raw::stdout().lock();
                copy_all(&mut reader, &mut out).map_err(Error::output)?;
                Ok(Summary::default())
            }
        }
    };
    let request = request(vec!["pack".to_owned(), path], false);
    let summary = copy::receive(context, selector, request, pieces, write).await?;
    tell_skipped(context, &summary);
    Ok(exit::OK)
}

async fn upload(
    context: &Context,
    from: Place,
    selector: Selector,
    path: &str,
    owners: Owners,
) -> Result<u8> {
    let owners = if owners == Owners::Kept { "keep" } else { "own" };
    let words: Vec<&str> = match &from {
        Place::Local(source) => {
            let name = source_name(source);
            // What cannot be read is said before anything is started.
            std::fs::symlink_metadata(source).map_err(|error| Error::Read {
                what: source.display().to_string(),
                source: error,
            })?;
            let name = name.into_string().map_err(|name| Error::Usage {
                message: format!("the name {} is not UTF-8", name.display()),
                hint: "copy it as an archive: `tar c … | mvm cp - INSTANCE:DIR`".to_owned(),
            })?;
            return send(context, from, selector, &["unpack", "as", path, &name, owners]).await;
        }
        _ => vec!["unpack", "into", path, owners],
    };
    send(context, from, selector, &words).await
}

async fn send(context: &Context, from: Place, selector: Selector, program: &[&str]) -> Result<u8> {
    let (pieces, receiver) = mpsc::channel(PIECES);
    let read = move || -> Result<Summary> {
        let mut writer = ChannelWriter::new(pieces);
        match from {
            Place::Local(path) => {
                let packed =
                    mvm_files::pack(&path, io::BufWriter::with_capacity(BUFFER, &mut writer));
                Ok(packed?)
            }
            _ => {
                let mut stdin = io::stdin().lock();
                copy_all(&mut stdin, &mut writer)
                    .map_err(|source| Error::Read { what: "standard input".to_owned(), source })?;
                Ok(Summary::default())
            }
        }
    };
    let request = request(program.iter().map(|&word| word.to_owned()).collect(), true);
    let summary = copy::send(context, selector, request, receiver, read).await?;
    tell_skipped(context, &summary);
    Ok(exit::OK)
}

/// Bytes that are copied at once.
const BUFFER: usize = mvm_wire::connection::DATA_PIECE;

fn copy_all(from: &mut impl Read, to: &mut impl Write) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return to.flush(),
            Ok(len) => to.write_all(&buffer[..len])?,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

fn request(argv: Vec<String>, stdin: bool) -> ExecRequest {
    let cwd = Some("/".to_owned());
    ExecRequest { argv, stdin, cwd, builtin: true, ..ExecRequest::default() }
}

fn tell_skipped(context: &Context, summary: &Summary) {
    for path in &summary.skipped {
        let path = printable(path);
        context.ui.say(&format!("left out {path}: neither a file nor a directory nor a link"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_side_is_a_guest_a_path_or_a_stream() {
        let guest = |selector: &str, path: &str| {
            Ok(Place::Guest(selector.parse().unwrap(), path.to_owned()))
        };
        assert_eq!(place("-"), Ok(Place::Stream));
        assert_eq!(place("demo/web:/etc"), guest("demo/web", "/etc"));
        assert_eq!(place("i-3f:etc/x:y"), guest("i-3f", "/etc/x:y"));
        for local in ["file", "./a:b", "/a:b", "../x"] {
            assert_eq!(place(local), Ok(Place::Local(local.into())));
        }
        for bad in ["", "demo/web:", "A B:/x"] {
            assert!(place(bad).is_err(), "{bad}");
        }
    }
}
