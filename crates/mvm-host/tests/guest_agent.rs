//! What only the real agent does: real processes, files, users and pipes.
#![allow(clippy::unwrap_used)] // a test fails by panicking
#![allow(clippy::print_stderr)] // a skipped test says why

mod guest_support;

use std::fs;
use std::os::unix::fs::PermissionsExt as _;

use guest_support::{Guest, LIMIT, command, eventually, runs, script};
use mvm_core::guest::{Configuration, ErrorKind, ExecRequest, ExitStatus, GuestError, HostMessage};
use mvm_core::settings::Settings;
use mvm_host::guest::{AGENT_BINARY, ExecEvent, ExecOutput, Session, SessionError, SessionMode};

const EXITED: ExitStatus = ExitStatus::Exited { code: 0 };

async fn output(session: &Session, request: ExecRequest) -> ExecOutput {
    session.exec(request, LIMIT).await.unwrap().output(1 << 20).await.unwrap()
}

async fn stdout(session: &Session, request: ExecRequest) -> String {
    String::from_utf8(output(session, request).await.stdout).unwrap()
}

async fn refusal(session: &Session, request: ExecRequest) -> GuestError {
    match session.exec(request, LIMIT).await.unwrap().output(1 << 20).await {
        Err(SessionError::Guest { error, .. }) => error,
        other => panic!("{other:?}"),
    }
}

