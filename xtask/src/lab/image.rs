//! The lab's machine as files: a kernel with KVM, a root filesystem of distribution packages, and
//! an initial RAM filesystem that mounts it. Made once, below `target/lab/`, for each list of
//! packages and each kernel.

use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, bail, ensure};

/// The distribution whose packages the lab is made of.
const SUITE: &str = "bookworm";
/// The kernel with all drivers: the one for clouds has no KVM.
const KERNEL: &str = "linux-image-amd64";
/// The kernel that guests inside the lab boot.
const GUEST_KERNEL: &str = "linux-image-cloud-amd64";
/// What the suites need inside.
const PACKAGES: [&str; 10] = [
    "busybox-static",
    "e2fsprogs",
    "erofs-utils",
    "iproute2",
    "kmod",
    "mount",
    "nftables",
    "procps",
    "qemu-system-x86",
    "socat",
];
/// What has to be installed here, and the package that brings it.
const TOOLS: [(&str, &str); 7] = [
    ("apt-get", "apt"),
    ("busybox", "busybox-static"),
    ("depmod", "kmod"),
    ("dpkg-deb", "dpkg"),
    ("mksquashfs", "squashfs-tools"),
    ("mmdebstrap", "mmdebstrap"),
    ("qemu-system-x86_64", "qemu-system-x86"),
];
/// Modules that lead to the root filesystem.
const BOOT_MODULES: [&str; 6] =
    ["virtio_pci", "virtio_blk", "squashfs", "overlay", "9pnet_virtio", "9p"];
/// Directories of the lab's kernel modules that are kept.
const KEPT_MODULES: [&str; 12] = [
    "arch/x86/kvm",
    "crypto",
    "drivers/block",
    "drivers/char",
    "drivers/crypto/ccp",
    "drivers/net",
    "drivers/vhost",
    "drivers/virtio",
    "fs",
    "lib",
    "net",
    "virt",
];
/// Modules of the guests' kernel that the suites' own guests load, in a loadable order.
const GUEST_MODULES: [&str; 13] = [
    "virtio_ring",
    "virtio",
    "virtio_mmio",
    "virtio_blk",
    "virtio_console",
    "failover",
    "net_failover",
    "virtio_net",
    "pvpanic",
    "pvpanic-mmio",
    "vsock",
    "vmw_vsock_virtio_transport_common",
    "vmw_vsock_virtio_transport",
];
const INIT: &str = include_str!("init.sh");

/// The files that the lab boots.
#[derive(Debug)]
pub(super) struct Image {
    pub(super) kernel: PathBuf,
    pub(super) initrd: PathBuf,
    pub(super) root: PathBuf,
    /// An unpacked kernel package for guests inside: `boot/` and `lib/modules/`.
    pub(super) guest_kernel: PathBuf,
}

/// What is missing here, with the command that installs it.
pub(crate) fn missing_tools() -> Option<String> {
    let missing: Vec<&str> =
        TOOLS.iter().filter(|(tool, _)| !is_installed(tool)).map(|(_, package)| *package).collect();
    let list = missing.join(" ");
    (!missing.is_empty()).then(|| format!("the lab needs `apt-get install {list}`"))
}

fn is_installed(tool: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|dir| dir.join(tool).is_file())
}

/// The image, which is made first if need be.
pub(super) fn ensure(base: &Path) -> anyhow::Result<Image> {
    let packages = [KERNEL, GUEST_KERNEL].map(package_of);
    let [kernel, guest_kernel] = packages;
    let (kernel, guest_kernel) = (kernel?, guest_kernel?);
    let dir = base.join(format!("image-{:016x}", key(&[&kernel, &guest_kernel])));
    let image = Image {
        kernel: dir.join("vmlinuz"),
        initrd: dir.join("initrd"),
        root: dir.join("root.squashfs"),
        guest_kernel: dir.join("guest-kernel"),
    };
    if dir.exists() {
        return Ok(image);
    }
    println!("making the lab's image; this takes a minute or two, once");
    fs::create_dir_all(base)?;
    let work = tempfile::Builder::new().prefix("making-").tempdir_in(base)?;
    let made = work.path().join("image");
    fs::create_dir(&made)?;
    let tree = unpack(&kernel, work.path(), "kernel")?;
    fs::copy(one_in(&tree.join("boot"), "vmlinuz-")?, made.join("vmlinuz"))?;
    let modules = one_in(&tree.join("lib/modules"), "")?;
    run(Command::new("depmod").arg("-b").arg(&tree).arg(name_of(&modules)?))?;
    write_initrd(&modules, &made.join("initrd"))?;
    keep_guest_kernel(&unpack(&guest_kernel, work.path(), "guest")?, &made.join("guest-kernel"))?;
    drop_other_modules(&modules)?;
    write_root(&tree, &made.join("root.squashfs"))?;
    fs::rename(&made, &dir)?;
    Ok(image)
}

