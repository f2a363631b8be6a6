//! What is to be so after each combination, whatever the verb was.

use std::net::TcpListener;
use std::time::Duration;

use mvm_core::admit::Request;
use mvm_core::lifecycle::State;
use mvm_core::name::{InstancePath, Selector};
use mvm_core::record::Purpose;
use mvm_habits::{Combination, End, Expected, Loss, Situation, Verb};
use mvm_wire::view::InstanceView;
use mvm_wire::{ErrorCode, Item, Reply};
use tokio::time::timeout;

use super::scene::{SYNCED, Scene, Subject, UNSYNCED, is, told};

/// When what was asked for is under way.
const UNDER_WAY: Duration = Duration::from_millis(500);
/// How long an instance may take to come to its end, lingering guests included.
const SETTLING: Duration = Duration::from_secs(6);
/// The same of one that boots, after a stop perhaps.
const BOOTING: Duration = Duration::from_secs(9);
/// The same of one that failed and waits for its next attempt.
const WAITING: Duration = Duration::from_secs(140);
/// How long what is left behind is looked for: some of it goes with the next round of looking after.
const TIDYING: Duration = Duration::from_secs(30);

impl Scene {
    /// The instance comes to its end, no other one does, and as many are there as are to be.
    pub(super) async fn check_end(
        &self,
        subject: &Subject,
        combination: Combination,
        expected: &Expected,
    ) -> Result<(), String> {
        let ends = [Some(expected.end), expected.or];
        let limit = match (subject.situation, expected.end, expected.or) {
            (Situation::Failed, End::Running, _) | (Situation::Failed, _, Some(_)) => WAITING,
            (_, End::Running, _) | (_, _, Some(End::Running)) => BOOTING,
            _ => SETTLING,
        };
        let is_there =
            |view: Option<&InstanceView>| ends.iter().flatten().any(|end| has_come_to(view, *end));
        // What is asked for is under way soon.
        tokio::time::sleep(UNDER_WAY).await;
        let what = format!("{:?}", expected.end);
        let view = self.until(&what, &subject.path, limit, is_there).await?;
        // One that never ran may begin with a base.
        let begins =
            |view: &Option<InstanceView>| view.as_ref().map_or(0, |view| view.boots + view.wakes);
        let boots = |view: &Option<InstanceView>| match subject.situation {
            Situation::Created => begins(view),
            _ => view.as_ref().map_or(0, |view| view.boots),
        };
        let is_heard = expected.or.is_none() && expected.refused.is_none();
        if combination.verb == Verb::Restart && is_heard && boots(&view) <= boots(&subject.before) {
            return Err(format!("it did not boot again: {}", told(&view)));
        }
        let is_left_alone = expected.refused.is_some() || combination.verb.is_question();
        if let (Some(before), Some(after), true) = (&subject.before, &view, is_left_alone)
            && before.activity.is_none()
            && subject.situation != Situation::Failed
            && (before.pid, before.boots, before.wakes) != (after.pid, after.boots, after.wakes)
        {
            return Err(format!(
                "it was not left alone: {} became {}",
                told(&subject.before),
                told(&view)
            ));
        }
        let own = usize::from(view.is_some());
        let is_interrupted = expected.or.is_some();
        let mut all = Vec::new();
        for _ in 0..BOOTING.as_secs() * 5 {
            all = self.instances().await?;
            let used: Vec<_> = all.iter().filter(|view| view.purpose == Purpose::Use).collect();
            let count = used.len();
            let is_right = count == own + expected.more || (is_interrupted && count == own);
            // What is made for a base goes again.
            let is_made = all.iter().all(|view| view.purpose != Purpose::Base);
            let have_settled = used.iter().all(|view| view.activity.is_none());
            if is_right && is_made && have_settled && used.iter().all(|view| has_begun(view)) {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        let all: Vec<String> = all
            .into_iter()
            .map(|view| format!("{:?} {}", view.purpose.clone(), told(&Some(view))))
            .collect();
        Err(format!("of {} instances there are {}", own + expected.more, all.join(", ")))
    }

    /// What the guest's programs wrote is there, in the instance and in what began where it was.
    pub(super) async fn check_files(
        &self,
        subject: &Subject,
        verb: Verb,
        loss: Loss,
    ) -> Result<(), String> {
        let all = self.instances().await?;
        let others = all.iter().filter(|view| view.path != subject.path);
        let forks = others.filter(|view| view.purpose == Purpose::Use && verb == Verb::Fork);
        let forks: Vec<InstancePath> = forks.map(|view| view.path.clone()).collect();
        if !all.iter().any(|view| view.path == subject.path) || !subject.has_files {
            return Ok(());
        }
        if !subject.spec.disks.is_empty() {
            // Whoever came besides has its disk.
            for other in all.iter().filter(|view| view.path != subject.path) {
                let selector = Selector::from(&other.path);
                let destroy = Request::InstanceDestroy { selector, all: false, force: true };
                self.submit(destroy).await?;
                let is_gone = |view: Option<&InstanceView>| view.is_none();
                self.until("the other is gone", &other.path, SETTLING, is_gone).await?;
            }
        }
        let start = Request::InstanceStart { selector: Selector::from(&subject.path), all: false };
        self.submit(start).await?;
        let runs = |view: Option<&InstanceView>| view.is_some_and(|v| is(v, State::Running));
        self.until("it runs again", &subject.path, BOOTING, runs).await?;
        for path in [&subject.path].into_iter().chain(&forks) {
            for dir in subject.dirs() {
                let mut files = vec![SYNCED];
                if loss == Loss::Nothing {
                    files.push(UNSYNCED);
                }
                for file in files {
                    let text = self.exec(path, &["read", &format!("{dir}/{file}")]).await;
                    if text.as_deref() != Ok("kept") {
                        return Err(format!("lost {dir}/{file}: {text:?}"));
                    }
                }
            }
        }
        Ok(())
    }

    /// Removes the tenant; nothing of it is left, and its neighbour is as it was.
    pub(super) async fn clean_up(&mut self, subject: Subject) -> Result<(), String> {
        let Subject { path, spec, attached, .. } = subject;
        let name = path.pool.tenant.clone();
        let destroyed = self.agent().submit(Request::TenantDestroy { name, force: true }).await;
        match destroyed {
            Err(error) if error.code != ErrorCode::NotFound => return Err(format!("{error}")),
            _ => {}
        }
        for view in self.instances().await? {
            let is_gone = |view: Option<&InstanceView>| view.is_none();
            self.until("gone with its tenant", &view.path, SETTLING, is_gone).await?;
        }
        if let Some(mut attached) = attached {
            let ending = async {
                loop {
                    match attached.read.next().await {
                        Ok(Some(Item::Data { .. })) => {}
                        Ok(Some(message)) => match message.parse() {
                            Ok(Reply::ExecExit(_) | Reply::Error(_)) => return,
                            Ok(_) => {}
                            Err(_) => return,
                        },
                        // Its agent is gone.
                        Ok(None) | Err(_) => return,
                    }
                }
            };
            let ended = timeout(SETTLING, ending).await;
            ended.map_err(|_| "who is attached hears of no end".to_owned())?;
        }
        self.check_nothing_is_left(&spec).await?;
        self.check_neighbour().await
    }

    async fn check_nothing_is_left(
        &mut self,
        spec: &mvm_core::spec::PoolSpec,
    ) -> Result<(), String> {
        let tasks = || tokio::runtime::Handle::current().metrics().num_alive_tasks();
        let mut left = Vec::new();
        for _ in 0..TIDYING.as_secs() {
            left = self.machine.leftovers().await;
            left.retain(|it| !self.before.contains(it));
            // Listening again fails as long as somebody listens.
            let ports = spec.publish.iter().map(|publish| publish.listen());
            left.extend(ports.filter(|at| TcpListener::bind(at).is_err()).map(|at| at.to_string()));
            if tasks() > self.fewest_tasks {
                left.push(format!("{} tasks", tasks() - self.fewest_tasks));
            }
            if left.is_empty() {
                self.fewest_tasks = tasks();
                return Ok(());
            }
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        Err(format!("left behind: {left:?}"))
    }

    async fn check_neighbour(&self) -> Result<(), String> {
        let before = &self.neighbour;
        let is_up = |view: Option<&InstanceView>| view.is_some_and(|v| is(v, State::Running));
        let after = self.until("the neighbour runs", &before.path, SETTLING, is_up).await?;
        let same = |view: &InstanceView| (view.pid, view.boots, view.wakes, view.address);
        match &after {
            Some(view) if same(view) == same(before) => Ok(()),
            _ => Err(format!("the neighbour is {}", told(&after))),
        }
    }
}

fn has_come_to(view: Option<&InstanceView>, end: End) -> bool {
    let state = match end {
        End::Gone => return view.is_none(),
        End::Created => State::Created,
        End::Running => State::Running,
        End::Warm => State::Warm,
        End::Sleeping => State::Sleeping,
        End::Stopped => State::Stopped,
        End::Failed => State::Failed,
    };
    view.is_some_and(|view| is(view, state))
}

/// Whether what is to run has begun to.
fn has_begun(view: &InstanceView) -> bool {
    !view.desired.known().is_some_and(|desired| desired.is_up()) || view.state != State::Created
}
