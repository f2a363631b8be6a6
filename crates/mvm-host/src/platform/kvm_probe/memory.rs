//! The memory of the tiny guest, with its program, page tables and descriptor table in place.

use std::arch::global_asm;
use std::{io, ptr, slice};

use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};

/// Where the program begins, in real mode.
pub(super) const ENTRY: u64 = 0x1000;
/// The port that the program writes its stage to.
pub(super) const PORT: u16 = 0x80;

/// Guest memory in bytes: the program's page is followed by its tables and the pages that it writes.
const SIZE: usize = 0x8_0000;
const GDT_POINTER: usize = 0x1f00;
const GDT: usize = 0x1f10;
const PML4: usize = 0x2000;
const PDPT: usize = 0x3000;
const PD: usize = 0x4000;

const PRESENT_WRITABLE: u64 = 0b11;
const HUGE_PAGE: u64 = 1 << 7;
/// A flat code segment for long mode, and a flat data segment.
const CODE_SEGMENT: u64 = 0x00af_9b00_0000_ffff;
const DATA_SEGMENT: u64 = 0x00cf_9300_0000_ffff;

// Tells its stage on port 0x80. EBX has the number of iterations. It does what each kernel does
// first, since those steps are what a KVM that is emulated in software is slow at or fails on:
// it runs in real mode, enters long mode with its own page tables, counts, and writes fresh pages.
global_asm!(
    r#"
    .pushsection .rodata.mvm_kvm_probe, "a"
mvm_kvm_probe_begin:
    .code16
    movl $100, %ecx
1:  decl %ecx
    jnz 1b
    movb $1, %al
    outb %al, $0x80

    movl ${pml4}, %eax
    movl %eax, %cr3
    movl %cr4, %eax
    orl $0x20, %eax             # physical address extension
    movl %eax, %cr4
    movl $0xc0000080, %ecx      # EFER
    rdmsr
    orl $0x100, %eax            # long mode
    wrmsr
    lgdtl ({gdt_pointer})
    movl %cr0, %eax
    orl $0x80000001, %eax       # paging and protection
    movl %eax, %cr0
    ljmpl $8, $({entry} + 2f - mvm_kvm_probe_begin)

    .code64
2:  movw $16, %ax
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %ss
    movb $2, %al
    outb %al, $0x80

    movl %ebx, %ecx
3:  decl %ecx
    jnz 3b
    movb $3, %al
    outb %al, $0x80

    movl $0x10000, %edi
    movl $64, %ecx
4:  movl %ecx, (%rdi)
    addl $4096, %edi
    decl %ecx
    jnz 4b
    hlt
mvm_kvm_probe_end:
    .popsection
"#,
    pml4 = const PML4,
    gdt_pointer = const GDT_POINTER,
    entry = const ENTRY,
    options(att_syntax)
);

unsafe extern "C" {
    static mvm_kvm_probe_begin: u8;
    static mvm_kvm_probe_end: u8;
}

/// The counted loop of the guest, run on the host.
pub(super) fn loop_on_host(iterations: u32) {
    // SAFETY: the loop changes one register, which it is given, and the flags.
    unsafe {
        std::arch::asm!("2: dec {0:e}", "jnz 2b", inout(reg) iterations => _, options(nomem, nostack));
    }
}

/// Mapped memory for one guest.
pub(super) struct GuestMemory {
    start: ptr::NonNull<u8>,
}

impl GuestMemory {
    /// Maps memory and puts the program into it.
    pub(super) fn new() -> io::Result<Self> {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice touches no other memory.
        let start =
            unsafe { mmap_anonymous(ptr::null_mut(), SIZE, protection, MapFlags::PRIVATE)? };
        let start = ptr::NonNull::new(start.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        let mut memory = Self { start };
        memory.fill();
        Ok(memory)
    }

    fn fill(&mut self) {
        // SAFETY: the mapping is `SIZE` bytes long and zeroed, and no guest runs in it yet.
        let bytes = unsafe { slice::from_raw_parts_mut(self.start.as_ptr(), SIZE) };
        let code = program();
        bytes[ENTRY as usize..][..code.len()].copy_from_slice(code);
        let mut put =
            |at: usize, value: u64| bytes[at..][..8].copy_from_slice(&value.to_le_bytes());
        put(GDT, 0);
        put(GDT + 8, CODE_SEGMENT);
        put(GDT + 16, DATA_SEGMENT);
        put(GDT_POINTER, ((GDT as u64) << 16) | (3 * 8 - 1));
        put(PML4, PDPT as u64 | PRESENT_WRITABLE);
        put(PDPT, PD as u64 | PRESENT_WRITABLE);
        put(PD, PRESENT_WRITABLE | HUGE_PAGE); // the first 2 MiB onto themselves
    }

    /// Its address in this process.
    pub(super) fn address(&self) -> u64 {
        self.start.as_ptr() as u64
    }

    /// Its size in bytes.
    pub(super) fn size(&self) -> u64 {
        SIZE as u64
    }
}

impl Drop for GuestMemory {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's own, and its owner drops the VM that uses it first.
        // Nothing can be done if it stays.
        let _ = unsafe { munmap(self.start.as_ptr().cast(), SIZE) };
    }
}

fn program() -> &'static [u8] {
    let (begin, end) = (&raw const mvm_kvm_probe_begin, &raw const mvm_kvm_probe_end);
    // SAFETY: both labels are in one read-only section, in this order, with the program between.
    unsafe { slice::from_raw_parts(begin, end.offset_from_unsigned(begin)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_program_ends_before_its_tables() {
        let len = program().len();
        assert!(len > 0 && ENTRY as usize + len <= GDT_POINTER, "{len}");
        assert_eq!(program().last(), Some(&0xf4), "it ends with hlt");
    }
}