/// A number that changes with everything that the image is made of.
fn key(kernels: &[&str]) -> u64 {
    use std::hash::{DefaultHasher, Hash, Hasher};
    let mut hasher = DefaultHasher::new();
    (SUITE, PACKAGES, BOOT_MODULES, KEPT_MODULES, GUEST_MODULES, INIT, kernels).hash(&mut hasher);
    hasher.finish()
}

/// The package that a meta package stands for.
fn package_of(meta: &str) -> anyhow::Result<String> {
    let listed = output(Command::new("apt-cache").args(["depends", meta]))?;
    let package = listed.lines().find_map(|line| line.trim().strip_prefix("Depends: linux-image-"));
    let package = package.with_context(|| format!("apt knows no package {meta}"))?;
    Ok(format!("linux-image-{package}"))
}

/// Downloads a package and unpacks it into a directory of this name.
fn unpack(package: &str, work: &Path, name: &str) -> anyhow::Result<PathBuf> {
    let (download, tree) = (work.join(format!("{name}-deb")), work.join(name));
    fs::create_dir(&download)?;
    run(Command::new("apt-get").args(["--quiet=2", "download", package]).current_dir(&download))?;
    run(Command::new("dpkg-deb").arg("-x").arg(one_in(&download, package)?).arg(&tree))?;
    Ok(tree)
}

fn keep_guest_kernel(tree: &Path, to: &Path) -> anyhow::Result<()> {
    fs::create_dir_all(to.join("boot"))?;
    let kernel = one_in(&tree.join("boot"), "vmlinuz-")?;
    fs::copy(&kernel, to.join("boot").join(name_of(&kernel)?))?;
    let modules = one_in(&tree.join("lib/modules"), "")?;
    let kept = to.join("lib/modules").join(name_of(&modules)?);
    fs::create_dir_all(&kept)?;
    let files = files_below(&modules)?;
    for module in GUEST_MODULES {
        let name = format!("{module}.ko");
        let file = files.iter().find(|file| file.ends_with(&name));
        let file = file.with_context(|| format!("the guests' kernel has no {name}"))?;
        fs::copy(file, kept.join(name))?;
    }
    Ok(())
}

fn drop_other_modules(modules: &Path) -> anyhow::Result<()> {
    let root = modules.join("kernel");
    for file in files_below(&root)? {
        let relative = file.strip_prefix(&root)?;
        if !KEPT_MODULES.iter().any(|kept| relative.starts_with(kept)) {
            fs::remove_file(file)?;
        }
    }
    Ok(())
}

/// The root filesystem: packages, and the modules of the kernel that boots it. Uncompressed, since
/// an emulated processor would have to take it apart.
fn write_root(kernel_tree: &Path, to: &Path) -> anyhow::Result<()> {
    let tree = kernel_tree.to_str().context("the path is not UTF-8")?;
    let mut strap = Command::new("mmdebstrap")
        .args(["--quiet", "--variant=essential", "--format=tar"])
        .arg(format!("--include={}", PACKAGES.join(",")))
        .arg(format!("--customize-hook=cp -a '{tree}/lib/modules' \"$1/lib/\""))
        .args(
            ["doc", "man", "locale"]
                .map(|dir| format!("--dpkgopt=path-exclude=/usr/share/{dir}/*")),
        )
        .args([SUITE, "-"])
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot run mmdebstrap")?;
    let tar = strap.stdout.take().context("mmdebstrap has no output")?;
    let log = fs::File::create(to.with_extension("log"))?;
    let squashed = Command::new("mksquashfs")
        .arg("-")
        .arg(to)
        .args(["-tar", "-noI", "-noD", "-noF", "-noX", "-no-progress", "-quiet"])
        .stdin(tar)
        .stdout(log)
        .status()
        .context("cannot run mksquashfs")?;
    ensure!(strap.wait()?.success(), "mmdebstrap failed");
    ensure!(squashed.success(), "mksquashfs failed");
    Ok(())
}

