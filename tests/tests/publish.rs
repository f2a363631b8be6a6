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
    ask_on(TcpStream::connect(address)?, question)
}

/// The same on a connection that is open.
fn ask_on(mut socket: TcpStream, question: &str) -> std::io::Result<String> {
    socket.set_read_timeout(Some(LIMIT))?;
    socket.write_all(question.as_bytes())?;
    socket.shutdown(Shutdown::Write)?;
    let mut answer = String::new();
    socket.read_to_string(&mut answer)?;
    Ok(answer)
}

fn get(socket: TcpStream, path: &str) -> std::io::Result<String> {
    let answer = ask_on(socket, &format!("GET {path} HTTP/1.0\r\n\r\n"))?;
    Ok(answer.rsplit("\r\n\r\n").next().unwrap_or_default().trim().to_owned())
}

fn page(address: SocketAddr) -> std::io::Result<String> {
    page_on(TcpStream::connect(address)?)
}

fn page_on(socket: TcpStream) -> std::io::Result<String> {
    get(socket, "/name")
}

/// The address of which a web server's program says that it is its client's.
fn peer(address: SocketAddr) -> String {
    get(TcpStream::connect(address).unwrap(), "/cgi-bin/peer").unwrap()
}

/// What makes the page behind [`peer`].
const PEER_PAGE: &str = "mkdir -p /www/cgi-bin; cat >/www/cgi-bin/peer <<'END'
#!/bin/sh
printf 'Content-Type: text/plain\\r\\n\\r\\n'
echo $REMOTE_ADDR
END
chmod +x /www/cgi-bin/peer";

/// Gives a guest a page with its own name.
fn name(node: &Node, path: &str) {
    let id = path.rsplit('/').next().unwrap();
    node.guest(path, &format!("mkdir -p /www; echo {id} > /www/name"));
}

/// Waits until the connections to `acme/web` are so many.
fn until_connected(node: &Node, count: u64) {
    until(&format!("{count} connections are counted"), LIMIT, || {
        (node.json(&["pool", "info", "acme/web"])["connections"] == count).then_some(())
    });
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
    node.guest(&first, PEER_PAGE);
    let stand_in = peer(address);
    assert!(stand_in.contains("192.0.0.8"), "no network, and yet not local: {stand_in}");

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
    until_connected(&node, 0);
    // All are open before the first ends: whoever has fewer gets the next.
    let open: Vec<_> = (0..4).map(|_| TcpStream::connect(address).unwrap()).collect();
    until_connected(&node, 4);
    let mut pages: Vec<String> = open.into_iter().map(|it| page_on(it).unwrap()).collect();
    pages.sort();
    let mut expected = [id(&first), id(&first), id(&second), id(&second)];
    expected.sort();
    assert_eq!(pages, expected);
    node.ok(&["sleep", &first]);
    assert_eq!(page(address).unwrap(), id(&second));
    assert_eq!(node.instance(&first)["state"], "sleeping");

    until_connected(&node, 0);
    // An open connection ends with the guest's sleep, and the next agent serves again.
    let mut open = TcpStream::connect(address).unwrap();
    open.set_read_timeout(Some(LIMIT)).unwrap();
    until_connected(&node, 1);
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

/// Whether the node's end of a connection from this client is asked now and then if it is still there.
fn is_kept_alive(client: &TcpStream) -> bool {
    let ports = [client.peer_addr().unwrap().port(), client.local_addr().unwrap().port()];
    let table = std::fs::read_to_string("/proc/net/tcp").unwrap();
    table.lines().any(|line| {
        let fields: Vec<&str> = line.split_ascii_whitespace().collect();
        let ends = [fields[1], fields[2]].map(|end| end.rsplit(':').next().unwrap().to_owned());
        // The timer that runs is the one of keepalive.
        ends == ports.map(|port| format!("{port:04X}")) && fields[5].starts_with("02:")
    })
}

#[test]
fn clients_are_not_local_find_the_program_wherever_it_listens_and_end_when_they_vanish() {
    let Some(node) = Node::new() else { return };
    let free: Vec<TcpListener> =
        (0..5).map(|_| TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap()).collect();
    let ports: Vec<SocketAddr> = free.iter().map(|it| it.local_addr().unwrap()).collect();
    drop(free);
    let published: Vec<String> =
        ports.iter().zip(80..).map(|(at, port)| format!("{at}:{port}")).collect();
    let options: Vec<&str> = published.iter().flat_map(|it| ["-p", it]).collect();
    node.small_pool("acme/web", &options);
    let web = node.boot("acme/web");
    let own = node.instance(&web)["address"].as_str().unwrap().to_owned();
    node.guest(&web, PEER_PAGE);
    node.guest(
        &web,
        &format!(
            "for at in 80 {own}:81 127.0.0.1:82 [::1]:83; do httpd -p $at -h /www; done
             nc -ll -p 84 -e sleep 1000 </dev/null >/dev/null 2>&1 &"
        ),
    );
    for port in [ports[0], ports[1], ports[2]] {
        let client = peer(port);
        assert!(client.contains(&own), "{client} instead of {own} at {port}");
    }
    let client = peer(ports[3]);
    assert!(client.contains("100::6d76:6d"), "{client}");

    until_connected(&node, 0);
    let client = TcpStream::connect(ports[4]).unwrap();
    until_connected(&node, 1);
    until("it is kept an eye on", LIMIT, || is_kept_alive(&client).then_some(()));
    // It ends its side, and is gone before the silent program ends the other.
    client.shutdown(Shutdown::Write).unwrap();
    rustix::net::sockopt::set_socket_linger(&client, Some(Duration::ZERO)).unwrap();
    drop(client);
    until_connected(&node, 0);
}

#[test]
fn what_keeps_a_port_from_being_served_is_told() {
    let Some(node) = Node::new() else { return };
    let other = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let (taken, free) = (other.local_addr().unwrap(), free_address());
    let publish = format!("{taken}:80");
    node.ok(&["tenant", "create", "acme"]);
    for verb in [["pool", "create", "acme/web"], ["run", "-d", "builtin"]] {
        let denied = node.mvm(&[&verb[..2], &["--publish", &publish], &verb[2..]].concat());
        assert!(denied.code == 5 && denied.stderr.contains(" listens there"), "{denied:?}");
        assert!(denied.stderr.contains(&format!("process {}", std::process::id())), "{denied:?}");
    }
    served_pool(&node, "acme/web", &[&format!("{free}:80")]);
    let problems = |pool: &str| node.json(&["pool", "info", pool])["publish_problems"].to_string();
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
