//! How the crate's property tests run: the same cases every time, unless the environment asks for
//! others (`PROPTEST_RNG_SEED`, or `PROPTEST_CASES=25600` for a hundred times as many).

use proptest::test_runner::{Config, RngSeed};

/// A configuration of this many cases.
pub(crate) fn cases(cases: u32) -> Config {
    let asked = Config::default();
    let rng_seed = match asked.rng_seed {
        RngSeed::Random => RngSeed::Fixed(1),
        fixed @ RngSeed::Fixed(_) => fixed,
    };
    let cases = cases.saturating_mul(asked.cases) / 256;
    Config { cases, rng_seed, failure_persistence: None, ..asked }
}

/// Lists the kinds of an enum, so that a test generates all of them: a variant that is missing here does not
/// compile, and a kind that is here needs an arm wherever kinds are matched.
macro_rules! kinds {
    ($of:ident: $($kind:ident),* $(,)?) => {
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
        pub(super) enum Kind { $($kind),* }

        pub(super) const KINDS: &[Kind] = &[$(Kind::$kind),*];

        pub(super) fn kind(of: &$of) -> Kind {
            match of { $($of::$kind { .. } => Kind::$kind),* }
        }
    };
}
pub(crate) use kinds;

/// A finite source of choices that a property test draws and shrinks: once it is used up, every
/// choice is the first one, so that a model can make its first option the harmless one.
#[derive(Debug, Clone)]
pub(crate) struct Choices {
    bytes: std::vec::IntoIter<u8>,
}

impl Choices {
    pub(crate) fn new(bytes: Vec<u8>) -> Self {
        Self { bytes: bytes.into_iter() }
    }

    /// Whether only first choices are left.
    pub(crate) fn is_calm(&self) -> bool {
        self.bytes.as_slice().is_empty()
    }

    /// A number below `options`.
    pub(crate) fn pick(&mut self, options: usize) -> usize {
        usize::from(self.bytes.next().unwrap_or(0)) % options.max(1)
    }

    /// True once in `n` times, never when calm.
    pub(crate) fn one_in(&mut self, n: usize) -> bool {
        self.pick(n) == n - 1
    }
}