/// The boot modules with what they depend on, and the program that loads them.
fn write_initrd(modules: &Path, to: &Path) -> anyhow::Result<()> {
    let dependencies = fs::read_to_string(modules.join("modules.dep"))?;
    let mut order: Vec<&str> = Vec::new();
    for module in BOOT_MODULES {
        add_with_dependencies(module, &dependencies, &mut order)?;
    }
    let tree = to.with_extension("tree");
    for dir in ["bin", "modules"] {
        fs::create_dir_all(tree.join(dir))?;
    }
    let busybox = output(Command::new("sh").args(["-c", "command -v busybox"]))?;
    fs::copy(busybox.trim(), tree.join("bin/busybox"))?;
    let mut list = String::new();
    for path in order {
        let name = path.rsplit('/').next().unwrap_or(path);
        fs::copy(modules.join(path), tree.join("modules").join(name))?;
        list.push_str(name);
        list.push('\n');
    }
    fs::write(tree.join("modules.list"), list)?;
    fs::write(tree.join("init"), INIT)?;
    let pack = "chmod 0755 init bin/busybox && find . | busybox cpio -o -H newc 2>/dev/null";
    let packed = Command::new("sh")
        .args(["-c", pack])
        .current_dir(&tree)
        .stdout(fs::File::create(to)?)
        .status()?;
    ensure!(packed.success(), "cannot pack the initial RAM filesystem");
    fs::remove_dir_all(&tree)?;
    Ok(())
}

/// Adds the path of a module behind those of everything it needs; nothing if it is built in.
fn add_with_dependencies<'a>(
    module: &str,
    dependencies: &'a str,
    order: &mut Vec<&'a str>,
) -> anyhow::Result<()> {
    let file = |name: &str| format!("/{name}.ko");
    let line = dependencies.lines().find_map(|line| {
        let (path, needs) = line.split_once(':')?;
        let normal = path.replace('-', "_");
        normal.ends_with(&file(&module.replace('-', "_"))).then_some((path, needs))
    });
    let Some((path, needs)) = line else { return Ok(()) };
    // modprobe's order: the last one named is the first one needed.
    let all = needs.split_ascii_whitespace().rev().chain([path]);
    let mut seen: BTreeSet<&str> = order.iter().copied().collect();
    order.extend(all.filter(|path| seen.insert(path)));
    Ok(())
}

fn files_below(dir: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let (mut files, mut left) = (Vec::new(), vec![dir.to_owned()]);
    while let Some(dir) = left.pop() {
        for entry in fs::read_dir(&dir).with_context(|| dir.display().to_string())? {
            let entry = entry?;
            match entry.file_type()? {
                kind if kind.is_dir() => left.push(entry.path()),
                kind if kind.is_file() => files.push(entry.path()),
                _ => {}
            }
        }
    }
    Ok(files)
}

fn one_in(dir: &Path, prefix: &str) -> anyhow::Result<PathBuf> {
    let mut entries = fs::read_dir(dir)
        .with_context(|| dir.display().to_string())?
        .filter_map(Result::ok)
        .filter(|entry| entry.file_name().to_string_lossy().starts_with(prefix));
    let entry = entries.next();
    Ok(entry.with_context(|| format!("{} has no {prefix}*", dir.display()))?.path())
}

fn name_of(path: &Path) -> anyhow::Result<&std::ffi::OsStr> {
    path.file_name().with_context(|| format!("{} has no name", path.display()))
}

/// Runs a tool whose output is only worth reading when it fails.
pub(super) fn run(command: &mut Command) -> anyhow::Result<()> {
    output(command).map(drop)
}

fn output(command: &mut Command) -> anyhow::Result<String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command.output().with_context(|| format!("cannot run {program}"))?;
    if !output.status.success() {
        std::io::stderr().write_all(&output.stderr)?;
        bail!("{program} failed");
    }
    Ok(String::from_utf8(output.stdout)?)
}
