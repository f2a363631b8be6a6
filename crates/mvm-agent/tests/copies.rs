//! A copy of a state directory, which neither serves nor is served before it is one of its own.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

use std::path::{Path, PathBuf};

use mvm_agent::{AgentError, Isolation, ServeOptions, SetupError, claim, serve};
use mvm_core::admit::Request;
use mvm_core::lifecycle::State;
use mvm_core::name::Selector;
use mvm_core::spec::PoolSpec;
use mvm_core::vmm::VmmKind;
use mvm_host::state_dir::StateDirError;
use mvm_wire::view::InstanceView;
use mvm_wire::{Call, Connection, Reply};
use tokio::net::UnixStream;

fn options(state_dir: &Path) -> ServeOptions {
    ServeOptions {
        state_dir: state_dir.to_owned(),
        vmm: Some(VmmKind::Sim),
        accel: None,
        keep_free_mib: 0,
        isolation: Isolation::Available,
        seccomp_filter: None,
        cpu_template: None,
        free_page_reporting: false,
    }
}

/// An agent in this process; it ends with the value.
struct Agent {
    dir: PathBuf,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Agent {
    async fn start(dir: &Path) -> Self {
        let options = options(dir);
        let task = tokio::spawn(async move { serve(options).await.unwrap() });
        let agent = Self { dir: dir.to_owned(), task };
        while UnixStream::connect(dir.join("agent.sock")).await.is_err() {
            assert!(!agent.task.is_finished(), "it ended");
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
        agent
    }

    async fn call(&self, call: Call) -> Reply {
        let stream = UnixStream::connect(self.dir.join("agent.sock")).await.unwrap();
        let mut connection = Connection::new(stream);
        connection.write.message(&call).await.unwrap();
        connection.read.reply().await.unwrap()
    }

    async fn accept(&self, request: Request) {
        let reply = self.call(Call::Submit(request)).await;
        assert!(matches!(reply, Reply::Accepted(_)), "{reply:?}");
    }

    async fn instances(&self) -> Vec<InstanceView> {
        match self.call(Call::Instances { selector: Selector::All }).await {
            Reply::Instances { instances, .. } => instances,
            other => panic!("{other:?}"),
        }
    }

    async fn until(&self, is_it: impl Fn(&InstanceView) -> bool) -> InstanceView {
        loop {
            if let Some(instance) = self.instances().await.into_iter().find(&is_it) {
                return instance;
            }
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
    }

    async fn end(self) {
        self.call(Call::AgentStop).await;
        while !self.task.is_finished() {
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
    }
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let (path, to) = (entry.path(), to.join(entry.file_name()));
        match entry.file_type().unwrap() {
            kind if kind.is_dir() => copy(&path, &to),
            kind if kind.is_file() => drop(std::fs::copy(&path, &to).unwrap()),
            // Sockets.
            _ => {}
        }
    }
}

#[tokio::test]
async fn a_copy_is_refused_and_served_with_nothing_running_once_it_is_claimed() {
    let root = tempfile::tempdir().unwrap();
    let [original, copied] =
        ["original", "copied"].map(|name| root.path().canonicalize().unwrap().join(name));
    let agent = Agent::start(&original).await;
    let name = "demo".parse().unwrap();
    agent.accept(Request::TenantCreate { name, quota: Default::default(), subnet: None }).await;
    let path: mvm_core::name::PoolPath = "demo/hello".parse().unwrap();
    let spec = Box::new(PoolSpec::default());
    agent.accept(Request::PoolCreate { path: path.clone(), spec }).await;
    agent.accept(Request::PoolScale { path, running: 1, warm: None, sleeping: None }).await;
    agent.until(|view| view.state == State::Running).await;
    agent.end().await;

    copy(&original, &copied);
    let refused = serve(options(&copied)).await.unwrap_err();
    assert!(
        matches!(
            &refused,
            AgentError::Setup(SetupError::Identity(StateDirError::Copy { of, .. }))
                if *of == original
        ),
        "{refused:?}"
    );
    // The original is none, and cannot be made another one by mistake.
    assert!(claim(&original, true).await.is_err());

    let claimed = claim(&copied, true).await.unwrap();
    assert_eq!(claimed.copied_from, original);
    assert_eq!(claimed.notes.len(), 1, "{:?}", claimed.notes);
    let (one, two) = (Agent::start(&original).await, Agent::start(&copied).await);
    one.until(|view| view.state == State::Running).await;
    two.until(|view| view.state != State::Running && view.activity.is_none()).await;
    assert!(claim(&copied, true).await.is_err(), "it is one of its own already");
    one.end().await;
    two.end().await;
}
