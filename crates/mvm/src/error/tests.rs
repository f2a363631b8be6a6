use super::*;

#[test]
fn typed_errors_of_the_agent_become_documented_exit_codes() {
    for (code, expected) in [
        (ErrorCode::Invalid, 2),
        (ErrorCode::NotFound, 3),
        (ErrorCode::OverLimit, 4),
        (ErrorCode::Conflict, 5),
        (ErrorCode::GuestDenied, 126),
        (ErrorCode::GuestNotFound, 127),
        (ErrorCode::Unsupported, 1),
        (ErrorCode::Guest, 1),
        (ErrorCode::BadRecord, 1),
        (ErrorCode::Internal, 1),
        (ErrorCode::Unknown, 1),
    ] {
        assert_eq!(Error::Api(ApiError::new(code, "x")).exit_code(), expected, "{code:?}");
    }
}

#[test]
fn an_error_says_what_why_and_what_to_type_without_repeating_itself() {
    let error = Error::from(
        ApiError::new(ErrorCode::NotFound, "there is no pool demo/x").hint("see `mvm pool list`"),
    );
    let report = error.report(Color::Plain);
    assert_eq!(report, "error: there is no pool demo/x\nhint: see `mvm pool list`");

    let broken = io::Error::new(io::ErrorKind::ConnectionReset, "reset by peer");
    let report = Error::from(ConnectionError::Io(broken)).report(Color::Plain);
    assert!(
        report.starts_with("error: the connection to the agent broke: reset by peer\nhint:"),
        "{report}"
    );
}

#[test]
fn one_is_not_many() {
    assert_eq!(Error::ChecksFailed(1).to_string(), "1 check failed");
    assert!(Error::NetworkDiffers(1).to_string().ends_with("in 1 point"));
    assert!(Error::NetworkDiffers(2).to_string().ends_with("in 2 points"));
}

#[test]
fn a_dead_agents_last_words_are_quoted() {
    let tail = (0..30).map(|i| format!("line {i}")).collect();
    let error = Error::AgentDied { pid: 7, how: "ended at once", log: "/x/agent.log".into(), tail };
    let report = error.report(Color::Plain);
    assert!(report.contains("\n  | line 29\nhint: the whole log is in /x/agent.log"), "{report}");
    assert!(!report.contains("line 19\n"), "{report}");
}

#[test]
fn a_reader_that_went_away_is_no_message() {
    let error = Error::output(io::Error::from(io::ErrorKind::BrokenPipe));
    assert!(error.is_silent());
    assert_eq!(error.exit_code(), 141);
    assert!(!Error::output(io::Error::from(io::ErrorKind::StorageFull)).is_silent());
}

#[test]
fn a_socket_that_belongs_to_root_hints_at_sudo() {
    let error = |kind: io::ErrorKind| Error::Unreachable {
        socket: "/s".into(),
        source: Box::new(io::Error::from(kind)),
    };
    let hint = error(io::ErrorKind::PermissionDenied).hint();
    assert!(hint.is_some_and(|hint| hint.contains("sudo")));
    assert_eq!(error(io::ErrorKind::Other).hint(), None);
}

#[test]
fn every_exit_code_is_documented() {
    let document = include_str!("../../../../docs/exit-codes.md");
    for code in [
        exit::OK,
        exit::FAILURE,
        exit::USAGE,
        exit::NOT_FOUND,
        exit::OVER_LIMIT,
        exit::CONFLICT,
        exit::WAIT_TIMEOUT,
        exit::UNREACHABLE,
        exit::PROGRAM_DENIED,
        exit::PROGRAM_NOT_FOUND,
        exit::INTERRUPTED,
        exit::BROKEN_PIPE,
    ] {
        assert!(document.contains(&format!("| {code} |")), "{code} is not in the document");
    }
}

#[test]
fn no_hint_is_at_what_is_gone() {
    let failed = |hint: &str| {
        Error::Failed(Failure {
            message: "it failed".to_owned(),
            console: Vec::new(),
            hint: hint.to_owned(),
            superseded: false,
            others: 0,
            program: None,
        })
    };
    let pool: PoolPath = "default/web-1".parse().unwrap();
    let api = ApiError::new(ErrorCode::Conflict, "x").hint("see `mvm why i-0` and `mvm logs i-0`");
    for error in [
        failed("see `mvm why default/web-1/i-00000001`"),
        failed(&build_hint(&pool, &"nginx:1.27".parse().unwrap())),
        Error::Api(api),
    ] {
        let hint = error.after_removal().hint().unwrap();
        assert!(!hint.contains("web-1") && !hint.contains("i-0"), "{hint}");
    }
    assert!(Error::StoppedWaiting.after_removal().hint().is_none());
    for hint in ["`mvm tenant update`", "stop or destroy something first: `mvm ps -a`"] {
        let kept = ApiError::new(ErrorCode::OverLimit, "x").hint(hint);
        assert_eq!(Error::Api(kept).after_removal().hint().unwrap(), hint);
    }
}

#[test]
fn an_image_that_cannot_be_had_is_looked_for_where_it_comes_from() {
    let pool: PoolPath = "demo/x".parse().unwrap();
    for (image, part) in [
        ("example.com/a:v1", "this machine reaches example.com,"),
        ("oci:/srv/layout", "what is at /srv/layout on this machine"),
        ("rootfs:/srv/root.tar", "what is at /srv/root.tar"),
        ("mmdebstrap:bookworm", "names of the release and the packages"),
        ("builtin", "`mvm doctor`"),
    ] {
        let hint = build_hint(&pool, &image.parse().unwrap());
        assert!(hint.contains(part), "{hint}");
        assert!(hint.ends_with("; then try again with `mvm pool build demo/x`"), "{hint}");
        assert_eq!(hint.contains("doctor"), image == "builtin", "{hint}");
    }
}

#[test]
fn a_main_program_that_cannot_be_run_ends_with_a_shells_codes() {
    for (program, code) in [
        (Some(ProgramFault::NotFound), 127),
        (Some(ProgramFault::Denied), 126),
        (Some(ProgramFault::Unknown), 1),
        (None, 1),
    ] {
        let error = Error::Failed(Failure {
            message: "it failed".to_owned(),
            console: Vec::new(),
            hint: String::new(),
            superseded: false,
            others: 0,
            program,
        });
        assert_eq!(error.exit_code(), code, "{program:?}");
    }
}