fn with_env(request: ExecRequest, env: &[(&str, &str)]) -> ExecRequest {
    let env = env.iter().map(|&(key, value)| (key.to_owned(), value.to_owned())).collect();
    ExecRequest { env, ..request }
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

#[test]
fn the_embedded_agent_is_a_small_static_executable() {
    assert!(AGENT_BINARY.starts_with(b"\x7fELF"));
    assert!(AGENT_BINARY.len() <= 2 * 1024 * 1024);
    let loaders: [&[u8]; 2] = [b"/lib64/ld-linux", b"/lib/ld-"];
    for loader in loaders {
        assert!(!AGENT_BINARY.windows(loader.len()).any(|window| window == loader));
    }
}

#[tokio::test]
async fn a_program_has_an_environment_a_directory_and_three_streams_of_its_own() {
    let guest = Guest::real();
    let session = guest.session(SessionMode::Fresh).await;
    let result = output(&session, script("echo out; echo err >&2; read line; exit 5")).await;
    assert_eq!(
        (result.stdout.as_slice(), result.stderr.as_slice()),
        (&b"out\n"[..], &b"err\n"[..])
    );
    assert_eq!(result.status, ExitStatus::Exited { code: 5 });

    let show = script("echo $PATH:$TERM:$EXTRA:${HOME:+home}:${USER:+user}");
    let shown = stdout(&session, with_env(show, &[("EXTRA", "x=y"), ("TERM", "vt100")])).await;
    assert!(shown.ends_with("/bin:vt100:x=y:home:user\n"), "{shown}");
    let inherited = stdout(&session, script("echo ${CARGO_MANIFEST_DIR:-none}")).await;
    assert_eq!(inherited, "none\n");

    let elsewhere = ExecRequest { cwd: Some("/proc".into()), ..command(&["pwd"]) };
    assert_eq!(stdout(&session, elsewhere).await, "/proc\n");
    let ids = stdout(&session, script("echo $$; cut -d' ' -f1,5,6 /proc/$$/stat")).await;
    let words: Vec<&str> = ids.split_ascii_whitespace().collect();
    assert!(words.len() == 4 && words.iter().all(|word| *word == words[0]), "{ids}");
    let files = stdout(&session, script("ls /proc/$$/fd")).await;
    assert_eq!(files.split_ascii_whitespace().filter(|fd| fd.len() == 1).count(), 3, "{files}");
}

#[tokio::test]
async fn what_cannot_be_run_is_refused_by_name() {
    let guest = Guest::real();
    let session = guest.session(SessionMode::Fresh).await;
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    fs::write(path("plain"), "text").unwrap();
    fs::write(path("orphan"), "#!/no/such/interpreter\n").unwrap();
    fs::write(path("noformat"), "neither script nor program").unwrap();
    for name in ["orphan", "noformat"] {
        fs::set_permissions(path(name), fs::Permissions::from_mode(0o755)).unwrap();
    }
    let expect = async |request: ExecRequest, kind: ErrorKind, name: &str| {
        let error = refusal(&session, request).await;
        assert_eq!(error.kind, kind, "{error}");
        assert!(error.message.contains(&format!("`{name}`")), "{error}");
    };
    let file = |name: &str| command(&[&path(name)]);
    expect(file("absent"), ErrorKind::NotFound, &path("absent")).await;
    expect(file("orphan"), ErrorKind::NotFound, &path("orphan")).await;
    expect(file("plain"), ErrorKind::Denied, &path("plain")).await;
    expect(file("noformat"), ErrorKind::Denied, &path("noformat")).await;
    let in_path = with_env(command(&["plain"]), &[("PATH", dir.path().to_str().unwrap())]);
    expect(in_path, ErrorKind::Denied, "plain").await;
    let nowhere = ExecRequest { cwd: Some("/no/such/dir".into()), ..command(&["true"]) };
    expect(nowhere, ErrorKind::NotFound, "/no/such/dir").await;
    let nobody = ExecRequest { user: Some("no-such-user".into()), ..command(&["true"]) };
    expect(nobody, ErrorKind::NotFound, "no-such-user").await;
    assert_eq!(output(&session, command(&["true"])).await.status, EXITED);
}

#[tokio::test]
async fn a_program_runs_as_the_user_and_group_it_is_asked_for() {
    if !is_root() {
        eprintln!("skipped: only root can become another user");
        return;
    }
    let guest = Guest::real();
    let session = guest.session(SessionMode::Fresh).await;
    let ids = async |user: &str| {
        let show = script("id -u; id -g; id -G; echo $USER");
        let request = ExecRequest { user: Some(user.into()), cwd: Some("/".into()), ..show };
        stdout(&session, request).await.replace('\n', ",")
    };
    assert_eq!(ids("12345:54321").await, "12345,54321,54321,12345,");
    assert_eq!(ids("12345").await, "12345,0,0,12345,");
    assert!(ids("daemon").await.ends_with(",daemon,"));
    let secret = tempfile::tempdir().unwrap();
    fs::set_permissions(secret.path(), fs::Permissions::from_mode(0o700)).unwrap();
    let cwd = Some(secret.path().to_str().unwrap().to_owned());
    let barred = ExecRequest { user: Some("12345".into()), cwd, ..command(&["true"]) };
    assert_eq!(refusal(&session, barred).await.kind, ErrorKind::Denied);
}

#[tokio::test]
async fn programs_have_the_limits_that_the_host_configured_last() {
    let guest = Guest::real();
    let session = guest.session(SessionMode::Fresh).await;
    let configure = async |name: &str, value: &str| {
        let ulimit = [(name.to_owned(), value.parse().unwrap())].into();
        let settings = Settings { ulimit, ..Settings::default() };
        let configuration = Configuration { settings, ..Configuration::default() };
        session.configure(configuration, LIMIT).await
    };
    configure("nofile", "100:200").await.unwrap();
    let limits = script("ulimit -Sn; ulimit -Hn; ulimit -Sc");
    assert!(stdout(&session, limits.clone()).await.starts_with("100\n200\n"));
    configure("core", "0").await.unwrap();
    let shown = stdout(&session, limits).await;
    assert!(shown.ends_with("\n0\n") && !shown.starts_with("100\n"), "{shown}");
    assert!(configure("files", "1").await.is_err());
}

#[tokio::test]
async fn a_directory_that_nobody_asked_for_may_be_gone() {
    let guest = Guest::real();
    let session = guest.session(SessionMode::Fresh).await;
    let gone = ExecRequest { cwd: Some("/no/such/dir".into()), ..command(&["pwd"]) };
    let request = ExecRequest { is_cwd_default: true, ..gone };
    assert_eq!(stdout(&session, request).await, "/\n");
}

/// Starts a script that prints the process id of a child, and waits for it.
async fn child_of(session: &Session, request: ExecRequest) -> (mvm_host::guest::Exec, u32) {
    let mut exec = session.exec(request, LIMIT).await.unwrap();
    loop {
        if let ExecEvent::Stdout(line) = exec.next().await.unwrap().unwrap() {
            return (exec, String::from_utf8(line).unwrap().trim().parse().unwrap());
        }
    }
}

#[tokio::test]
async fn cancelling_kills_the_whole_process_group() {
    let guest = Guest::real();
    let session = guest.session(SessionMode::Fresh).await;
    let (exec, child) = child_of(&session, script("sleep 1000 & echo $!; wait")).await;
    assert!(runs(child));
    drop(exec);
    eventually("the child is gone", async || !runs(child)).await;
}

#[tokio::test]
async fn a_time_limit_kills_the_whole_process_group() {
    let guest = Guest::real();
    let session = guest.session(SessionMode::Fresh).await;
    let request = ExecRequest { timeout_ms: Some(300), ..script("sleep 1000 & echo $!; wait") };
    let (exec, child) = child_of(&session, request).await;
    assert_eq!(exec.output(0).await.unwrap().status, ExitStatus::TimedOut);
    eventually("the child is gone", async || !runs(child)).await;
}

#[tokio::test]
async fn a_new_session_kills_what_the_old_one_left() {
    let guest = Guest::real();
    let session = guest.session(SessionMode::Fresh).await;
    let (exec, child) = child_of(&session, script("sleep 1000 & echo $!; wait")).await;
    drop((exec, session));
    assert!(runs(child));
    let _session = guest.session(SessionMode::Existing).await;
    eventually("the child is gone", async || !runs(child)).await;
}

#[tokio::test]
async fn the_end_of_the_stream_kills_what_runs_and_ends_the_agent() {
    let mut guest = Guest::real();
    let session = guest.session(SessionMode::Fresh).await;
    let (exec, child) = child_of(&session, script("sleep 1000 & echo $!; wait")).await;
    let mut agent = guest.process.take().unwrap();
    drop((exec, session, guest));
    let status = tokio::task::spawn_blocking(move || agent.wait().unwrap()).await.unwrap();
    assert!(status.success());
    eventually("the child is gone", async || !runs(child)).await;
}

#[tokio::test]
async fn a_background_child_that_keeps_the_pipe_does_not_keep_the_exit() {
    let guest = Guest::real();
    let session = guest.session(SessionMode::Fresh).await;
    let (mut exec, child) = child_of(&session, script("sleep 1000 & echo $!; exit 3")).await;
    assert_eq!(
        exec.next().await.unwrap().unwrap(),
        ExecEvent::Exit(ExitStatus::Exited { code: 3 })
    );
    assert!(runs(child), "what a program leaves in the background goes on");
    // It was just seen alive, and nothing else ends it.
    let pid = rustix::process::Pid::from_raw(child as i32).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
}

#[tokio::test]
async fn a_background_child_that_never_stops_writing_does_not_keep_the_exit() {
    let guest = Guest::real();
    let session = guest.session(SessionMode::Fresh).await;
    // A trickle keeps a pipe from falling quiet; a flood also keeps the way to the host full.
    let drop_by_drop = "while :; do echo x; sleep 0.02; done";
    let writers =
        [drop_by_drop.to_owned(), "yes".to_owned(), format!("yes & {{ {drop_by_drop}; }} >&2")];
    for writer in writers {
        let request = script(&format!("{writer} & exec sleep 0.1"));
        let mut exec = session.exec(request, LIMIT).await.unwrap();
        let status = async {
            loop {
                if let ExecEvent::Exit(status) = exec.next().await.unwrap().unwrap() {
                    break status;
                }
            }
        };
        let status = tokio::time::timeout(LIMIT, status).await;
        assert_eq!(status.unwrap_or_else(|_| panic!("`{writer}` kept the exit")), EXITED);
    }
}

#[tokio::test]
async fn everything_written_comes_before_the_exit() {
    let guest = Guest::real();
    let session = guest.session(SessionMode::Fresh).await;
    let request = command(&["head", "-c", "5000000", "/dev/zero"]);
    let exec = session.exec(request, LIMIT).await.unwrap();
    let result = exec.output(8 << 20).await.unwrap();
    assert_eq!((result.stdout.len(), result.status), (5_000_000, EXITED));
}

#[tokio::test]
async fn a_slow_consumer_stops_the_program_until_it_reads() {
    let guest = Guest::real();
    let session = guest.session(SessionMode::Fresh).await;
    let dir = tempfile::tempdir().unwrap();
    let marker = dir.path().join("written");
    let text = format!("head -c 4000000 /dev/zero; touch {}", marker.display());
    let mut exec = session.exec(script(&text), LIMIT).await.unwrap();
    let Some(Ok(ExecEvent::Started { pid })) = exec.next().await else { panic!() };
    let is_stuck = || {
        let children = format!("/proc/{pid}/task/{pid}/children");
        let child = fs::read_to_string(children).unwrap_or_default();
        let call = fs::read_to_string(format!("/proc/{}/syscall", child.trim()));
        // Number 1 is `write` on x86-64; elsewhere any wait will do.
        call.is_ok_and(|call| call.starts_with("1 ") || !cfg!(target_arch = "x86_64"))
    };
    eventually("the program waits to write", async || is_stuck()).await;
    session.health(LIMIT).await.unwrap();
    assert!(!marker.exists());
    let result = exec.output(8 << 20).await.unwrap();
    assert_eq!((result.stdout.len(), result.status), (4_000_000, EXITED));
    assert!(marker.exists());
}

#[tokio::test]
async fn input_for_a_program_that_closed_it_is_swallowed() {
    let guest = Guest::real();
    let session = guest.session(SessionMode::Fresh).await;
    let request = ExecRequest { stdin: true, ..script("exec <&-; echo closed; sleep 1000") };
    let mut exec = session.exec(request, LIMIT).await.unwrap();
    while !matches!(exec.next().await, Some(Ok(ExecEvent::Stdout(_)))) {}
    exec.input().write_stdin(&vec![0; 2 << 20]).await.unwrap();
}

#[tokio::test]
async fn input_nobody_asked_for_ends_the_program() {
    tokio::task::spawn_blocking(|| {
        let guest = Guest::real();
        let mut host = guest.raw(1);
        host.open();
        host.send(1, &HostMessage::Exec(command(&["sleep", "1000"])));
        host.send_frame(1, 1, b"data");
        let error = host.last_message(1);
        assert!(matches!(error, mvm_core::guest::GuestMessage::Error(_)), "{error:?}");
    })
    .await
    .unwrap();
}

#[tokio::test]
async fn two_hundred_programs_at_once_write_and_are_reaped() {
    let mut guest = Guest::real();
    let session = guest.session(SessionMode::Fresh).await;
    let mut runs = tokio::task::JoinSet::new();
    for number in 0..200 {
        let session = session.clone();
        runs.spawn(async move {
            let request = ExecRequest { stdin: true, ..script("read x; echo $x $x >&2; exit $x") };
            let (mut events, mut input) = session.exec(request, LIMIT).await.unwrap().split();
            input.write_stdin(format!("{number}\n").as_bytes()).await.unwrap();
            let mut stderr = Vec::new();
            let status = loop {
                match events.next().await.unwrap().unwrap() {
                    ExecEvent::Exit(status) => break status,
                    ExecEvent::Stderr(data) => stderr.extend(data),
                    _ => {}
                }
            };
            assert_eq!(status, ExitStatus::Exited { code: number });
            assert_eq!(stderr, format!("{number} {number}\n").into_bytes());
        });
    }
    while let Some(result) = runs.join_next().await {
        result.unwrap();
    }
    let agent = guest.process.as_mut().unwrap().id();
    let children = fs::read_to_string(format!("/proc/{agent}/task/{agent}/children")).unwrap();
    assert_eq!(children, "", "zombies are left");
    let open = fs::read_dir(format!("/proc/{agent}/fd")).unwrap().count();
    assert!(open < 12, "{open} descriptors are left open");
}

#[tokio::test]
async fn the_kernels_log_is_text_lines() {
    if fs::File::open("/dev/kmsg").is_err() {
        eprintln!("skipped: /dev/kmsg cannot be opened here");
        return;
    }
    let guest = Guest::real();
    let session = guest.session(SessionMode::Fresh).await;
    let mut log = session.kernel_log(false, LIMIT).await.unwrap();
    let mut text = Vec::new();
    while let Some(piece) = log.next().await {
        text.extend(piece.unwrap());
    }
    let text = String::from_utf8_lossy(&text);
    for line in text.lines() {
        assert!(line.starts_with('[') && line.contains("] "), "{line}");
    }
    let follow = session.kernel_log(true, LIMIT).await.unwrap();
    drop(follow);
    session.health(LIMIT).await.unwrap();
}
