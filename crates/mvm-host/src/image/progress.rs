//! What long operations tell whoever started them: nothing here prints.

/// One thing that happened during a long operation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Progress {
    /// A step began; the text is a phrase such as `downloading busybox-static (928 kB)`.
    Began(String),
    /// The step that began last is this far.
    Percent(u8),
    /// The step that began last is complete.
    Ended,
}

/// Who is told; called from the task that runs the operation, so it must be quick.
pub type OnProgress<'a> = &'a (dyn Fn(Progress) + Send + Sync);

/// Reports a step around `work`; a failed step is not reported as ended.
pub(crate) async fn step<T, E>(
    progress: OnProgress<'_>,
    text: String,
    work: impl Future<Output = Result<T, E>>,
) -> Result<T, E> {
    progress(Progress::Began(text));
    let result = work.await?;
    progress(Progress::Ended);
    Ok(result)
}

/// A size for people, in the decimal units that package managers use.
pub(crate) fn human_size(bytes: u64) -> String {
    match bytes {
        0..1_000 => format!("{bytes} B"),
        1_000..1_000_000 => format!("{} kB", bytes / 1_000),
        _ => format!("{}.{} MB", bytes / 1_000_000, bytes % 1_000_000 / 100_000),
    }
}
