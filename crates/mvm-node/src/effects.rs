//! What an instance's actor does to the machine. Each effect runs to its end and reports one
//! message; none decides what follows, and none retries.

use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use mvm_core::death::{CONSOLE_SEARCH_LINES, CONSOLE_TAIL_LINES, last_words};
use mvm_core::guest::{
    Configuration, ErrorKind, ExecRequest, Feature, HookReport, MODULES_ARGUMENT,
    NetworkConfiguration, WakeReason,
};
use mvm_core::lifecycle::{Event, InstanceStatus, Outcome, Phase};
use mvm_core::main_process::{MainProcess, resolve};
use mvm_core::name::InstancePath;
use mvm_core::net::{InstanceNetwork, vmm_uid};
use mvm_core::record::{Desired, InstanceRecord};
use mvm_core::vmm::{ProcessEnd, VmExit, VmmKind};
use mvm_host::console;
use mvm_host::guest::{Session, SessionError, SessionMode};
use mvm_host::net::Surroundings;
use mvm_host::vmm::{Disk, DiskAccess, Nic, TapPlace, Vm, VmSpec};
use tokio::time::{Instant, timeout};

use crate::actor::Message;
use crate::bases;
use crate::clock::wall_clock_unix_ns;
use crate::contact::{Contact, Reach};
use crate::disks;
use crate::main_process::{self, Attached, MainError, MainHub};
use crate::node::{Node, chain, ms_since};
use crate::sleep;
use crate::space;

/// How long a guest has to answer a request of the agent's own.
const GUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a guest has to replay the journals of its data disks, grow and mount them.
const MOUNT_TIMEOUT: Duration = Duration::from_secs(120);
/// Longest wait for a guest's hello. The boot deadline, which is the actor's, is usually shorter.
const HELLO_TIMEOUT: Duration = Duration::from_secs(24 * 3600);
/// Time of a shutdown that the guest needs for itself.
const OWN_WAY_DOWN: Duration = Duration::from_secs(3);
/// How long a guest has for its hooks after it was woken.
const WAKE_HOOKS: Duration = Duration::from_secs(10);
/// What a guest does before it is saved as a base or stands by: as good as any program.
const REHEARSED: &str = "true";
/// Pause between attempts to talk to a guest that runs and does not answer.
const REJOIN_PAUSE: Duration = Duration::from_secs(2);
/// Attempts to adopt a VM, such as while the machine is out of descriptors, and the pause between two.
const ADOPT_ATTEMPTS: u32 = 5;
const ADOPT_PAUSE: Duration = Duration::from_secs(1);
/// Pause between attempts to tell a guest that it is to shut down.
const SHUTDOWN_PAUSE: Duration = Duration::from_millis(200);

