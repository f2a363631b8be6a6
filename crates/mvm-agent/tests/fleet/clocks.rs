//! The clocks of running guests.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use mvm_core::admit::Request;

use crate::node::{Agent, Machine};

async fn date(agent: &Agent) -> u64 {
    agent.exec("demo/web", &["date", "+%s"]).await.unwrap().0.trim().parse().unwrap()
}

fn host() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()
}

#[tokio::test(start_paused = true)]
async fn a_running_guests_clock_follows_the_hosts_unless_the_guest_keeps_it_itself() {
    let machine = Machine::new();
    let agent = machine.agent().await;
    let text = r#"{"tenant":"demo","pools":{"web":{"running":1}}}"#;
    agent.submit(Request::Apply { document: serde_json::from_str(text).unwrap() }).await.unwrap();
    agent.until_running(1).await;
    for wrong in ["@1000", "@9000000000"] {
        agent.exec("demo/web", &["date", "-s", wrong]).await.unwrap();
        assert!(date(&agent).await.abs_diff(host()) > 1000);
        tokio::time::sleep(Duration::from_secs(20)).await;
        assert!(date(&agent).await.abs_diff(host()) <= 1);
    }
    agent.exec("demo/web", &["ntpd"]).await.unwrap();
    agent.exec("demo/web", &["date", "-s", "@1000"]).await.unwrap();
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert!(date(&agent).await < 2000, "who disciplines the clock is left alone");
}
