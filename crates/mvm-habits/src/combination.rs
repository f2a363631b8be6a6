//! What is combined: a verb with the state of the instance that it is asked of, with what else there
//! is, and with what happens to the agent and to the client meanwhile.

use std::fmt;

use crate::verb::Verb;

/// Lists the variants of an enum, with a name for people.
macro_rules! listed {
    ($(#[$meta:meta])* pub enum $enum:ident { $($(#[$doc:meta])* $name:ident = $text:literal,)+ }) => {
        $(#[$meta])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
        pub enum $enum { $($(#[$doc])* $name,)+ }

        impl $enum {
            /// All of them, in order.
            pub const ALL: &'static [Self] = &[$(Self::$name,)+];

            /// Its name for people.
            pub fn name(self) -> &'static str {
                match self { $(Self::$name => $text,)+ }
            }
        }

        impl fmt::Display for $enum {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(self.name())
            }
        }
    };
}
pub(crate) use listed;

listed! {
    /// The state of an instance when a verb is asked for.
    pub enum Situation {
        /// It has never been started.
        Created = "created",
        /// Its guest boots.
        Starting = "starting",
        /// Its guest answers.
        Running = "running",
        /// Its vCPUs are stopped.
        Warm = "warm",
        /// It has a snapshot and no process.
        Sleeping = "sleeping",
        /// Its guest prepares for sleep.
        FallingAsleep = "falling asleep",
        /// Its guest shuts down.
        Stopping = "stopping",
        /// It was stopped.
        Stopped = "stopped",
        /// It ended, or could not be started, against its wish.
        Failed = "failed",
        /// Its guest shuts down, and then it goes.
        Destroying = "destroying",
    }
}

listed! {
    /// What else there is.
    pub enum Beside {
        /// An instance with nothing special about it.
        Nothing = "nothing special",
        /// It writes to a data disk.
        DataDisk = "a data disk",
        /// Its pool has a published port.
        PublishedPort = "a published port",
        /// Its pool has a base.
        Base = "a base",
        /// Another instance of its pool stands by.
        Spare = "an instance that stands by",
        /// Its pool has a sleep policy.
        SleepPolicy = "a sleep policy",
        /// A client is attached to its main process.
        AttachedClient = "an attached client",
        /// It is always started again.
        RestartAlways = "restart always",
        /// It is never started again.
        RestartNever = "restart never",
        /// Its pool goes with it, as with `mvm run --rm`.
        AutoRemove = "automatic removal",
    }
}

listed! {
    /// Since when the agent runs.
    pub enum Agent {
        /// It has seen the instance come into its state.
        Settled = "a settled agent",
        /// It was replaced, and has not looked around yet.
        JustStarted = "an agent just started",
    }
}

listed! {
    /// What the client does.
    pub enum Client {
        /// It waits for the answer.
        Stays = "a client that stays",
        /// It hangs up in the middle.
        Interrupted = "a client interrupted",
    }
}

/// When, and by whom, a verb is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Moment {
    /// The agent.
    pub agent: Agent,
    /// The client.
    pub client: Client,
}

impl Moment {
    /// All of them; those that need no new agent come first.
    pub const ALL: [Self; 4] = [
        Self { agent: Agent::Settled, client: Client::Stays },
        Self { agent: Agent::Settled, client: Client::Interrupted },
        Self { agent: Agent::JustStarted, client: Client::Stays },
        Self { agent: Agent::JustStarted, client: Client::Interrupted },
    ];
}

/// One combination of everything.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Combination {
    /// What is asked for.
    pub verb: Verb,
    /// In which state of the instance.
    pub situation: Situation,
    /// When.
    pub moment: Moment,
    /// With what else there is.
    pub beside: Beside,
}

impl fmt::Display for Combination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { verb, situation, moment: Moment { agent, client }, beside } = self;
        write!(f, "{verb} of a {situation} instance, {beside}, {agent}, {client}")
    }
}

impl Combination {
    /// Whether it is walked in the run of this seed. All are that have nothing special beside; of the
    /// others every eighth is in each of eight seeds that follow each other.
    pub fn is_in_turn(&self, seed: u64) -> bool {
        let moments = Moment::ALL.iter();
        let moment = moments.take_while(|moment| **moment != self.moment).count();
        // Questions are asked together.
        let verb = if self.verb.is_question() { 0 } else { self.verb as usize };
        let at = verb + 3 * self.situation as usize + 5 * self.beside as usize + 2 * moment;
        self.beside == Beside::Nothing || (at as u64).wrapping_add(seed).is_multiple_of(8)
    }

    /// All of them, without those that cannot be: what is removed at its end is never stopped.
    pub fn all() -> impl Iterator<Item = Self> {
        let situations = Beside::ALL
            .iter()
            .flat_map(|&beside| Situation::ALL.iter().map(move |&situation| (beside, situation)));
        let possible = situations.filter(|&(beside, situation)| {
            beside != Beside::AutoRemove
                || !matches!(situation, Situation::Stopped | Situation::Failed)
        });
        possible.flat_map(|(beside, situation)| {
            Moment::ALL.into_iter().flat_map(move |moment| {
                let verbs = Verb::ALL.iter();
                verbs.map(move |&verb| Self { verb, situation, moment, beside })
            })
        })
    }
}

/// Numbers that follow from a seed (xorshift64*), for a sample that can be had again.
#[derive(Debug, Clone)]
pub struct Numbers(u64);

impl Numbers {
    /// The numbers of a seed.
    pub fn new(seed: u64) -> Self {
        // Seeds that follow each other, as those of days do, are to differ in all bits.
        Self(seed.wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    /// The next number, below this limit, which is not 0.
    pub fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        let number = self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33;
        number as usize % limit
    }
}