/// Why an effect failed: the chain of causes is what people see.
#[derive(Debug, thiserror::Error)]
pub(crate) enum EffectError {
    #[error("it has no revision")]
    NoRevision,
    #[error("cannot use {path}")]
    Dir { path: String, source: std::io::Error },
    #[error(transparent)]
    Images(#[from] mvm_host::images::ImagesError),
    #[error(transparent)]
    Network(#[from] mvm_host::net::NetworkError),
    #[error(transparent)]
    Vmm(#[from] mvm_host::vmm::VmmError),
    #[error(transparent)]
    Guest(#[from] mvm_host::guest::SessionError),
    #[error(transparent)]
    Main(#[from] MainError),
    #[error(transparent)]
    Snapshot(#[from] mvm_host::snapshots::SnapshotError),
    #[error("the memory image that its state is relative to is not known")]
    NoImage,
    #[error(
        "the guest agent does not answer, so the guest cannot prepare for sleep; `--force` skips that"
    )]
    Silent,
    #[error("{error}: {how}")]
    Unclean { error: String, how: String },
    #[error("it is to end")]
    Abandoned,
    #[error("{0}")]
    LacksSpace(String),
    #[error("the agent is ending")]
    Ending,
}

/// The start of an instance has failed for this reason.
pub(crate) fn boot_failed(error: &EffectError) -> Event {
    let program = match error {
        EffectError::Main(MainError::Refused { fault, .. }) => *fault,
        _ => None,
    };
    Event::BootFailed { error: chain(error), program }
}

/// What an instance is to be, as it was when its actor was told to start it: effects act on this, whatever is
/// desired by now.
#[derive(Debug, Clone)]
pub(crate) struct Given {
    pub(crate) record: InstanceRecord,
    /// Its place in its tenant's network, if it has an interface.
    pub(crate) network: Option<InstanceNetwork>,
    /// The user that its VMM runs as.
    pub(crate) uid: u32,
}

impl Given {
    /// What is desired at present; nothing of an instance that is unknown, or whose tenant is.
    pub(crate) fn of(desired: &Desired, path: &InstancePath) -> Option<Self> {
        let record = desired.instances.get(path)?.clone();
        let tenant = desired.tenants.get(&path.pool.tenant)?;
        let uid = vmm_uid(tenant.network.net_id, record.slot);
        Some(Self { network: desired.network_of(&record), uid, record })
    }

    pub(crate) fn path(&self) -> &InstancePath {
        &self.record.path
    }
}

pub(crate) async fn spec(
    node: &Node,
    given: &Given,
    status: &InstanceStatus,
) -> Result<VmSpec, EffectError> {
    let record = &given.record;
    let revision = status.revision.as_ref().ok_or(EffectError::NoRevision)?;
    let files = node.host.images.files(revision).await?;
    let mut kernel_args =
        match resolve(&files.config, &record.spec.process).map_err(MainError::from)? {
            // The console is a log: a login prompt there has nobody to ask, and systemd would wait a
            // minute and a half for the device in an image without udev.
            MainProcess::Init(program) => {
                format!("mvm.init={} systemd.getty_auto=0", program.argv[0])
            }
            MainProcess::Nothing | MainProcess::Program(_) => String::new(),
        };
    // A function of the revision and the instance, as a snapshot counts on the same devices.
    let modules = files.modules.map(|path| Disk { path, access: DiskAccess::ReadOnly });
    if modules.is_some() {
        let gap = if kernel_args.is_empty() { "" } else { " " };
        kernel_args.push_str(&format!("{gap}{MODULES_ARGUMENT}{}", disks::device_behind(record)));
    }
    let dir = node.instance_dir(&record.path.id);
    Ok(VmSpec {
        id: record.path.id.clone(),
        vcpus: record.spec.vcpus,
        mem_mib: record.spec.mem_mib,
        kernel: files.kernel,
        initrd: files.initrd,
        kernel_args,
        disks: [
            Disk { path: files.root, access: DiskAccess::ReadOnly },
            Disk { path: dir.layer(), access: DiskAccess::ReadWrite },
        ]
        .into_iter()
        .chain(disks::for_vmm(node, record))
        .chain(modules)
        .collect(),
        nic: given.network.map(|net| Nic { tap: net.tap(), mac: net.mac() }),
        uid: given.uid,
        vmm: record.spec.vmm,
        rates: record.spec.rates,
        dir,
    })
}

/// Prepares disk and tap, ends strays of a boot that was not recorded, and launches the VM.
pub(crate) async fn boot(node: &Node, given: &Given, status: &InstanceStatus) -> Message {
    match try_boot(node, given, status).await {
        Ok(vm) => Message::Launched(vm),
        Err(error) => {
            tracing::warn!(instance = %given.path(), error = chain(&error), "boot failed");
            Message::Event(boot_failed(&error))
        }
    }
}

async fn try_boot(
    node: &Node,
    given: &Given,
    status: &InstanceStatus,
) -> Result<Arc<dyn Vm>, EffectError> {
    let spec = spec(node, given, status).await?;
    node.host.vmm.end_strays(&spec).await?;
    let dir = spec.dir.clone();
    make_dir(&dir)?;
    let layer = dir.layer();
    place_layer(node, &given.record, status, &layer, spec.uid).await?;
    // What it slept on would not fit the disk any more.
    sleep::prune(&dir, status)?;
    add_to_network(node, given, spec.vmm).await?;
    Ok(node.host.vmm.launch(&spec).await?)
}

/// Makes the layer that an instance boots with, unless it is there. That of a fork is a copy of its
/// source's: rather than with an empty one it does not boot at all.
async fn place_layer(
    node: &Node,
    record: &InstanceRecord,
    status: &InstanceStatus,
    layer: &Path,
    uid: u32,
) -> Result<(), EffectError> {
    let has_run = status.boots + status.wakes > 0;
    let images = &node.host.images;
    match &record.origin {
        Some(id) if !has_run && !layer.exists() && !bases::is_base(node, &record.path.pool, id) => {
            Ok(images.copy_layer(&node.shared.dir(id).layer(), layer, uid).await?)
        }
        _ => Ok(images.ensure_layer(layer, record.spec.disk_mib, uid).await?),
    }
}

/// Makes an instance's directory, unless it is there.
pub(crate) fn make_dir(dir: &Path) -> Result<(), EffectError> {
    let failed = |source| EffectError::Dir { path: dir.display().to_string(), source };
    std::fs::create_dir_all(dir).map_err(failed)
}

/// Makes the instance's rules, if it has a network, and its tap, if its VMM needs it already.
pub(crate) async fn add_to_network(
    node: &Node,
    given: &Given,
    vmm: Option<VmmKind>,
) -> Result<(), EffectError> {
    match (given.network, node.host.vmm.tap_place(vmm)) {
        (None, _) => {}
        (Some(net), TapPlace::Host) => node.host.network.add_instance(net).await?,
        (Some(net), TapPlace::Own) => node.host.network.admit_instance(net).await?,
    }
    Ok(())
}

/// Connects a microVM to its network whose VMM has its tap to itself, if it is not connected yet.
async fn connect(node: &Node, given: &Given, vm: &dyn Vm) -> Result<(), EffectError> {
    let handle = vm.handle();
    match (given.network, node.host.vmm.tap_place(Some(handle.vmm))) {
        (Some(net), TapPlace::Own) => Ok(node.host.network.take_tap(net, handle.pid).await?),
        _ => Ok(()),
    }
}

/// Waits for the VM's end.
pub(crate) async fn watch_vm(node: &Node, path: &InstancePath, vm: &dyn Vm) -> Message {
    let exit = vm.wait().await;
    Message::Event(Event::Exited { exit, console_tail: console_tail(node, path) })
}

/// The console's last lines; an unreadable console must not hide a death.
pub(crate) fn console_tail(node: &Node, path: &InstancePath) -> Vec<String> {
    let file = node.instance_dir(&path.id).console_log();
    match console::tail(&file, CONSOLE_SEARCH_LINES) {
        Ok(lines) => last_words(&lines, CONSOLE_TAIL_LINES).to_vec(),
        Err(error) => vec![format!("(cannot read {}: {error})", file.display())],
    }
}

/// A VM's guest, to open a session with.
#[derive(Clone)]
pub(crate) struct Guest {
    pub(crate) vm: Arc<dyn Vm>,
    pub(crate) hub: Arc<MainHub>,
    pub(crate) contact: Arc<Contact>,
    /// What is known of the byte stream to it.
    pub(crate) mode: SessionMode,
}

/// Opens the session with a guest that boots or goes on, connects it to its network, and configures it.
pub(crate) async fn greet(
    node: &Node,
    given: &Given,
    guest: &Guest,
    woken: Option<WakeReason>,
) -> Message {
    let mut guest = guest.clone();
    loop {
        match try_greet(node, given, &guest, woken).await {
            Ok((session, main)) => return Message::Session(session, main.map(Box::new)),
            // It had no time to answer in.
            Err(_) if guest.vm.lacks_space().await.unwrap_or(false) => {
                space::wait_while_lacking(given.path(), &*guest.vm).await;
                guest.mode = SessionMode::Existing;
            }
            Err(error) => return Message::Event(boot_failed(&error)),
        }
    }
}

async fn try_greet(
    node: &Node,
    given: &Given,
    guest: &Guest,
    woken: Option<WakeReason>,
) -> Result<(Session, Option<Attached>), EffectError> {
    let began = Instant::now();
    let path = given.path();
    let opening = open_session(node, given, guest, HELLO_TIMEOUT);
    let ((session, main), ()) = tokio::try_join!(opening, connect(node, given, &*guest.vm))?;
    let channel_ms = ms_since(began);
    if let Some(reason) = woken {
        tell_woken(path, &session, reason).await?;
    }
    if !given.record.purpose.is_use() {
        rehearse(path, &session).await;
    }
    let fixes_ms = ms_since(began) - channel_ms;
    tracing::debug!(instance = %path, channel_ms, fixes_ms, "greeted");
    Ok((session, main))
}

/// Sets a guest right whose session outlived its standing still.
pub(crate) async fn greet_again(
    node: &Node,
    given: &Given,
    vm: &dyn Vm,
    session: &Session,
    reason: WakeReason,
) -> Message {
    loop {
        let set_right = async {
            configure_over(node, given, session).await?;
            tell_woken(given.path(), session, reason).await
        };
        match set_right.await {
            Ok(()) => return Message::Event(Event::Ready),
            // It had no time to answer in.
            Err(_) if vm.lacks_space().await.unwrap_or(false) => {
                space::wait_while_lacking(given.path(), vm).await;
            }
            Err(error) => return Message::Event(boot_failed(&error)),
        }
    }
}

/// Tells a guest that it goes on, and lets it run its hooks.
pub(crate) async fn tell_woken(
    path: &InstancePath,
    session: &Session,
    reason: WakeReason,
) -> Result<(), EffectError> {
    match session.set_clock(GUEST_TIMEOUT).await {
        Ok(late) => {
            let at_most_ms = late.as_millis();
            tracing::debug!(instance = %path, at_most_ms, "its clock is set");
        }
        Err(SessionError::Missing { .. }) => {}
        Err(error) => return Err(error.into()),
    }
    match session.woken(reason, WAKE_HOOKS, WAKE_HOOKS + GUEST_TIMEOUT).await {
        Ok(report) => note_hooks(path, "post-wake", &report),
        // A guest agent of an earlier version.
        Err(SessionError::Missing { .. }) => {}
        Err(error) => return Err(error.into()),
    }
    Ok(())
}

/// Has a guest do what it is likely to be asked for first, before it is saved or stands by: its
/// caches are warm then, and so is the emulator's translation of its code.
async fn rehearse(path: &InstancePath, session: &Session) {
    let request = ExecRequest { argv: vec![REHEARSED.to_owned()], ..ExecRequest::default() };
    let rehearsed = async { session.exec(request, GUEST_TIMEOUT).await?.output(0).await };
    match timeout(GUEST_TIMEOUT, rehearsed).await {
        Ok(Ok(_)) => {}
        // An image may have no such program, and whatever is asked for first is then slower.
        Ok(Err(error)) => {
            tracing::debug!(instance = %path, error = chain(&error), "nothing was rehearsed");
        }
        Err(_) => tracing::debug!(instance = %path, "the rehearsal took too long"),
    }
}

/// Writes down how a guest's hooks ended.
pub(crate) fn note_hooks(path: &InstancePath, event: &str, report: &HookReport) {
    for run in &report.runs {
        let (hook, code, took_ms) = (&run.name, run.status.shell_code(), run.took_ms);
        tracing::info!(instance = %path, event, hook, code, took_ms, output = run.output, "hook ended");
    }
    for hook in &report.skipped {
        tracing::warn!(instance = %path, event, hook, "hook skipped: there was no time left");
    }
}

/// Opens the session with a guest that ran before, however long that takes: an unresponsive guest
/// is left running.
pub(crate) async fn rejoin(node: &Node, given: &Given, guest: &Guest) -> Message {
    let path = given.path();
    loop {
        match open_session(node, given, guest, GUEST_TIMEOUT).await {
            Ok((session, main)) => return Message::Session(session, main.map(Box::new)),
            Err(error) => {
                tracing::debug!(instance = %path, error = chain(&error), "the guest does not answer");
            }
        }
        tokio::time::sleep(REJOIN_PAUSE).await;
    }
}

/// Opens a session, tells the guest who it is, and starts or joins the main process.
async fn open_session(
    node: &Node,
    given: &Given,
    guest: &Guest,
    timeout: Duration,
) -> Result<(Session, Option<Attached>), EffectError> {
    let session = say_hello(guest, timeout).await?;
    configure_over(node, given, &session).await?;
    let revision = node.state.now().status(given.path()).revision.clone();
    let revision = revision.ok_or(EffectError::NoRevision)?;
    let image = node.host.images.files(&revision).await?.config;
    let spec = &given.record.spec.process;
    let main = main_process::attach(node, &guest.hub, &session, &image, spec).await?;
    Ok((session, main))
}

/// Opens a session, and notes it for those who wait for one. There is no other while it does.
async fn say_hello(guest: &Guest, timeout: Duration) -> Result<Session, EffectError> {
    // What is left of an attempt before would be in the way.
    guest.contact.let_go();
    let session = hello(&*guest.vm, guest.mode, timeout).await?;
    guest.contact.met(&session);
    Ok(session)
}

async fn hello(vm: &dyn Vm, mode: SessionMode, timeout: Duration) -> Result<Session, EffectError> {
    let stream = vm.connect_guest().await?;
    let mode = if vm.has_connections() { SessionMode::Fresh } else { mode };
    Ok(Session::open(stream, mode, timeout).await?)
}

/// Tells a guest who it is, and what time.
async fn configure_over(node: &Node, given: &Given, session: &Session) -> Result<(), EffectError> {
    let (record, path) = (&given.record, given.path());
    let has_disks = !record.spec.disks.is_empty();
    let network = match given.network {
        Some(net) => Some(network_configuration(node, net).await?),
        None => None,
    };
    let configuration = Configuration {
        hostname: format!("{}-{}", path.pool.pool, path.id),
        instance: path.to_string(),
        network,
        wall_clock_unix_ns: Some(wall_clock_unix_ns()),
        disks: disks::for_guest(record),
        settings: record.spec.settings.clone(),
    };
    if !configuration.settings.is_default() {
        session.need(Feature::Settings)?;
    }
    let limit = if has_disks { MOUNT_TIMEOUT } else { GUEST_TIMEOUT };
    session.configure(configuration, limit).await.map_err(|error| match error {
        SessionError::Guest { error, .. } if error.kind == ErrorKind::Unclean => {
            let how = disks::how_to_replay(&node.state.now().desired, record);
            EffectError::Unclean { error: error.message, how }
        }
        error => error.into(),
    })
}

async fn network_configuration(
    node: &Node,
    net: InstanceNetwork,
) -> Result<NetworkConfiguration, EffectError> {
    let Surroundings { nameservers: mut direct, is_gateway_last, search, resolver_options, mtu } =
        node.host.network.surroundings().await?;
    let gateway = net.tenant.gateway();
    // While no agent runs, nobody answers at the gateway, which a guest learns at once.
    let at = if is_gateway_last { direct.len() } else { 0 };
    direct.insert(at, IpAddr::V4(gateway));
    let nameservers = direct;
    Ok(NetworkConfiguration {
        address: net.address(),
        prefix_len: net.tenant.subnet.prefix_len(),
        gateway,
        nameservers,
        search,
        resolver_options,
        mtu,
        mac: Some(net.mac()),
    })
}

/// Asks the guest to shut down, as soon as it can be reached; the VM's end comes through the watch.
/// When it has had its time is the actor's business.
pub(crate) async fn shutdown(
    path: &InstancePath,
    vm: &dyn Vm,
    contact: &Contact,
    grace_ms: u64,
) -> Message {
    let deadline = Instant::now() + Duration::from_millis(grace_ms);
    loop {
        // Until there is space it can do nothing.
        space::wait_while_lacking(path, vm).await;
        match ask_to_shut_down(vm, contact, deadline).await {
            Ok(()) => return Message::Event(Event::Tick),
            Err(EffectError::Guest(error @ SessionError::Guest { .. })) => {
                tracing::warn!(instance = %path, error = chain(&error), "the guest does not shut down");
                return Message::Event(Event::ShutdownFailed);
            }
            Err(EffectError::Silent) => return Message::Event(Event::ShutdownFailed),
            Err(error) => {
                tracing::debug!(instance = %path, error = chain(&error), "the guest does not hear that it is to shut down");
            }
        }
        tokio::time::sleep(SHUTDOWN_PAUSE).await;
    }
}

/// One attempt to tell a guest that it is to shut down. [`EffectError::Silent`] is that of a guest
/// that has just been started and has nothing to shut down.
async fn ask_to_shut_down(
    vm: &dyn Vm,
    contact: &Contact,
    deadline: Instant,
) -> Result<(), EffectError> {
    let session = match contact.reach().await {
        Reach::Open(session) => session,
        Reach::Booting => return Err(EffectError::Silent),
        Reach::Lost => {
            let session = hello(vm, SessionMode::Existing, GUEST_TIMEOUT).await?;
            contact.met(&session);
            session
        }
    };
    let left = deadline.saturating_duration_since(Instant::now());
    // Most of the time is for the guest's processes, the rest for the guest's own way down.
    let grace = left - (left / 2).min(OWN_WAY_DOWN);
    let asked = session.shutdown(grace, GUEST_TIMEOUT).await;
    if asked.is_err() && session.is_over() {
        contact.forget(&session);
    }
    Ok(asked?)
}

/// Ends the VM by force.
pub(crate) async fn kill(path: &InstancePath, vm: &dyn Vm) {
    if let Err(error) = vm.kill().await {
        tracing::warn!(instance = %path, error = chain(&error), "cannot end the VM");
    }
}

/// Gives back what a stopped instance does not need, or everything.
pub(crate) async fn release(
    node: &Node,
    given: &Given,
    status: &InstanceStatus,
    everything: bool,
) -> Message {
    let path = given.path();
    match try_release(node, given, status, everything).await {
        Ok(()) => {
            node.set_problem(&format!("releasing {path}"), None);
            Message::Event(Event::Released { everything })
        }
        Err(error) => {
            node.set_problem(&format!("releasing {path}"), Some(chain(&error)));
            Message::Event(Event::ReleaseFailed)
        }
    }
}

async fn try_release(
    node: &Node,
    given: &Given,
    status: &InstanceStatus,
    everything: bool,
) -> Result<(), EffectError> {
    if let Ok(spec) = spec(node, given, status).await {
        node.host.vmm.clear(&spec).await?;
    }
    match (given.network, &status.phase) {
        (None, _) => {}
        // Its rules wait for its wake, which is the quicker for it.
        (Some(net), Phase::Releasing { outcome: Outcome::Asleep, .. }) => {
            node.host.network.remove_tap(net).await?;
        }
        (Some(net), _) => node.host.network.remove_instance(net).await?,
    }
    let dir = node.instance_dir(&given.path().id);
    sleep::prune(&dir, status)?;
    if everything {
        mvm_host::removal::remove_tree(&dir)
            .map_err(|source| EffectError::Dir { path: dir.display().to_string(), source })?;
    }
    Ok(())
}

/// Looks for the VM of an earlier agent. A failure that may pass is tried again for a while: what is
/// taken for gone is ended before the next boot.
pub(crate) async fn adopt(node: &Node, given: &Given, status: &InstanceStatus) -> Message {
    let path = given.path();
    for attempt in 1.. {
        match try_adopt(node, given, status).await {
            Ok(Some(vm)) => {
                tracing::info!(instance = %path, pid = vm.handle().pid, "adopted");
                return Message::Found(vm);
            }
            Ok(None) => break,
            Err(error) => {
                tracing::error!(instance = %path, attempt, error = chain(&error), "cannot adopt");
                if attempt == ADOPT_ATTEMPTS {
                    break;
                }
            }
        }
        tokio::time::sleep(ADOPT_PAUSE).await;
    }
    Message::Event(gone(node, given, status).await)
}

async fn try_adopt(
    node: &Node,
    given: &Given,
    status: &InstanceStatus,
) -> Result<Option<Arc<dyn Vm>>, EffectError> {
    let spec = spec(node, given, status).await?;
    match &status.vm {
        Some(handle) => Ok(node.host.vmm.adopt(handle, &spec).await?),
        // Launched perhaps, but not recorded: whatever runs is a stray.
        None => {
            node.host.vmm.end_strays(&spec).await?;
            Ok(None)
        }
    }
}

/// What there is to say of a VM that is not there any more.
pub(crate) async fn gone(node: &Node, given: &Given, status: &InstanceStatus) -> Event {
    let mut exit = VmExit { process: ProcessEnd::Unobserved, reason: None };
    let mut host_rebooted = false;
    if let Some(handle) = &status.vm {
        host_rebooted = node.host.vmm.host_boot_id() != handle.host_boot_id;
        if let Ok(spec) = spec(node, given, status).await {
            exit = node.host.vmm.exit_of(handle, &spec).await;
        }
    }
    Event::FoundGone { exit, host_rebooted, console_tail: console_tail(node, given.path()) }
}
