use super::*;

fn words(text: &str) -> Vec<String> {
    text.split_whitespace().map(str::to_owned).collect()
}

fn program(image: &ImageConfig, spec: &ProcessSpec) -> MainProgram {
    match resolve(image, spec).unwrap() {
        MainProcess::Program(program) => *program,
        other => panic!("{other:?}"),
    }
}

fn init(image: &ImageConfig, spec: &ProcessSpec) -> MainProgram {
    match resolve(image, spec).unwrap() {
        MainProcess::Init(program) => *program,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_command_replaces_cmd_and_an_entrypoint_replaces_both() {
    for (entrypoint, cmd, new_entrypoint, new_command, argv) in [
        ("", "sh", None, None, "sh"),
        ("/entry -x", "run", None, None, "/entry -x run"),
        ("/entry -x", "run", None, Some("other a"), "/entry -x other a"),
        ("/entry -x", "run", None, Some(""), "/entry -x"),
        ("/entry -x", "run", Some("/mine"), None, "/mine"),
        ("/entry -x", "run", Some("/mine"), Some("a"), "/mine a"),
        ("/entry -x", "run", Some(""), Some("a b"), "a b"),
        ("", "", None, Some("a"), "a"),
    ] {
        let image = ImageConfig {
            entrypoint: words(entrypoint),
            cmd: words(cmd),
            ..ImageConfig::default()
        };
        let spec = ProcessSpec {
            entrypoint: new_entrypoint.map(words),
            command: new_command.map(words),
            ..ProcessSpec::default()
        };
        assert_eq!(program(&image, &spec).argv, words(argv), "{entrypoint} {cmd} {spec:?}");
    }
}

#[test]
fn an_image_without_a_program_only_waits() {
    let spec = ProcessSpec { user: Some("nobody".into()), ..ProcessSpec::default() };
    assert_eq!(resolve(&ImageConfig::default(), &spec).unwrap(), MainProcess::Nothing);
}

#[test]
fn an_init_is_process_1_unless_a_program_is_named() {
    let image = ImageConfig {
        init: Some("/sbin/init".into()),
        cmd: words("ignored"),
        ..ImageConfig::default()
    };
    assert_eq!(init(&image, &ProcessSpec::default()).argv, ["/sbin/init"]);
    let spec = ProcessSpec { command: Some(words("sh")), ..ProcessSpec::default() };
    assert_eq!(program(&image, &spec).argv, ["sh"]);
}

#[test]
fn an_init_is_known_behind_a_link_of_any_name() {
    let links = [("/init", InitMode::System), ("/opt/entry", InitMode::System)];
    let tini = ("/sbin/init", InitMode::Program);
    let init_links = links.into_iter().chain([tini]).map(|(link, mode)| (link.to_owned(), mode));
    let image = ImageConfig {
        init: Some("/sbin/init".into()),
        init_links: init_links.collect(),
        env: vec!["PATH=/bin:/opt".to_owned()],
        ..ImageConfig::default()
    };
    let command = |text: &str| ProcessSpec { command: Some(words(text)), ..Default::default() };
    for text in ["/init --unit=rescue.target", "/opt/entry", "entry"] {
        assert_eq!(init(&image, &command(text)).argv, words(text));
    }
    assert!(program(&image, &ProcessSpec::default()).is_first, "/sbin/init is tini");
    assert!(!program(&image, &command("/bin/entry")).is_first);
    let mode = Some(InitMode::None);
    assert!(!program(&image, &ProcessSpec { init: mode, ..command("/init") }).is_first);
}

#[test]
fn an_init_has_its_arguments_and_variables_whoever_names_it() {
    let image = ImageConfig {
        entrypoint: words("/sbin/init"),
        cmd: words("--unit=rescue.target"),
        env: ["FOO=bar", "container=docker"].map(str::to_owned).to_vec(),
        user: "web".into(),
        init: Some("/sbin/init".into()),
        ..ImageConfig::default()
    };
    let found = init(&image, &ProcessSpec::default());
    assert_eq!(found.argv, ["/sbin/init", "--unit=rescue.target"]);
    assert_eq!(found.env, [("FOO".to_owned(), "bar".to_owned())]);
    assert_eq!(found.user, None);
    let spec = ProcessSpec { command: Some(words("runit")), ..ProcessSpec::default() };
    assert_eq!(init(&ImageConfig::default(), &spec).argv, ["runit"]);
    for odd in ["bin/init", "/in it", "/in\"it", "/\u{e9}"] {
        let command = Some(vec![odd.to_owned()]);
        let mode = Some(InitMode::System);
        let spec = ProcessSpec { command, init: mode, ..ProcessSpec::default() };
        let error = resolve(&ImageConfig::default(), &spec).unwrap_err();
        assert_eq!(error, ProcessError::Init { path: odd.to_owned() });
    }
}

#[test]
fn a_pool_says_what_cannot_be_told_by_the_name() {
    let mut image = ImageConfig { entrypoint: words("/init"), ..ImageConfig::default() };
    assert!(program(&image, &ProcessSpec::default()).is_first);
    let with = |mode| ProcessSpec { init: Some(mode), ..ProcessSpec::default() };
    assert!(!program(&image, &with(InitMode::None)).is_first);
    assert_eq!(init(&image, &with(InitMode::System)).argv, ["/init"]);
    image = ImageConfig { entrypoint: words("/app/start"), ..ImageConfig::default() };
    assert!(!program(&image, &ProcessSpec::default()).is_first);
    assert!(program(&image, &with(InitMode::Program)).is_first);
    image = ImageConfig { init: Some("/sbin/init".into()), ..ImageConfig::default() };
    assert_eq!(resolve(&image, &with(InitMode::None)).unwrap(), MainProcess::Nothing);
}

#[test]
fn what_linux_takes_is_taken_and_more_is_named() {
    let image = ImageConfig::default();
    let sized = |len: usize| ProcessSpec {
        command: Some(words("env")),
        env: [("BIG".to_owned(), "x".repeat(len))].into(),
        ..ProcessSpec::default()
    };
    let most = LONGEST_TEXT - "BIG=".len();
    assert_eq!(program(&image, &sized(most)).env[0].1.len(), most);
    let error = |spec: ProcessSpec| resolve(&image, &spec).unwrap_err().to_string();
    assert_eq!(
        error(sized(most + 1)),
        "variable BIG has 131072 bytes, but Linux takes at most 131071"
    );
    let argument = vec!["a".to_owned(), "x".repeat(LONGEST_TEXT + 1)];
    let text = error(ProcessSpec { command: Some(argument), ..ProcessSpec::default() });
    assert!(text.starts_with("argument 1 has 131072 bytes"), "{text}");
    let many = vec!["x".repeat(100_000); 70];
    let spec = ProcessSpec { command: Some(many.clone()), ..ProcessSpec::default() };
    assert!(error(spec).starts_with("the main process's arguments and variables take 7000"));
    let error = check_size(&many, &[]).unwrap_err().to_string();
    assert!(error.starts_with("arguments and variables have 7000630 bytes"), "{error}");
}

#[test]
fn the_pools_variables_user_and_directory_go_before_the_images() {
    let image = ImageConfig {
        cmd: words("app"),
        env: ["A=1", "B=x=y", "A=2", "broken", "=no"].map(str::to_owned).to_vec(),
        user: "app:staff".into(),
        working_dir: "srv".into(),
        stop_signal: Some("SIGQUIT".into()),
        ..ImageConfig::default()
    };
    let plain = program(&image, &ProcessSpec::default());
    let pair = |name: &str, value: &str| (name.to_owned(), value.to_owned());
    assert_eq!(plain.env, [pair("A", "2"), pair("B", "x=y")]);
    assert_eq!((plain.user.as_deref(), plain.cwd.as_str()), (Some("app:staff"), "/srv"));
    assert_eq!(plain.stop_signal, 3);
    let spec = ProcessSpec {
        env: BTreeMap::from([("B".into(), "z".into()), ("C".into(), String::new())]),
        user: Some("0".into()),
        workdir: Some("/tmp".into()),
        stop_signal: Some("int".into()),
        ..ProcessSpec::default()
    };
    let mine = program(&image, &spec);
    assert_eq!(mine.env, [pair("A", "2"), pair("B", "z"), pair("C", "")]);
    assert_eq!((mine.user.as_deref(), mine.cwd.as_str()), (Some("0"), "/tmp"));
    assert_eq!(mine.stop_signal, 2);
    let bare = ImageConfig { cmd: words("app"), ..ImageConfig::default() };
    let bare = program(&bare, &ProcessSpec::default());
    assert_eq!((bare.user, bare.cwd.as_str(), bare.stop_signal), (None, "/", 15));
}

#[test]
fn signals_have_names_and_numbers() {
    for (text, number) in [
        ("SIGTERM", 15),
        ("term", 15),
        ("9", 9),
        ("SIGSYS", 31),
        ("SIGRTMIN", 34),
        ("SIGRTMIN+3", 37),
        ("RTMAX-1", 63),
    ] {
        assert_eq!(parse_signal(text), Ok(number), "{text}");
    }
    for text in ["", "0", "65", "-1", "+9", "SIGFOO", "RTMIN+99", "RTMAX-40", "RTMIN3", "SIG"] {
        assert!(parse_signal(text).is_err(), "{text}");
    }
}

#[test]
fn what_makes_no_sense_is_named() {
    let refusal = |spec: ProcessSpec| spec.check().unwrap_err().to_string();
    let spec = ProcessSpec::default();
    let workdir = refusal(ProcessSpec { workdir: Some("srv".into()), ..spec.clone() });
    assert_eq!(workdir, "working directory `srv` is not absolute");
    let env = BTreeMap::from([("A=B".to_owned(), String::new())]);
    let variable = refusal(ProcessSpec { env, ..spec.clone() });
    assert_eq!(variable, "`A=B` cannot name an environment variable");
    let command = Some(vec!["a\0b".to_owned()]);
    assert_eq!(refusal(ProcessSpec { command, ..spec }), "command contains a NUL character");
}
