//! Whole commands against an agent that the test plays, over a real Unix socket.

mod fake_agent;
mod scenarios;
mod skew;

use std::os::unix::fs::PermissionsExt;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use clap::Parser;
use mvm_core::admit::{Capacity, Request, Usage};
use mvm_core::lifecycle::State;
use mvm_core::record::BuildState;
use mvm_core::vmm::{Accel, VmmKind};
use mvm_wire::view::{BaseView, InstanceView, NodeView, PoolView, TenantView, VerifyView};
use mvm_wire::{Accepted, ApiError, Call, ErrorCode, InstanceTarget, Reply};

use crate::cli::{self, Cli};
use crate::client::{Client, Wanted};
use crate::error::Color;
use crate::output::{Format, capture};
use crate::samples;
use crate::units::Seconds;
use crate::wait;
use fake_agent::{Act, FakeAgent};

const INSTANCE: &str = "demo/hello/i-00000001";

/// What a command left behind.
struct Ran {
    code: u8,
    data: String,
    talk: String,
}

fn run_with(agent: &FakeAgent, format: Format, line: &str) -> Ran {
    let (ui, captured) = capture::ui_with(format);
    let state_dir = agent.state_dir().to_str().unwrap();
    let args = ["mvm", "--state-dir", state_dir].into_iter().chain(line.split_whitespace());
    let ui = Rc::new(ui);
    let (code, error) = match cli::run(Cli::try_parse_from(args).unwrap(), Rc::clone(&ui)) {
        Ok(code) => (code, String::new()),
        Err(error) => (error.exit_code(), error.report(Color::Plain)),
    };
    Ran { code, data: captured.data(), talk: captured.talk() + &error }
}

fn run(agent: &FakeAgent, line: &str) -> Ran {
    run_with(agent, Format::Table, line)
}

fn accepted() -> Accepted {
    Accepted {
        revision: 9,
        instances: vec![InstanceTarget { path: INSTANCE.parse().unwrap(), generation: 1 }],
        notes: vec!["a note".into()],
        ..Accepted::default()
    }
}

fn snapshot(instances: Vec<InstanceView>, pools: Vec<PoolView>) -> Reply {
    Reply::Snapshot { instances, pools, tenant_exists: false, disks: vec![] }
}

fn starting() -> InstanceView {
    InstanceView {
        state: State::Created,
        activity: Some("starting".into()),
        ..samples::instance(INSTANCE)
    }
}

fn node() -> NodeView {
    NodeView {
        version: "0.1.0".into(),
        pid: 7,
        started_unix_ms: 0,
        state_dir: "/var/lib/mvm".into(),
        hostname: "host".into(),
        vmm: VmmKind::Sim.into(),
        accel: Accel::Tcg.into(),
        chosen_because: "it was requested".into(),
        capacity: Capacity::default(),
        reserved: Usage::default(),
        tenants: 0,
        bad_records: vec![],
        problems: vec![],
        connections: 0,
        connections_max: 8192,
        refused_connections: 0,
    }
}

#[test]
fn typed_errors_end_with_their_exit_codes_and_hints() {
    for (code, expected) in [
        (ErrorCode::NotFound, 3),
        (ErrorCode::OverLimit, 4),
        (ErrorCode::Conflict, 5),
        (ErrorCode::Invalid, 2),
        (ErrorCode::Internal, 1),
    ] {
        let error = ApiError::new(code, "it cannot be").hint("try this");
        let agent = FakeAgent::new(move |_| vec![Act::Reply(Reply::Error(error.clone()))]);
        let ran = run(&agent, "start demo/hello");
        assert_eq!(ran.code, expected, "{code:?}");
        assert_eq!(ran.talk, "error: it cannot be\nhint: try this");
        assert_eq!(ran.data, "");
    }
}

