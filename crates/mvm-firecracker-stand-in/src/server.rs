//! Serves the API on its socket, one request after the other, with the faults that are wanted.

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;

use crate::api::{Answer, Machine};
use crate::arguments::Arguments;
use crate::behaviour::{Behaviour, Wrong};
use crate::http;

/// Serves until the process ends.
pub(crate) fn run(arguments: &Arguments, behaviour: Behaviour) -> Result<(), String> {
    let log = arguments.get("--log-path").map(str::to_owned);
    let say = |words: &str| {
        let Some(path) = &log else { return };
        let file = OpenOptions::new().append(true).open(path);
        // Whoever looks for it misses it.
        let _ = file.and_then(|mut file| writeln!(file, "[stand-in:main] {words}"));
    };
    match behaviour.at_start() {
        Some(Wrong::Die { words }) => return Err(words.clone()),
        Some(Wrong::Hang) => hang(),
        Some(other) => return Err(format!("there is no such fault at the start: {other:?}")),
        None => {}
    }
    let socket = arguments.needed("--api-sock")?;
    let listener = UnixListener::bind(socket)
        .map_err(|error| format!("Failed to open the API socket at {socket}: {error}"))?;
    let id = arguments.get("--id").unwrap_or("anonymous-instance");
    let mut machine = Machine::new(id, behaviour.version());
    if let Some(path) = arguments.get("--metrics-path") {
        machine.write_metrics_to(path)?;
    }
    for stream in listener.incoming() {
        let Ok(mut stream) = stream else { continue };
        // A client that goes away, or asks for nothing, takes nobody else's answer away.
        let _ = serve(&mut stream, &mut machine, &behaviour, &say);
    }
    Ok(())
}

fn serve(
    stream: &mut UnixStream,
    machine: &mut Machine,
    behaviour: &Behaviour,
    say: &dyn Fn(&str),
) -> io::Result<()> {
    let asked = http::read(stream)?;
    let answer = match behaviour.at(&format!("{} {}", asked.method, asked.path)) {
        Some(Wrong::Refuse { status, body }) => Answer::new(*status, body.clone()),
        Some(Wrong::Die { words }) => {
            say(words);
            std::process::exit(1);
        }
        Some(Wrong::Hang) => hang(),
        Some(Wrong::Say(words)) => return stream.write_all(words.as_bytes()),
        Some(Wrong::Delay(ms)) => {
            std::thread::sleep(Duration::from_millis(*ms));
            machine.answer(&asked)
        }
        None => machine.answer(&asked),
    };
    let written = http::write(stream, answer.status, &answer.body);
    if answer.status >= 400 {
        say(&answer.body);
    }
    if answer.is_last {
        std::process::exit(1);
    }
    written
}

fn hang() -> ! {
    loop {
        std::thread::park();
    }
}
