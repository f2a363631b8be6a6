//! The thread that owns the database.

use std::thread::JoinHandle;

use tokio::sync::mpsc::{UnboundedSender, WeakUnboundedSender, unbounded_channel};
use tokio::sync::oneshot;

use crate::sqlite::database::Database;
use crate::{OpenError, StoreError};

type Job = Box<dyn FnOnce(&mut Database) + Send>;

/// The running thread. It ends, after the jobs that are queued, when this is dropped.
#[derive(Debug)]
pub(super) struct Worker {
    running: Option<(UnboundedSender<Job>, JoinHandle<()>)>,
}

/// Where jobs are queued. It does not keep the thread alive. The queue has no bound of its own: its
/// length is the number of callers that wait.
#[derive(Debug, Clone)]
pub(super) struct Jobs(WeakUnboundedSender<Job>);

impl Worker {
    /// Starts the thread, which opens the database first.
    pub(super) async fn start(
        open: impl FnOnce() -> Result<Database, OpenError> + Send + 'static,
    ) -> Result<Self, OpenError> {
        let (jobs, mut queue) = unbounded_channel::<Job>();
        let (opened, is_open) = oneshot::channel();
        let thread = std::thread::Builder::new()
            .name("mvm-store".to_owned())
            .spawn(move || {
                let mut database = match open() {
                    Ok(database) => database,
                    Err(error) => return drop(opened.send(Err(error))),
                };
                // Whoever opened may have gone away; the queue is closed then.
                drop(opened.send(Ok(())));
                while let Some(job) = queue.blocking_recv() {
                    job(&mut database);
                }
            })
            .map_err(OpenError::Thread)?;
        let worker = Self { running: Some((jobs, thread)) };
        is_open.await.map_err(|_| StoreError::Closed)??;
        Ok(worker)
    }

    /// Where to queue jobs.
    pub(super) fn jobs(&self) -> Result<Jobs, StoreError> {
        let (jobs, _) = self.running.as_ref().ok_or(StoreError::Closed)?;
        Ok(Jobs(jobs.downgrade()))
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        if let Some((jobs, thread)) = self.running.take() {
            drop(jobs);
            if thread.join().is_err() {
                tracing::error!("the store's thread panicked");
            }
        }
    }
}

impl Jobs {
    /// Runs a job on the thread and waits for its answer. The job runs even if nobody waits.
    pub(super) async fn run<T: Send + 'static>(
        &self,
        job: impl FnOnce(&mut Database) -> T + Send + 'static,
    ) -> Result<T, StoreError> {
        let (reply, answer) = oneshot::channel();
        let job: Job = Box::new(move |database| drop(reply.send(job(database))));
        // The strong sender lives for this statement only: held across an await, it could keep the
        // thread alive while the store's drop waits for it.
        let queued = self.0.upgrade().is_some_and(|jobs| jobs.send(job).is_ok());
        if !queued {
            return Err(StoreError::Closed);
        }
        answer.await.map_err(|_| StoreError::Closed)
    }
}
