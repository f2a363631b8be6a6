//! One run of the tiny guest on x86-64, from the device file to the halt.

use std::fmt::Display;
use std::os::fd::AsRawFd;
use std::time::Duration;

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, Msrs, kvm_msr_entry, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use rustix::time::{ClockId, clock_gettime};

use super::memory::{ENTRY, GuestMemory, PORT, loop_on_host};
use super::{KICK, millis, refused};
use crate::platform::kvm::{Probe, Stage};

/// The version of KVM's interface, which has not changed since 2007.
const API_VERSION: i32 = 12;
/// Three pages below the firmware that Intel's KVM without real mode needs, as in other VMMs.
const TSS_ADDRESS: usize = 0xfffb_d000;
/// Which CPU flaws a CPU is free of. A VMM that shows the host's CPU to its guest sets it first.
const IA32_ARCH_CAPABILITIES: u32 = 0x10a;
/// Where CPUID announces it: leaf 7, EDX, bit 29.
const CPUID_LEAF: u32 = 7;
const CPUID_ARCH_CAPABILITIES: u32 = 1 << 29;
/// `_IOW(KVMIO, 0x8b, struct kvm_signal_mask)`, whose set is not counted in its size.
const KVM_SET_SIGNAL_MASK: libc::c_ulong = 0x4004_ae8b;

/// Names the step that failed.
trait Step<T> {
    fn step(self, step: &str) -> Result<T, Probe>;
}

impl<T, E: Display> Step<T> for Result<T, E> {
    fn step(self, step: &str) -> Result<T, Probe> {
        self.map_err(|error| refused(step, &error))
    }
}

/// Fields are dropped in order: the memory outlives the VM that is made of it.
struct Guest {
    vcpu: VcpuFd,
    _vm: VmFd,
    _memory: GuestMemory,
}

/// Runs the guest; an error is the result if it did not come to an end.
pub(super) fn attempt(iterations: u32, limit: Duration) -> Result<Probe, Probe> {
    let kvm = Kvm::new().step("open /dev/kvm")?;
    if kvm.get_api_version() != API_VERSION {
        return Err(refused("speak API version 12", &kvm.get_api_version()));
    }
    let mut guest = Guest::new(&kvm, iterations)?;
    let refused_msr = refused_msr(&kvm, &guest.vcpu)?;
    let guest_us = guest.run(limit)?;
    let start = cpu_time();
    loop_on_host(iterations);
    let host_us = micros(cpu_time().saturating_sub(start));
    Ok(Probe::Finished { guest_us, host_us, refused_msr })
}

impl Guest {
    fn new(kvm: &Kvm, iterations: u32) -> Result<Self, Probe> {
        let vm = kvm.create_vm().step("make a VM")?;
        vm.set_tss_address(TSS_ADDRESS).step("set the address of the TSS")?;
        let memory = GuestMemory::new().step("have memory")?;
        let region = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: 0,
            memory_size: memory.size(),
            userspace_addr: memory.address(),
        };
        // SAFETY: the region is one mapping, which lives until after the VM is closed.
        unsafe { vm.set_user_memory_region(region) }.step("give a VM memory")?;
        let vcpu = vm.create_vcpu(0).step("make a CPU")?;
        let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).step("tell CPU features")?;
        vcpu.set_cpuid2(&cpuid).step("set CPU features")?;
        let mut special = vcpu.get_sregs().step("read segments")?;
        special.cs.base = 0;
        special.cs.selector = 0;
        vcpu.set_sregs(&special).step("set segments")?;
        let mut registers = vcpu.get_regs().step("read registers")?;
        registers.rip = ENTRY;
        registers.rflags = 1 << 1; // a bit that is always set
        registers.rbx = iterations.into();
        vcpu.set_regs(&registers).step("set registers")?;
        unblock_kick_in_guest(&vcpu).step("set the signals that end a run")?;
        Ok(Self { vcpu, _vm: vm, _memory: memory })
    }

    /// The CPU time that the guest's loop took, in microseconds.
    fn run(&mut self, limit: Duration) -> Result<u64, Probe> {
        let begin = cpu_time();
        let mut reached = Stage::Start;
        let mut in_loop = (begin, begin);
        loop {
            let next = match self.vcpu.run() {
                Ok(VcpuExit::IoOut(PORT, &[stage])) => (reached, stage),
                Ok(VcpuExit::Hlt) if reached == Stage::Loop => {
                    return Ok(micros(in_loop.1.saturating_sub(in_loop.0)));
                }
                Ok(exit) => return Err(Probe::Crashed { reached, exit: format!("{exit:?}") }),
                Err(error) if error.errno() == libc::EINTR => {
                    let ran_ms = millis(cpu_time().saturating_sub(begin));
                    return Err(Probe::Stalled { reached, ran_ms, limit_ms: millis(limit) });
                }
                Err(error) => return Err(Probe::Crashed { reached, exit: error.to_string() }),
            };
            reached = match next {
                (Stage::Start, 1) => Stage::RealMode,
                (Stage::RealMode, 2) => {
                    in_loop.0 = cpu_time();
                    Stage::LongMode
                }
                (Stage::LongMode, 3) => {
                    in_loop.1 = cpu_time();
                    Stage::Loop
                }
                (_, other) => {
                    return Err(Probe::Crashed { reached, exit: format!("stage {other}") });
                }
            };
        }
    }
}

/// The register that VMMs set first, if KVM offers it and then refuses to set it.
fn refused_msr(kvm: &Kvm, vcpu: &VcpuFd) -> Result<Option<u32>, Probe> {
    let offered = kvm.get_msr_index_list().step("list its MSRs")?;
    // What is offered counts: a CPU that was given these features may have dropped some silently.
    let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).step("tell CPU features")?;
    let announces = |leaf: &kvm_bindings::kvm_cpuid_entry2| {
        leaf.function == CPUID_LEAF && leaf.index == 0 && leaf.edx & CPUID_ARCH_CAPABILITIES != 0
    };
    if !offered.as_slice().contains(&IA32_ARCH_CAPABILITIES)
        || !cpuid.as_slice().iter().any(announces)
    {
        return Ok(None);
    }
    let wanted = kvm_msr_entry { index: IA32_ARCH_CAPABILITIES, ..Default::default() };
    let mut entries = Msrs::from_entries(&[wanted]).step("list an MSR")?;
    // As VMMs do, the value that KVM itself proposes is set; the calls return how many worked.
    let is_set = kvm.get_msrs(&mut entries) == Ok(1) && vcpu.set_msrs(&entries) == Ok(1);
    Ok((!is_set).then_some(IA32_ARCH_CAPABILITIES))
}

/// Makes [`KICK`], which this thread blocks, end a run of the guest.
fn unblock_kick_in_guest(vcpu: &VcpuFd) -> std::io::Result<()> {
    /// The kernel's `struct kvm_signal_mask` with a set of 64 signals.
    #[repr(C)]
    struct SignalMask {
        len: u32,
        set: [u8; 8],
    }
    let blocked = !(1_u64 << (KICK - 1));
    let mask = SignalMask { len: 8, set: blocked.to_ne_bytes() };
    // SAFETY: the descriptor is an open vCPU, and the kernel reads the header and `len` bytes more,
    // which is the whole of `mask`.
    match unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_SET_SIGNAL_MASK as _, &raw const mask) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

/// CPU time of this thread, the guest's included: unlike time, it does not pass while others run.
fn cpu_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec.try_into().unwrap_or(0), time.tv_nsec.try_into().unwrap_or(0))
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
