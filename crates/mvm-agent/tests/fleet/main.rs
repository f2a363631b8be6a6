//! The agent as a whole on the simulated host: the loop, the actors and the API, in virtual time.

mod faults;
mod life;
mod node;
