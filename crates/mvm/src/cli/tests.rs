use clap::{Command, CommandFactory};

use super::*;
use crate::output::capture;

/// Every command with subcommands and every verb, with its full name.
fn commands() -> Vec<(String, Command)> {
    fn visit(prefix: &str, command: &Command, found: &mut Vec<(String, Command)>) {
        let name = format!("{prefix}{}", command.get_name());
        found.push((name.clone(), command.clone()));
        for sub in command.get_subcommands().filter(|sub| sub.get_name() != "help") {
            visit(&format!("{name} "), sub, found);
        }
    }
    let mut found = Vec::new();
    visit("", &Cli::command(), &mut found);
    found
}

/// The example lines of a command's help.
fn examples(command: &Command) -> Vec<String> {
    let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
    let Some((_, rest)) = help.split_once("Examples:\n") else { return Vec::new() };
    let lines = rest.lines().take_while(|line| line.starts_with("  "));
    // Some show what another program does with the result.
    let is_ours = |line: &&str| line.split("| ").any(|part| part.starts_with("mvm "));
    lines.map(str::trim).filter(is_ours).map(str::to_owned).collect()
}

/// The arguments of a command in an example, as a shell would split them. What follows two blanks
/// is a remark.
fn split(line: &str) -> Vec<String> {
    let line = line.split_once("  ").map_or(line, |(command, _)| command);
    let mut piped = line.split("| ");
    let line = piped.find(|part| part.starts_with("mvm")).unwrap_or(line);
    let line = [" >", " &&"].iter().fold(line, |line, end| line.split(end).next().unwrap_or(line));
    let mut words = Vec::new();
    for (i, part) in line.split('\'').enumerate() {
        match i % 2 {
            0 => words.extend(part.split_whitespace().map(str::to_owned)),
            _ => words.push(part.to_owned()),
        }
    }
    words
}

#[test]
fn the_command_line_is_consistent() {
    Cli::command().debug_assert();
}

#[test]
fn every_verbs_help_says_what_it_does_and_has_examples_that_parse() {
    for (name, command) in commands() {
        assert!(command.get_about().is_some(), "`{name}` does not say what it does");
        let examples = examples(&command);
        assert!(!examples.is_empty(), "the help of `{name}` has no example");
        let shorthand = name.replace("mvm instance ", "mvm ").replace("destroy", "rm");
        let has_own = |line: &String| {
            let line = split(line).join(" ");
            line.starts_with(&name) || line.starts_with(&shorthand) || name == "mvm rm"
        };
        assert!(examples.iter().any(has_own), "the help of `{name}` shows something else");
        for example in examples {
            if let Err(error) = Cli::try_parse_from(split(&example)) {
                panic!("`{example}` in the help of `{name}` does not parse: {error}");
            }
        }
    }
}

#[test]
fn the_help_lists_the_exit_codes_of_the_document() {
    let (_, codes) = AFTER_HELP.split_once("Exit codes:\n").unwrap();
    let words: Vec<&str> = codes.split_whitespace().collect();
    let document = include_str!("../../../../docs/exit-codes.md");
    for row in document.lines().filter_map(|line| line.strip_prefix("| ")) {
        let code = row.split_whitespace().next().unwrap();
        // What a shell reports for a reader that went away needs no line in the help.
        if code != "code" && code != "141" {
            assert!(words.contains(&code), "{code} is not in the help");
        }
    }
}

#[test]
fn options_are_parsed_into_typed_values() {
    for good in [
        "mvm exec demo/hello -e A=b -i -w / -u nobody --timeout 1m -- cat -n",
        "mvm stop --all",
        "mvm start --all --no-wait",
        "mvm -o json ps",
        "mvm ps -o yaml --state-dir /x --vmm sim --accel tcg --log debug --no-color",
        "mvm tenant create a --mem 2G --subnet 10.240.1.0/24",
        "mvm pool create a/b --boot-timeout 2m",
        "mvm up - --wait --no-wait --timeout 5",
    ] {
        assert!(Cli::try_parse_from(split(good)).is_ok(), "{good}");
    }
    for bad in [
        "mvm exec demo/hello",
        "mvm exec demo/hello --",
        "mvm exec demo/hello -z uname",
        "mvm exec demo/hello -e A -- true",
        "mvm start",
        "mvm stop a/b --grace 1 --force",
        "mvm tenant create A",
        "mvm tenant create a --mem 2X",
        "mvm tenant update a --lift memory",
        "mvm pool create a/b --net bridge",
        "mvm pool create a/b --restart sometimes",
        "mvm pool scale a/b",
        "mvm bootstrap --modules /lib/modules/x",
        "mvm ps --vmm xen",
        "mvm ps -o xml",
        "mvm logs a/b --source serial",
        "mvm",
    ] {
        let error = Cli::try_parse_from(split(bad)).expect_err(bad);
        assert_eq!(error.exit_code(), i32::from(exit::USAGE), "{bad}");
    }
}

