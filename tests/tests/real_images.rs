//! Images as people have them: made with `buildah`, pulled from a registry, run with nothing added.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

use std::fs;
use std::path::PathBuf;

use mvm_tests::made_once::{Debian, made_once};
use mvm_tests::run::{tool, tool_within};
use mvm_tests::{LIMIT, Node, Registry, buildah, until};

/// Serves until it is asked to end, and then ends with 3, or fails at once.
const SERVER: &str = r#"
#include <signal.h>
#include <stdio.h>
#include <unistd.h>
static void end(int signal) { _exit(3); }
int main(int count, char **words) {
    if (count > 1) { fputs("there is no configuration\n", stderr); return 4; }
    signal(SIGTERM, end);
    puts("serving");
    fflush(stdout);
    for (;;) pause();
}
"#;

const ONE_PROGRAM: &str = "\
FROM scratch
COPY server linked /
EXPOSE 8080 9090/udp
ENTRYPOINT [\"/server\"]
";

#[test]
fn an_image_of_one_static_program_runs_and_says_what_it_lacks() {
    let Some(node) = Node::new() else { return };
    let Some(registry) = Registry::start(&["buildah", "gcc"]) else { return };
    let dir = tempfile::tempdir().unwrap();
    let context = dir.path().join("context");
    fs::create_dir(&context).unwrap();
    buildah::context(&context, ONE_PROGRAM, &[]);
    let path = |name: &str| dir.path().join(name).display().to_string();
    fs::write(path("server.c"), SERVER).unwrap();
    let server = path("context/server");
    tool("gcc", &["-static", "-o", &server, &path("server.c")]).ok();
    tool("gcc", &["-o", &path("context/linked"), &path("server.c")]).ok();
    let image = format!("{}/team/one:v1", registry.host());
    buildah::build(&context, &format!("docker://{image}"));

    node.small_pool("demo/one", &["--image", &image, "--restart", "never"]);
    let instance = node.boot("demo/one");
    until("the program serves", LIMIT, || {
        (node.ok(&["logs", &instance]) == "serving\n").then_some(())
    });
    let ports = serde_json::json!(["8080/tcp", "9090/udp"]);
    assert_eq!(node.instance(&instance)["exposed_ports"], ports);
    assert_eq!(node.json(&["pool", "info", "demo/one"])["exposed_ports"], ports);
    for info in [node.ok(&["pool", "info", "demo/one"]), node.ok(&["instance", "info", &instance])]
    {
        assert!(info.contains("8080/tcp 9090/udp\n"), "{info}");
    }
    let exec = |words: &[&str]| node.mvm(&[&["exec", &instance, "--"], words].concat());
    exec(&["sh", "-c", "ls"]).fails_with(127).says(&[
        "`sh` was not found in PATH",
        "the image has no shell",
        "hint: run a program of the image by its path; `mvm cp i-",
    ]);
    exec(&["/linked"]).fails_with(127).says(&["`/linked` is there, but its interpreter `/lib"]);
    exec(&["/server", "x"]).fails_with(4).says(&["there is no configuration"]);
    node.ok(&["cp", &format!("{instance}:/server"), &path("copy")]);
    assert!(fs::read(path("copy")).unwrap() == fs::read(&server).unwrap());
    node.ok(&["stop", &instance]);
    let list = node.ok(&["ps", "-a"]);
    assert!(list.contains("stopped (exit 3)"), "{list}");

    let run = ["run", "--tenant", "demo", "--name", "bad", "--mem", "192M", &image, "x"];
    node.mvm(&run).fails_with(4).says(&["there is no configuration"]);
    until("the list tells its end", LIMIT, || {
        node.ok(&["ps", "-a"]).contains("failed (exit 4) ").then_some(())
    });
    let why = node.ok(&["why", "demo/bad"]);
    let words = "The last lines that its main process wrote:\n  | there is no configuration\n";
    assert!(why.contains(words) && !why.contains("console"), "{why}");
}

const DATABASE: &str = "\
FROM scratch
ADD layer.tar /
COPY --chmod=755 serve /usr/local/bin/
RUN install -d -o postgres -g postgres /run/postgresql /srv/db
ENV PATH=/usr/local/bin:/usr/lib/postgresql/15/bin:/usr/bin:/bin
USER postgres
EXPOSE 5432
STOPSIGNAL SIGINT
ENTRYPOINT [\"serve\"]
CMD [\"postgres\", \"-D\", \"/srv/db\"]
";

const SERVE: &str = "\
#!/bin/sh
set -e
[ -s /srv/db/PG_VERSION ] || initdb --auth=trust --no-sync -D /srv/db
exec \"$@\"
";

/// The layout of an image with Debian's PostgreSQL, which is made once.
fn database() -> Option<PathBuf> {
    let debian = Debian::WITH_SERVICES.archive()?;
    let recipe = [DATABASE, SERVE, &Debian::WITH_SERVICES.recipe()].concat();
    let dir = made_once("postgres", &recipe, |dir| {
        let context = dir.join("context");
        fs::create_dir(&context).unwrap();
        buildah::context(&context, DATABASE, &[("serve", SERVE)]);
        fs::hard_link(&debian, context.join("layer.tar")).unwrap();
        buildah::build(&context, &format!("oci:{}:v1", dir.join("layout").display()));
        fs::remove_dir_all(&context).unwrap();
        Ok(())
    })?;
    Some(dir.join("layout"))
}

#[test]
fn a_database_serves_is_stopped_in_order_and_keeps_its_rows() {
    let Some(node) = Node::new() else { return };
    let Some(registry) = Registry::start(&["buildah", "skopeo"]) else { return };
    let Some(layout) = database() else { return };
    let image = format!("{}/team/db:v1", registry.host());
    let (from, to) = (format!("oci:{}:v1", layout.display()), format!("docker://{image}"));
    let copy = ["--insecure-policy", "copy", "-q", "--dest-tls-verify=false", &from, &to];
    tool_within(LIMIT, "skopeo", &copy).ok();
    node.ok(&["tenant", "create", "demo"]);
    node.ok(&["pool", "create", "demo/db", "--image", &image, "--mem", "384M"]);
    let path = node.boot("demo/db");
    let query = |sql: &str| {
        // Found through the image's own PATH, and no other.
        node.mvm(&["exec", &path, "-u", "postgres", "--", "psql", "-Atqc", sql])
    };
    // Both outputs of all its boots.
    let log = || {
        let logs = node.mvm(&["logs", &path]).ok();
        logs.stdout + &logs.stderr
    };
    // Who asks the database itself all the time keeps it from beginning.
    let until_it_serves = |boots: usize| {
        until("the database serves", LIMIT, || {
            (log().matches("ready to accept connections").count() == boots).then_some(())
        });
    };
    until_it_serves(1);
    query("create table kept (what text); insert into kept values ('a row')").ok();

    node.ok(&["stop", &path]);
    let view = node.instance(&path);
    assert_eq!((&view["last_death"]["cause"], &view["exit_code"]), (&"operator".into(), &0.into()));
    let said = log();
    // What SIGINT means to it, and that it came to its end.
    for words in ["received fast shutdown request", "database system is shut down"] {
        assert!(said.contains(words), "{said}");
    }

    node.ok(&["start", &path]);
    until_it_serves(2);
    assert_eq!(query("select what from kept").ok().stdout, "a row\n");
    let said = log();
    assert!(!said.contains("was not properly shut down"), "{said}");
}