#[test]
fn an_agent_that_hangs_up_or_talks_garbage_is_unreachable() {
    for act in [Act::HangUp, Act::Bytes(b"HTTP/1.1 400 Bad Request\r\n\r\n".to_vec())] {
        let agent = FakeAgent::new(move |_| vec![act.clone()]);
        for line in ["ps", "start demo/hello", "exec demo/hello -- true", "logs demo/hello"] {
            let ran = run(&agent, line);
            assert_eq!(ran.code, 7, "{line}: {}", ran.talk);
            assert!(ran.talk.contains("hint:"), "{}", ran.talk);
        }
    }
}

#[test]
fn a_call_that_nobody_read_is_made_again() {
    let agent = FakeAgent::after_a_killed_one(|_| vec![Act::Reply(Reply::Pools(Vec::new()))]);
    let ran = run(&agent, "pool list");
    assert_eq!(ran.code, 0, "{}", ran.talk);
}

#[test]
fn an_agent_that_knows_no_greeting_is_called_all_the_same_unless_it_had_to_confine() {
    let agent = FakeAgent::that_knows_no_greeting(|_| vec![Act::Reply(Reply::Pools(Vec::new()))]);
    let ran = run(&agent, "pool list");
    assert_eq!(ran.code, 0, "{}", ran.talk);
    let ran = run(&agent, "--scope acme pool list");
    assert_eq!((ran.code, ran.data.as_str()), (1, ""), "{}", ran.talk);
    assert!(ran.talk.contains("does not know the call"), "{}", ran.talk);
}

#[test]
fn an_answer_of_another_kind_is_a_failure_that_names_it() {
    let agent = FakeAgent::new(|_| vec![Act::Reply(Reply::Done)]);
    let ran = run(&agent, "ps");
    assert_eq!(ran.code, 1);
    assert!(ran.talk.contains("(done)"), "{}", ran.talk);
}

#[test]
fn several_names_are_one_wait_and_what_is_refused_is_said_beside_the_rest() {
    let agent = FakeAgent::new(|call| match call {
        Call::Submit(Request::InstanceStart { selector, .. }) => {
            vec![Act::Reply(match selector.to_string().as_str() {
                "nope" => Reply::Error(ApiError::new(ErrorCode::NotFound, "no tenant nope")),
                _ => Reply::Accepted(accepted()),
            })]
        }
        Call::Watch { instances, .. } => {
            assert_eq!(instances.len(), 1, "it is meant twice");
            vec![Act::Reply(snapshot(vec![samples::instance(INSTANCE)], vec![]))]
        }
        other => panic!("{other:?}"),
    });
    let ran = run(&agent, "start demo/hello nope demo/hello demo");
    assert_eq!((ran.code, ran.data.as_str()), (3, "demo/hello/i-00000001\n"), "{}", ran.talk);
    assert!(ran.talk.contains("error: no tenant nope"), "{}", ran.talk);
    assert!(ran.talk.contains("error: 1 of 3 were refused"), "{}", ran.talk);
}

#[test]
fn start_waits_until_the_instance_runs_and_prints_its_path() {
    let agent = FakeAgent::new(|call| match call {
        Call::Submit(Request::InstanceStart { .. }) => {
            vec![Act::Reply(Reply::Accepted(accepted()))]
        }
        Call::Watch { instances, pools, tenant: None, .. } => {
            assert_eq!((instances.len(), pools.len()), (1, 1));
            let views = [starting(), samples::instance(INSTANCE)];
            views.map(|view| Act::Reply(snapshot(vec![view], vec![]))).into()
        }
        other => panic!("{other:?}"),
    });
    let ran = run(&agent, "start demo/hello");
    assert_eq!((ran.code, ran.data.as_str()), (0, "demo/hello/i-00000001\n"));
    assert_eq!(ran.talk, "a note\n", "what is done at once needs no word about the wait");

    let ran = run_with(&agent, Format::Json, "start demo/hello");
    let outcome: serde_json::Value = serde_json::from_str(&ran.data).unwrap();
    assert_eq!(outcome["revision"], 9);
    assert_eq!(outcome["waited"], true);
    assert_eq!(outcome["instances"][0]["state"], "running");
    assert_eq!(ran.talk, "");
}

