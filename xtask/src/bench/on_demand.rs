//! `on-demand`: a connection to a published port of a sleeping instance, to the first byte of the
//! answer, against waking it by a request and connecting then. Both take turns.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Instant;

use anyhow::{Context, ensure};
use mvm_core::main_process::ProcessSpec;
use mvm_core::spec::PoolSpec;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

use super::lab::Lab;
use super::microvm::ms_since;
use super::report::Report;
use super::rest::{fall_asleep, wake};
use super::statistics::{Summary, median};

/// What a wake by a connection may take beyond one by a request, in milliseconds.
const BEYOND_MS: f64 = 5.0;
/// The guest's server; it answers whatever is asked.
const SERVER: [&str; 6] = ["httpd", "-f", "-p", "80", "-h", "/etc"];

/// Measures this many wakes of each kind.
pub(super) async fn run(lab: &Lab, runs: u32) -> anyhow::Result<Report> {
    let address = free_address().await?;
    let command = Some(SERVER.map(str::to_owned).into());
    let pool = lab
        .pool_of(PoolSpec {
            process: ProcessSpec { command, ..ProcessSpec::default() },
            publish: vec![format!("{address}:80").parse()?],
            ..PoolSpec::default()
        })
        .await?;
    let client = lab.client();
    let path = client.create(&pool, 1).await?.pop().context("no instance was created")?;
    wake(client, &path).await?;
    // The first one fills the guest's caches and is not counted.
    first_byte(address).await?;

    let (mut ours, mut raw) = (Vec::new(), Vec::new());
    let (mut woken, mut awake) = (Vec::new(), Vec::new());
    for run in 0..runs {
        for is_ours in [run % 2 == 0, run % 2 != 0] {
            fall_asleep(client, &path).await?;
            let began = Instant::now();
            if is_ours {
                first_byte(address).await?;
                ours.push(ms_since(began));
            } else {
                wake(client, &path).await?;
                woken.push(ms_since(began));
                first_byte(address).await?;
                raw.push(ms_since(began));
                let began = Instant::now();
                first_byte(address).await?;
                awake.push(ms_since(began));
            }
        }
    }
    let (ours, raw) = (Summary::of(&ours).context("nothing was measured")?, Summary::of(&raw));
    let sample = "a first byte from a sleeping instance by connecting, against a wake by request and connecting then";
    let mut report = Report::new("on-demand", sample, ours, raw);
    report.part("the wake by request alone", median(&woken), "ms");
    report.part("a first byte from an instance that runs", median(&awake), "ms");
    let by_request = raw.map_or(0.0, |raw| raw.p50);
    report.target("by connecting, beyond by request", ours.p50 - by_request, BEYOND_MS, "ms");
    Ok(report)
}

async fn free_address() -> anyhow::Result<SocketAddr> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?.local_addr()?)
}

async fn first_byte(address: SocketAddr) -> anyhow::Result<()> {
    let mut socket = TcpStream::connect(address).await?;
    socket.write_all(b"GET / HTTP/1.0\r\n\r\n").await?;
    ensure!(socket.read(&mut [0]).await? == 1, "the connection ended without an answer");
    Ok(())
}