#[test]
fn what_follows_the_program_of_an_exec_is_the_programs() {
    for line in ["mvm exec a/b -u me ls -o json -i", "mvm exec a/b -u me -- ls -o json -i"] {
        let cli = Cli::try_parse_from(split(line)).unwrap();
        assert_eq!(cli.global.output, Format::Table, "{line}");
        assert!(format!("{:?}", cli.verb).contains(r#"["ls", "-o", "json", "-i"]"#), "{line}");
    }
}

#[test]
fn without_a_verb_the_help_of_what_was_typed_is_shown() {
    for (line, verb) in
        [("mvm", "  up "), ("mvm tenant", "  create "), ("mvm node record", "  set ")]
    {
        // An option, which may come from the environment, is what keeps clap from showing it.
        let error = Cli::try_parse_from(split(&format!("{line} --no-color"))).expect_err(line);
        assert_eq!(error.exit_code(), i32::from(exit::USAGE), "{line}");
        let help = help_for_missing_verb(&error).expect(line).to_string();
        assert!(help.contains(&format!("Usage: {line} ")) && help.contains(verb), "{help}");
    }
    for line in ["mvm ps -o xml", "mvm sp", "mvm up", "mvm --help"] {
        let error = Cli::try_parse_from(split(line)).expect_err(line);
        assert!(help_for_missing_verb(&error).is_none(), "{line}");
    }
}

fn refusal(line: &str) -> String {
    let mut error = Cli::try_parse_from(split(line)).expect_err(line);
    foreign::advise(&mut error);
    error.to_string()
}

#[test]
fn words_of_other_tools_are_answered_with_mvms_own() {
    for (line, own) in [
        ("mvm images", "mvm image list"),
        ("mvm pull nginx", "mvm run IMAGE"),
        ("mvm build .", "docker-archive:FILE"),
        ("mvm inspect web", "mvm instance info"),
        ("mvm pause web", "mvm warm"),
        ("mvm compose up", "mvm up FILE"),
        ("mvm wait web", "mvm attach"),
        ("mvm export web", "mvm cp -a"),
        ("mvm pin web", "mvm instance pin"),
        ("mvm volume ls", "mvm disk"),
        ("mvm run --network host builtin", "--tenant"),
        ("mvm run --hostname=foo builtin", "instance's id"),
        ("mvm pool policy web --keep-vmm=no", "was removed"),
    ] {
        let text = refusal(line);
        assert!(text.contains(own), "{line}: {text}");
        assert!(!text.contains("similar"), "{line}: {text}");
    }
}

#[test]
fn a_slip_of_the_finger_gets_a_tip_and_another_word_none() {
    assert!(refusal("mvm sotp web").contains("stop"));
    assert!(refusal("mvm run --publsh 1:2 builtin").contains("--publish"));
    let text = refusal("mvm run --bogus builtin");
    assert!(!text.contains("tip"), "{text}");
}

#[test]
fn what_people_type_at_docker_is_taken() {
    for good in [
        "mvm stop a b",
        "mvm rm -f a b i-3f",
        "mvm start a b",
        "mvm kill web",
        "mvm ps -q",
        "mvm ps -aq",
        "mvm stop -t 1 web",
        "mvm stop --time 1 web",
        "mvm restart -t 1 web",
        "mvm run -m 512m --cpus 2 builtin",
        "mvm run --memory 1g -v data:/data builtin",
        "mvm run --volume data:/data:ro builtin",
        "mvm pool info web",
        "mvm disk create data --size 1G",
    ] {
        assert!(Cli::try_parse_from(split(good)).is_ok(), "{good}");
    }
    let error = Cli::try_parse_from(split("mvm run -v /etc:/mnt builtin")).unwrap_err();
    let text = error.to_string();
    assert!(
        text.contains("directory of this machine") && text.contains("mvm disk create"),
        "{text}"
    );
}

#[test]
fn help_and_version_are_no_errors() {
    for line in ["mvm --help", "mvm help exec", "mvm --version", "mvm pool create --help"] {
        let error = Cli::try_parse_from(split(line)).expect_err(line);
        assert_eq!(error.exit_code(), 0, "{line}");
    }
}

#[test]
fn completions_are_made_for_every_shell() {
    for shell in ["bash", "zsh", "fish", "powershell", "elvish"] {
        let (ui, captured) = capture::ui();
        let cli = Cli::try_parse_from(["mvm", "completions", shell]).unwrap();
        run(cli, Rc::new(ui)).unwrap();
        assert!(captured.data().contains("mvm"), "{shell}");
    }
}

#[test]
fn the_version_is_data() {
    let (ui, captured) = capture::ui_with(Format::Json);
    run(Cli::try_parse_from(["mvm", "version"]).unwrap(), Rc::new(ui)).unwrap();
    let version: serde_json::Value = serde_json::from_str(&captured.data()).unwrap();
    assert_eq!(version["version"], env!("CARGO_PKG_VERSION"));
}

#[test]
fn a_log_level_that_does_not_exist_is_a_usage_error() {
    assert_eq!(crate::log::to_stderr("a=b=c").unwrap_err().exit_code(), exit::USAGE);
}

#[test]
fn an_errors_usage_is_the_verbs_own_whatever_the_environment_sets() {
    let words = ["mvm", "--state-dir", "/x", "disk", "create"];
    let mut error = Cli::try_parse_from(words).unwrap_err();
    show_own_usage(&mut error, words.iter().map(ToString::to_string));
    let text = error.to_string();
    assert!(text.contains("Usage: mvm disk create [OPTIONS] --size <SIZE> <PATH>"), "{text}");
    assert!(!text.contains("--state-dir"), "{text}");
}

#[test]
fn the_way_into_a_lima_machine_knows_which_global_options_have_a_value() {
    let command = Cli::command();
    let with_value = command.get_arguments().filter(|arg| arg.get_action().takes_values());
    let spelled = with_value.flat_map(|arg| {
        let short = arg.get_short().map(|short| format!("-{short}"));
        short.into_iter().chain(arg.get_long().map(|long| format!("--{long}")))
    });
    let mut known = mvm_lima::OPTIONS_WITH_VALUES.to_vec();
    let mut spelled: Vec<String> = spelled.collect();
    known.sort_unstable();
    spelled.sort_unstable();
    assert_eq!(spelled, known);
}