#[test]
fn without_waiting_one_look_is_enough() {
    let agent = FakeAgent::new(|call| match call {
        Call::Submit(_) => vec![Act::Reply(Reply::Accepted(accepted()))],
        _ => vec![Act::Reply(snapshot(vec![starting()], vec![])), Act::Stay],
    });
    let ran = run_with(&agent, Format::Yaml, "start demo/hello --no-wait");
    assert_eq!(ran.code, 0);
    let outcome: serde_json::Value = serde_saphyr::from_str(&ran.data).unwrap();
    assert_eq!(outcome["waited"], false);
    assert_eq!(outcome["instances"][0]["activity"], "starting");
}

#[test]
fn a_wait_that_takes_too_long_names_what_is_waited_for() {
    let agent = FakeAgent::new(|call| match call {
        Call::Submit(_) => vec![Act::Reply(Reply::Accepted(accepted()))],
        _ => vec![Act::Reply(snapshot(vec![starting()], vec![])), Act::Stay],
    });
    let ran = run(&agent, "start demo/hello --timeout 1");
    assert_eq!(ran.code, 6);
    assert!(
        ran.talk.contains("still waiting for:\n  demo/hello/i-00000001: starting"),
        "{}",
        ran.talk
    );
    assert!(ran.talk.contains("in the background"), "{}", ran.talk);
}

#[test]
fn who_stops_waiting_leaves_the_request_to_go_on() {
    let agent = FakeAgent::new(|_| vec![Act::Stay]);
    let (ui, _) = capture::ui();
    let wanted = Wanted::default();
    let client = Client::new(agent.state_dir().into(), wanted, None, None, Rc::new(ui));
    let request =
        wait::Request { accepted: &accepted(), goal: &wait::Goal::Running, submitted_unix_ms: 0 };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let waiting = wait::wait(&client, &request, Seconds(60), async {}, |_| {});
    let error = runtime.block_on(waiting).unwrap_err();
    assert_eq!(error.exit_code(), 130);
    let report = error.report(Color::Plain);
    assert!(report.contains("goes on in the background"), "{report}");
    assert!(report.contains("mvm ps"), "{report}");
}

#[test]
fn an_agent_that_goes_away_ends_the_wait() {
    let agent = FakeAgent::new(|call| match call {
        Call::Submit(_) => vec![Act::Reply(Reply::Accepted(accepted()))],
        _ => vec![Act::Reply(snapshot(vec![starting()], vec![])), Act::HangUp],
    });
    let ran = run(&agent, "start demo/hello");
    assert_eq!(ran.code, 7);
    let told = ["the request is recorded, and the next agent goes on with it", "`mvm ps -a`"];
    assert!(told.iter().all(|words| ran.talk.contains(words)), "{}", ran.talk);
}

#[test]
fn a_wait_goes_on_with_the_next_agent() {
    let watches = std::sync::atomic::AtomicU32::new(0);
    let agent = FakeAgent::new(move |call| match call {
        Call::Submit(_) => vec![Act::Reply(Reply::Accepted(accepted()))],
        Call::Watch { .. } => match watches.fetch_add(1, std::sync::atomic::Ordering::SeqCst) {
            0 => vec![Act::Reply(snapshot(vec![starting()], vec![])), Act::HangUp],
            1 => vec![Act::HangUp],
            _ => {
                let running = InstanceView { generation: 9, ..samples::instance(INSTANCE) };
                vec![Act::Reply(snapshot(vec![running], vec![]))]
            }
        },
        other => panic!("{other:?}"),
    });
    let ran = run(&agent, "start demo/hello");
    assert_eq!(ran.code, 0, "{}", ran.talk);
}

