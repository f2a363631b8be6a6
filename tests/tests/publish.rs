//! Published ports: connections to this machine are carried into guests, which are woken for them.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use mvm_tests::node::Node;
use mvm_tests::wait::until;

const LIMIT: Duration = Duration::from_secs(60);

fn free_address() -> SocketAddr {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap()
}

/// What a server says to this, or how the connection failed.
fn ask(address: SocketAddr, question: &str) -> std::io::Result<String> {
    let mut socket = TcpStream::connect(address)?;
    socket.set_read_timeout(Some(LIMIT))?;
    socket.write_all(question.as_bytes())?;
    socket.shutdown(Shutdown::Write)?;
    let mut answer = String::new();
    socket.read_to_string(&mut answer)?;
    Ok(answer)
}

fn page(address: SocketAddr) -> std::io::Result<String> {
    let answer = ask(address, "GET /name HTTP/1.0\r\n\r\n")?;
    Ok(answer.rsplit("\r\n\r\n").next().unwrap_or_default().trim().to_owned())
}

/// Gives a guest a page with its own name.
fn name(node: &Node, path: &str) {
    let id = path.rsplit('/').next().unwrap();
    node.guest(path, &format!("mkdir -p /www; echo {id} > /www/name"));
}

fn served_pool(node: &Node, pool: &str, published: &[&str]) {
    let mut options = vec!["--net", "none"];
    published.iter().for_each(|publish| options.extend(["--publish", publish]));
    options.extend(["--", "sh", "-c", "mkdir -p /www; exec httpd -f -p 80 -h /www"]);
    node.small_pool(pool, &options);
}

#[test]
fn a_connection_wakes_an_instance_and_is_carried() {
    let Some(node) = Node::new() else { return };
    let address = free_address();
    let publish = format!("{address}:80");
    served_pool(&node, "acme/web", &[&publish]);
    let first = node.boot("acme/web");
    name(&node, &first);
    let id = |path: &str| path.rsplit('/').next().unwrap().to_owned();
    assert_eq!(page(address).unwrap(), id(&first));

    // Asleep, and warm: many clients at once wake it once.
    for verb in ["sleep", "warm"] {
        node.ok(&[verb, &first]);
        let wakes = node.instance(&first)["wakes"].as_u64().unwrap();
        let clients: Vec<_> = (0..8).map(|_| std::thread::spawn(move || page(address))).collect();
        for client in clients {
            assert_eq!(client.join().unwrap().unwrap(), id(&first));
        }
        let view = node.until_state(&first, "running");
        let more = if verb == "sleep" { 1 } else { 0 };
        assert_eq!(view["wakes"].as_u64().unwrap(), wakes + more);
    }

    // Two that run share the clients; one that sleeps is left alone.
    let second = node.boot("acme/web");
    name(&node, &second);
    let mut pages: Vec<String> = (0..4).map(|_| page(address).unwrap()).collect();
    pages.sort();
    let mut expected = [id(&first), id(&first), id(&second), id(&second)];
    expected.sort();
    assert_eq!(pages, expected);
    node.ok(&["sleep", &first]);
    assert_eq!(page(address).unwrap(), id(&second));
    assert_eq!(node.instance(&first)["state"], "sleeping");

    let connections = |count: u64| {
        until(&format!("{count} connections are counted"), LIMIT, || {
            (node.json(&["pool", "info", "acme/web"])["connections"] == count).then_some(())
        });
    };
    connections(0);
    // An open connection ends with the guest's sleep, and the next agent serves again.
    let mut open = TcpStream::connect(address).unwrap();
    open.set_read_timeout(Some(LIMIT)).unwrap();
    connections(1);
    node.ok(&["sleep", &second]);
    assert!(open.read(&mut [0]).is_err(), "the client sees that it broke off");
    node.kill_agent();
    assert!(TcpStream::connect(address).is_err());
    node.ok(&["ps"]);
    let answer = until("the port is open again", LIMIT, || page(address).ok());
    assert!([id(&first), id(&second)].contains(&answer), "{answer}");

    node.ok(&["tenant", "destroy", "acme", "--force"]);
    assert!(TcpStream::connect(address).is_err());
    assert_eq!(node.leftovers(), [""; 0]);
}

#[test]
fn data_goes_both_ways_until_both_ends_are_done() {
    let Some(node) = Node::new() else { return };
    let address = free_address();
    let publish = format!("{address}:7000");
    let serve = "while :; do nc -l -p 7000 -e sh -c 'cat | md5sum'; done";
    node.small_pool("acme/sums", &["-p", &publish, "--", "sh", "-c", serve]);
    node.boot("acme/sums");
    let data: String = (0..400_000).map(|number| format!("{number}\n")).collect();
    // The guest's program answers only after the client's end of data.
    let sum = ask(address, &data).unwrap();
    let expected =
        node.mvm_with_input(&["exec", "-i", "acme/sums", "--", "md5sum"], data.as_bytes());
    assert_eq!(sum, expected.ok().stdout);
}

#[test]
fn what_keeps_a_port_from_being_served_is_told() {
    let Some(node) = Node::new() else { return };
    let other = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let (taken, free) = (other.local_addr().unwrap(), free_address());
    let published = [format!("{taken}:80"), format!("{free}:80")];
    served_pool(&node, "acme/web", &[&published[0], &published[1]]);
    let problems = |pool: &str| node.json(&["pool", "info", pool])["publish_problems"].to_string();
    until("the taken port is told", LIMIT, || {
        problems("acme/web").contains("Address already in use").then_some(())
    });
    // Nobody is there to be woken.
    assert!(ask(free, "hello").is_err());
    until("the failed connection is told", LIMIT, || {
        problems("acme/web").contains(&format!("{free}:80: ")).then_some(())
    });
    let again = format!("{}:81", free);
    let denied = node.mvm(&["pool", "create", "acme/other", "--publish", &again]);
    assert!(
        denied.code != 0 && denied.stderr.contains("pool acme/web listens there"),
        "{denied:?}"
    );
    let udp = node.mvm(&["pool", "create", "acme/other", "--publish", "53:53/udp"]);
    assert!(udp.code != 0 && udp.stderr.contains("only TCP"), "{udp:?}");
}
