//! One boot of the lab: QEMU emulates a machine with SVM, so that the kernel inside has a real KVM.

use std::fs;
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

use super::image::Image;

/// Memory of the machine: it holds everything that is written inside, and the guests.
const MEMORY: &str = "4G";
/// Processors: the first one, and two on which the suites and their guests run.
///
/// QEMU keeps whether a processor of SVM takes interrupts (its GIF) in a word with other flags, and
/// clears one of them in the *first* processor's word, without a lock, whenever any processor loads
/// state of its floating-point unit (`cpu_clear_ignne`; seen in 7.2). A first processor that enters
/// and leaves guests loses or keeps a GIF by that, and the lab's kernel dies or stands still.
const PROCESSORS: &str = "3";
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// Boots the lab, which runs `share/run.sh` and powers off. Its console is this process's.
///
/// # Errors
/// QEMU fails, or the lab does not end in time.
pub(super) fn boot(
    image: &Image,
    share: &Path,
    out: &Path,
    limit: Option<Duration>,
) -> anyhow::Result<()> {
    let directory = |path: &Path, tag: &str, options: &str| {
        format!("local,path={},mount_tag={tag},security_model=none{options}", path.display())
    };
    let mut command = Command::new("qemu-system-x86_64");
    command
        .args(["-M", "q35", "-accel", "tcg,thread=multi", "-cpu", "max,+svm,+npt,la57=off"])
        .args(["-smp", PROCESSORS, "-m", MEMORY, "-nodefaults", "-no-reboot", "-display", "none"])
        .arg("-kernel")
        .arg(&image.kernel)
        .arg("-initrd")
        .arg(&image.initrd)
        .args(["-append", "console=ttyS0 quiet panic=-1 mitigations=off tsc=reliable"])
        .arg("-drive")
        .arg(format!("file={},if=virtio,format=raw,readonly=on", image.root.display()))
        .args(["-virtfs", &directory(share, "lab", ",readonly=on")])
        .args(["-virtfs", &directory(out, "out", "")])
        .args(["-serial", "stdio"]);
    if limit.is_some() {
        command.stdin(Stdio::null());
    }
    let mut lab = command.spawn().context("cannot run qemu-system-x86_64")?;
    let began = Instant::now();
    let status: ExitStatus = loop {
        if let Some(status) = lab.try_wait()? {
            break status;
        }
        if limit.is_some_and(|limit| began.elapsed() > limit) {
            lab.kill()?;
            lab.wait()?;
            bail!("the lab did not end within {} s", began.elapsed().as_secs());
        }
        std::thread::sleep(LOOK_AGAIN);
    };
    if !status.success() {
        bail!("the lab's QEMU ended with {status}");
    }
    Ok(())
}

/// What a suite left as its result in the lab's output directory.
pub(super) fn result_of(out: &Path, suite: &str) -> anyhow::Result<i32> {
    let path = out.join(format!("{suite}.status"));
    let text = fs::read_to_string(&path)
        .with_context(|| format!("the lab ended before suite `{suite}` did"))?;
    text.trim().parse().with_context(|| format!("{} is no exit code", path.display()))
}