/// An agent that does this with the first request, and accepts the second.
fn agent_that_first(act: Act) -> FakeAgent {
    let asked = std::sync::atomic::AtomicU32::new(0);
    FakeAgent::new(move |call| match call {
        Call::Submit(_) if asked.fetch_add(1, std::sync::atomic::Ordering::SeqCst) == 0 => {
            vec![act.clone()]
        }
        Call::Submit(_) => vec![Act::Reply(Reply::Accepted(accepted()))],
        _ => {
            let running = InstanceView { generation: 9, ..samples::instance(INSTANCE) };
            vec![Act::Reply(snapshot(vec![running], vec![]))]
        }
    })
}

#[test]
fn a_change_whose_agent_goes_away_is_asked_for_again_with_its_id() {
    let ran = run(&agent_that_first(Act::HangUp), "start demo/hello");
    assert_eq!(ran.code, 0, "{}", ran.talk);
}

#[test]
fn an_agent_that_knows_no_request_ids_is_asked_without_one() {
    let error = ApiError::new(ErrorCode::Unsupported, "the call is not known");
    let ran = run(&agent_that_first(Act::Reply(Reply::Error(error))), "start demo/hello");
    assert_eq!(ran.code, 0, "{}", ran.talk);
}

#[test]
fn up_and_down_take_a_document_to_its_end() {
    let agent = FakeAgent::new(|call| match call {
        Call::Node => vec![Act::Reply(Reply::Node(Box::new(node())))],
        Call::Submit(Request::Apply { .. } | Request::Remove { .. }) => {
            vec![Act::Reply(Reply::Accepted(accepted()))]
        }
        Call::Watch { tenant: None, .. } => {
            let pool = PoolView { build: BuildState::Idle, ..samples::pool("demo/hello") };
            vec![Act::Reply(snapshot(vec![samples::instance(INSTANCE)], vec![pool]))]
        }
        Call::Watch { tenant: Some(_), .. } => vec![Act::Reply(snapshot(vec![], vec![]))],
        Call::Instances { .. } => {
            vec![Act::Reply(Reply::Instances {
                instances: vec![samples::instance(INSTANCE)],
                more: false,
            })]
        }
        Call::Tenants { .. } => vec![Act::Reply(Reply::Tenants(vec![TenantView {
            name: "demo".parse().unwrap(),
            subnet: "10.240.0.0/24".into(),
            gateway: [10, 240, 0, 1].into(),
            bridge: "br-tenant-0".into(),
            quota: Default::default(),
            reserved: Usage::default(),
            created_unix_ms: 0,
            removing: true,
        }]))],
        other => panic!("{other:?}"),
    });
    let file = agent.state_dir().join("hello.toml");
    std::fs::write(&file, "tenant = \"demo\"\n[pools.hello]\n").unwrap();
    let ran = run(&agent, &format!("up {}", file.display()));
    assert_eq!(ran.code, 0, "{}", ran.talk);
    assert!(ran.data.starts_with("INSTANCE"), "{}", ran.data);
    assert!(ran.talk.contains("  mvm exec demo/hello -- uname -sr"), "{}", ran.talk);
    let ran = run(&agent, &format!("down {}", file.display()));
    assert_eq!(ran.code, 0, "{}", ran.talk);

    std::fs::write(&file, "tenant = \"demo\"\n[pols]\n").unwrap();
    let ran = run(&agent, &format!("up {}", file.display()));
    assert_eq!(ran.code, 2);
    assert!(ran.talk.contains("hello.toml:2:2: unknown field `pols`"), "{}", ran.talk);
}

