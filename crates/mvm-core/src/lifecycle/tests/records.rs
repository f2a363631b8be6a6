//! A status outlives its agent: what is written is read back.

use super::*;

#[test]
fn every_status_round_trips_through_json() {
    for name in PHASES {
        let status = at(name);
        let json = serde_json::to_string(&status).unwrap();
        let again: InstanceStatus = serde_json::from_str(&json).unwrap();
        assert_eq!(again, status, "{name}: {json}");
    }
}

#[test]
fn a_status_of_an_older_agent_is_read_with_what_it_has() {
    let status: InstanceStatus = serde_json::from_str(r#"{"phase":"stopped"}"#).unwrap();
    assert_eq!(status, InstanceStatus { phase: Phase::Stopped, ..InstanceStatus::default() });
}

#[test]
fn a_status_of_an_unknown_phase_is_refused() {
    let error = serde_json::from_str::<InstanceStatus>(r#"{"phase":"dreaming"}"#).unwrap_err();
    assert!(error.to_string().contains("dreaming"), "{error}");
}

#[test]
fn people_see_the_state_behind_the_phase() {
    for (name, state, activity) in [
        ("created", State::Created, None),
        ("starting", State::Created, Some("starting")),
        ("running", State::Running, None),
        ("stopping", State::Running, Some("stopping")),
        ("stopping to go", State::Running, Some("destroying")),
        ("releasing", State::Stopped, Some("stopping")),
        ("releasing to fail", State::Failed, Some("stopping")),
        ("releasing to go", State::Stopped, Some("destroying")),
        ("stopped", State::Stopped, None),
        ("failed", State::Failed, None),
        ("destroyed", State::Destroyed, None),
    ] {
        let status = at(name);
        assert_eq!((status.state(), status.activity()), (state, activity), "{name}");
    }
    let again = |name| run([path_to(name), vec![start(3)]].concat()).0.state();
    assert_eq!((again("stopped"), again("failed")), (State::Stopped, State::Failed));
}

#[test]
fn a_tick_is_due_exactly_where_time_alone_leads_on() {
    for name in PHASES {
        let status = at(name);
        let due = status.deadline_unix_ms();
        let waits = matches!(status.phase, Phase::Starting { .. } | Phase::Stopping { .. });
        assert_eq!(due.is_some(), waits, "{name}");
        if let Some(due) = due {
            assert_eq!(step(&status, Event::Tick, due - 1), (status.clone(), vec![]), "{name}");
            assert_ne!(step(&status, Event::Tick, due).0, status, "{name}");
        }
    }
}
