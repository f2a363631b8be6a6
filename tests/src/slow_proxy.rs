//! A slow way to a server: it carries connections, and stops in the middle of what is large.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread;

const PIECE: usize = 16 * 1024;

/// A proxy on this machine's loopback. Its threads end with their connections.
pub struct SlowProxy {
    host: String,
    shared: Arc<Shared>,
}

struct Shared {
    to: String,
    /// Bytes of each answer that get through before it stops.
    budget: usize,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    is_fast: bool,
    stopped: usize,
    requests: String,
}

impl SlowProxy {
    /// A proxy to this address, through which this many bytes of each connection's answers come.
    ///
    /// # Panics
    /// There is no port to listen on.
    pub fn start(to: &str, budget: usize) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("there is a free port");
        let host = listener.local_addr().expect("it is bound").to_string();
        let (state, changed) = (Mutex::default(), Condvar::new());
        let shared = Arc::new(Shared { to: to.to_owned(), budget, state, changed });
        let served = Arc::clone(&shared);
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                carry(&served, client);
            }
        });
        Self { host, shared }
    }

    /// Its address.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// Whether an answer has stopped in its middle.
    pub fn has_stopped(&self) -> bool {
        self.shared.state().stopped > 0
    }

    /// Lets everything through from now on.
    pub fn be_fast(&self) {
        self.shared.state().is_fast = true;
        self.shared.changed.notify_all();
    }

    /// All that was asked for, as it came.
    pub fn requests(&self) -> String {
        self.shared.state().requests.clone()
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no thread panics with it")
    }
}

fn carry(shared: &Arc<Shared>, client: TcpStream) {
    let Ok(server) = TcpStream::connect(&shared.to) else { return };
    let (Ok(from_client), Ok(to_server)) = (client.try_clone(), server.try_clone()) else { return };
    let asked = Arc::clone(shared);
    thread::spawn(move || {
        copy(from_client, to_server, |piece| {
            asked.state().requests.push_str(&String::from_utf8_lossy(piece));
        });
    });
    let shared = Arc::clone(shared);
    thread::spawn(move || {
        let mut left = shared.budget;
        copy(server, client, |piece| {
            left = left.saturating_sub(piece.len());
            let mut state = shared.state();
            if left == 0 && !state.is_fast {
                state.stopped += 1;
                let fast = shared.changed.wait_while(state, |state| !state.is_fast);
                drop(fast);
            }
        });
    });
}

/// Carries one direction to its end; what is to happen before each piece happens.
fn copy(mut from: TcpStream, mut to: TcpStream, mut before: impl FnMut(&[u8])) {
    let mut piece = vec![0; PIECE];
    while let Ok(len @ 1..) = from.read(&mut piece) {
        before(&piece[..len]);
        if to.write_all(&piece[..len]).is_err() {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Write);
    let _ = from.shutdown(Shutdown::Read);
}