#[test]
fn exec_passes_on_the_programs_exit_code() {
    use mvm_core::guest::ExitStatus;
    for (status, expected) in [
        (ExitStatus::Exited { code: 42 }, 42),
        (ExitStatus::Signaled { signal: 9, out_of_memory: false }, 137),
        (ExitStatus::TimedOut, 124),
    ] {
        let agent = FakeAgent::new(move |_| {
            let instance = INSTANCE.parse().unwrap();
            vec![
                Act::Reply(Reply::ExecStarted { instance, pid: 3 }),
                Act::Reply(Reply::ExecExit(status)),
            ]
        });
        assert_eq!(run(&agent, "exec demo/hello -- true").code, expected);
    }
}

#[test]
fn a_network_that_differs_is_data_and_a_failure() {
    let view = VerifyView { tenants: 1, instances: 2, differences: vec!["no tap tn0i3".into()] };
    let agent = FakeAgent::new(move |_| vec![Act::Reply(Reply::Verify(view.clone()))]);
    let ran = run(&agent, "net verify");
    assert_eq!(ran.code, 1);
    assert!(ran.data.contains("no tap tn0i3"), "{}", ran.data);
}

#[test]
fn an_agent_with_another_vmm_is_a_conflict() {
    let agent = FakeAgent::new(|call| match call {
        Call::Node => vec![Act::Reply(Reply::Node(Box::new(node())))],
        Call::Instances { .. } => {
            vec![Act::Reply(Reply::Instances { instances: vec![], more: false })]
        }
        _ => vec![Act::Reply(Reply::Done), Act::Leave],
    });
    assert_eq!(run(&agent, "ps --vmm sim").code, 0);
    let ran = run(&agent, "ps --vmm qemu");
    assert_eq!(ran.code, 5);
    assert!(ran.talk.contains("uses sim with tcg, not qemu"), "{}", ran.talk);
    assert!(ran.talk.contains("mvm agent stop"), "{}", ran.talk);
    let ran = run(&agent, "agent stop --vmm qemu");
    assert_eq!(ran.code, 0, "{}", ran.talk);
    assert!(ran.talk.starts_with("stopped the agent for"), "{}", ran.talk);
}

#[test]
fn without_an_agent_status_fails_and_stop_has_nothing_to_do() {
    let agent = FakeAgent::new(|_| vec![Act::HangUp]);
    let elsewhere = agent.state_dir().join("elsewhere");
    let line = |verb: &str| format!("agent {verb} --state-dir {}", elsewhere.display());
    // The last --state-dir counts only once: this one is given alone.
    let status = run_alone(&line("status"));
    assert_eq!(status.code, 7);
    assert!(status.talk.starts_with("error: no agent runs for"), "{}", status.talk);
    let stop = run_alone(&line("stop"));
    assert_eq!((stop.code, stop.data.as_str()), (0, ""));
    assert!(!elsewhere.exists());
}

fn run_alone(line: &str) -> Ran {
    let (ui, captured) = capture::ui();
    let args = ["mvm"].into_iter().chain(line.split_whitespace());
    let (code, error) = match cli::run(Cli::try_parse_from(args).unwrap(), Rc::new(ui)) {
        Ok(code) => (code, String::new()),
        Err(error) => (error.exit_code(), error.report(Color::Plain)),
    };
    Ran { code, data: captured.data(), talk: captured.talk() + &error }
}

#[test]
fn ps_says_how_many_it_does_not_show() {
    use mvm_core::record::DesiredState;
    let stopped = InstanceView {
        state: State::Stopped,
        desired: DesiredState::Stopped.into(),
        ..samples::instance("demo/hello/i-00000002")
    };
    let views = vec![samples::instance(INSTANCE), stopped];
    let agent = FakeAgent::new(move |_| {
        vec![Act::Reply(Reply::Instances { instances: views.clone(), more: false })]
    });
    let ran = run(&agent, "ps");
    assert_eq!(ran.data.lines().count(), 2);
    assert_eq!(ran.talk, "1 stopped instance is not shown: see `mvm ps -a`\n");
    for line in ["ps -a", "instance list"] {
        let ran = run(&agent, line);
        assert_eq!((ran.data.lines().count(), ran.talk.as_str()), (3, ""), "{line}");
    }
}

