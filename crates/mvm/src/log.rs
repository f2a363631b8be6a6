//! What the agent logs, and how often it says the same.
//!
//! Much of what is logged is what strangers and guests bring about, as often as they like. Each cause
//! has for each of its objects a supply of lines, which fills again slowly; what is beyond it is
//! counted, and the count is said with the next line.

use std::collections::BTreeMap;
use std::fmt::{self, Write as _};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::{Format, Writer};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

use crate::cli::is_colour_unwanted;
use crate::error::{Error, Result};
use crate::output::raw;

/// Lines of one cause about one object that are said at once.
const SUPPLY: u32 = 20;
/// How long it takes until there is one more.
const REFILL: Duration = Duration::from_secs(3);
/// Causes and objects that are kept apart; what has not been heard of for long is forgotten first.
const MOST_KEYS: usize = 4096;
/// The fields that name an object.
const OBJECTS: [&str; 9] =
    ["tenant", "pool", "publish", "instance", "disk", "path", "what", "image", "signal"];

/// Logs on standard error from now on.
pub(crate) fn to_stderr(filter: &str) -> Result<()> {
    let filter = EnvFilter::try_new(filter).map_err(|error| Error::Usage {
        message: format!("`{filter}` is not a log level: {error}"),
        hint: "use error, warn, info, debug or trace".to_owned(),
    })?;
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(raw::stderr)
        .with_ansi(raw::is_stderr_terminal() && !is_colour_unwanted())
        .event_format(Sparing { format: Format::default(), supplies: Mutex::default() });
    // Set already only where several commands run in one process.
    let _ = subscriber.try_init();
    Ok(())
}

/// A format that leaves out what was said often enough.
struct Sparing {
    format: Format,
    supplies: Mutex<Supplies>,
}

impl<S, N> FormatEvent<S, N> for Sparing
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        // Who asks for details wants all of them.
        if *event.metadata().level() <= Level::INFO {
            let mut supplies = self.supplies.lock().unwrap_or_else(PoisonError::into_inner);
            match supplies.take(key(event), Instant::now()) {
                None => return Ok(()),
                Some(0) => {}
                Some(count) => {
                    let lines = if count == 1 { "line" } else { "lines" };
                    writeln!(writer, "({count} {lines} like the next one left out)")?;
                }
            }
        }
        self.format.format_event(context, writer, event)
    }
}

/// What an event is about: the place in the program that says it, and its objects.
fn key(event: &Event<'_>) -> String {
    struct Objects(String);
    impl Visit for Objects {
        fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
            if OBJECTS.contains(&field.name()) {
                // Writing to a string does not fail.
                let _ = write!(self.0, " {}={value:?}", field.name());
            }
        }
    }
    let metadata = event.metadata();
    let place = (metadata.file().unwrap_or_default(), metadata.line().unwrap_or_default());
    let mut objects = Objects(format!("{}:{}", place.0, place.1));
    event.record(&mut objects);
    objects.0
}

/// The lines that may still be said.
#[derive(Debug, Default)]
struct Supplies(BTreeMap<String, Supply>);

#[derive(Debug)]
struct Supply {
    left: u32,
    /// When one was last added.
    filled: Instant,
    left_out: u64,
}

impl Supplies {
    /// Whether a line may be said, and how many like it were left out since the last one.
    fn take(&mut self, key: String, now: Instant) -> Option<u64> {
        if self.0.len() >= MOST_KEYS && !self.0.contains_key(&key) {
            self.forget(now);
        }
        let fresh = Supply { left: SUPPLY, filled: now, left_out: 0 };
        let supply = self.0.entry(key).or_insert(fresh);
        let added = now.duration_since(supply.filled).as_secs() / REFILL.as_secs();
        let added = u32::try_from(added).unwrap_or(u32::MAX);
        supply.filled += REFILL * added.min(SUPPLY);
        if added >= SUPPLY {
            supply.filled = now;
        }
        supply.left = supply.left.saturating_add(added).min(SUPPLY);
        match supply.left.checked_sub(1) {
            Some(left) => {
                supply.left = left;
                Some(std::mem::take(&mut supply.left_out))
            }
            None => {
                supply.left_out += 1;
                None
            }
        }
    }

    /// Forgets those that are as good as new, or all if there are none.
    fn forget(&mut self, now: Instant) {
        self.0.retain(|_, supply| now.duration_since(supply.filled) < REFILL * SUPPLY);
        if self.0.len() >= MOST_KEYS {
            self.0.clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[test]
    fn what_is_beyond_the_supply_is_counted_and_the_supply_fills_again() {
        let (mut supplies, start) = (Supplies::default(), Instant::now());
        let mut said = |key: &str, at: Duration| supplies.take(key.to_owned(), start + at);
        for _ in 0..SUPPLY {
            assert_eq!(said("a", Duration::ZERO), Some(0));
        }
        for _ in 0..100 {
            assert_eq!(said("a", REFILL / 2), None);
        }
        assert_eq!(said("b", REFILL / 2), Some(0), "another object");
        assert_eq!(said("a", REFILL), Some(100));
        assert_eq!(said("a", REFILL), None);
        for _ in 0..SUPPLY {
            assert!(said("a", REFILL * 1000).is_some());
        }
        assert_eq!(said("a", REFILL * 1000), None);
    }

    #[test]
    fn the_number_of_objects_is_bounded() {
        let (mut supplies, now) = (Supplies::default(), Instant::now());
        for number in 0..3 * MOST_KEYS {
            supplies.take(number.to_string(), now);
        }
        assert!(supplies.0.len() <= MOST_KEYS);
    }

    #[derive(Clone, Default)]
    struct Written(Arc<Mutex<Vec<u8>>>);

    impl std::io::Write for Written {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_flood_about_one_object_is_cut_and_another_object_is_heard() {
        let written = Written::default();
        let writer = written.clone();
        let subscriber = tracing_subscriber::fmt()
            .with_writer(move || writer.clone())
            .event_format(Sparing { format: Format::default(), supplies: Mutex::default() })
            .finish();
        tracing::subscriber::with_default(subscriber, || {
            for (pool, count) in [("t/loud", 1000), ("t/quiet", 1)] {
                for number in 0..count {
                    tracing::warn!(pool, problem = number, "a published port is not served");
                }
            }
        });
        let text = String::from_utf8(written.0.lock().unwrap().clone()).unwrap();
        let lines = |of: &str| text.lines().filter(|line| line.contains(of)).count();
        assert_eq!((lines("t/loud"), lines("t/quiet")), (SUPPLY as usize, 1), "{text}");
    }
}