#[test]
fn an_empty_list_is_said_to_be_empty_to_people_alone() {
    let agent = FakeAgent::new(|call| {
        vec![Act::Reply(match call {
            Call::Instances { .. } => Reply::Instances { instances: vec![], more: false },
            Call::Tenants { .. } => Reply::Tenants(vec![]),
            Call::Pools { .. } => Reply::Pools(vec![]),
            _ => Reply::Stats(vec![]),
        })]
    });
    for (line, says) in [
        ("ps", "there are no instances: `mvm run"),
        ("tenant list", "there are no tenants: `mvm tenant create"),
        ("pool list", "there are no pools: `mvm pool create"),
        ("stats", "no instance runs"),
    ] {
        let ran = run(&agent, line);
        assert!(ran.code == 0 && ran.talk.starts_with(says), "{line}: {}", ran.talk);
        assert_eq!(ran.data.lines().count(), 1, "{line}: {}", ran.data);
        let ran = run_with(&agent, Format::Json, line);
        assert_eq!((ran.data.as_str(), ran.talk.as_str()), ("[]\n", ""), "{line}");
    }
}

#[test]
fn a_socket_that_is_no_socket_is_reported_with_its_path() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("agent.sock")).unwrap();
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o700)).unwrap();
    let ran = run_alone(&format!("agent status --state-dir {}", dir.path().display()));
    assert_eq!(ran.code, 7, "{}", ran.talk);
}

#[test]
fn an_agent_that_accepts_and_says_nothing_does_not_hold_a_command_for_ever() {
    let agent = FakeAgent::new(|_| vec![Act::Stay]);
    let ran = run(&agent, "tenant list");
    assert_eq!(ran.code, 7, "{}", ran.talk);
    assert!(ran.talk.contains("did not answer within 10 s"), "{}", ran.talk);
    assert!(ran.talk.contains("agent.log"), "{}", ran.talk);
}

#[test]
fn a_base_that_still_fits_is_not_made_anew_for_those_that_stand_by() {
    let made = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&made);
    let agent = FakeAgent::new(move |call| {
        let has_base = counted.load(Ordering::Relaxed) > 0;
        let id = "s-01234567".parse().unwrap();
        let base = BaseView { id, in_use: true, made_unix_ms: 0, given_up: None };
        let view = PoolView { base: has_base.then_some(base), ..samples::pool("demo/hello") };
        let reply = match call {
            Call::Submit(Request::PoolReady { ready: 2, .. }) => Reply::Accepted(accepted()),
            Call::Pools { .. } => Reply::Pools(vec![view]),
            Call::Submit(Request::PoolWarmUp { .. }) => {
                counted.fetch_add(1, Ordering::Relaxed);
                let path = view.path;
                let target = mvm_wire::PoolTarget { path, build_generation: 0, base_generation: 1 };
                Reply::Accepted(Accepted { pools: vec![target], ..Accepted::default() })
            }
            Call::Watch { .. } => {
                let pools = vec![PoolView { base_generation: 1, ..view }];
                let (instances, disks) = (vec![], vec![]);
                Reply::Snapshot { instances, pools, tenant_exists: false, disks }
            }
            other => panic!("{other:?}"),
        };
        vec![Act::Reply(reply)]
    });
    let ran = run(&agent, "pool warm-up demo/hello --ready 2");
    assert_eq!((ran.code, made.load(Ordering::Relaxed)), (0, 1), "{}", ran.talk);
    let ran = run(&agent, "pool warm-up demo/hello --ready 2");
    assert_eq!((ran.code, made.load(Ordering::Relaxed)), (0, 1), "{}", ran.talk);
    assert!(ran.talk.contains("its base still fits and is kept"), "{}", ran.talk);
}
